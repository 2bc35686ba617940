"""Closes the cross-entropy gap of SAEs spliced into language models, with LoRA adapters."""

# pyright: reportImportCycles=false
# Names below are imported at their first use, so they close no circle.
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lora.api import launch
    from sae_lora.export.adapted_model import load_adapted
    from sae_lora.report.sweep import load_sweep

__all__ = ["launch", "load_adapted", "load_sweep"]

_MODULES = {
    "launch": "api",
    "load_adapted": "export.adapted_model",
    "load_sweep": "report.sweep",
}
"""By name, the module that is imported at the first use, because torch takes seconds."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
