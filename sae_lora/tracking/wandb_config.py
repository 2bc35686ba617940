"""A run as W&B shows it: id, name, tags, config and curves. Imports no wandb."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_lora.common.secrets import redacted
from sae_lora.config.enums import Hook
from sae_lora.config.identity import ADAPTING, identity, readable_name
from sae_lora.config.schema import Config
from sae_lora.config.serialize import as_dict
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint

AXES = ("tokens", "train_seconds")
"""What curves are drawn over."""
METRICS = tuple(
    field.name
    for field in dataclasses.fields(CurvePoint)
    if field.name not in (*AXES, "step", "per_sae")
)
"""What curves are drawn of."""
_LONGEST_TAG = 64


@dataclass(frozen=True)
class Shown:
    """What there is to show of a run.

    Args:
        folder: Its folder.
        config: Its config, with its SAEs resolved.
        environment: With what it is computed, where that is known (`provenance.environment`).
    """

    folder: RunFolder
    config: Config
    environment: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """For people."""
        return readable_name(self.config)

    @property
    def id(self) -> str:
        """The W&B run's id: the run's own, whoever goes on with it, and another after a failure.

        What a failed attempt has shown stays as it is; the next one shows its whole curve.
        """
        failed = sum(1 for _ in self.folder.path.glob("unfinished-*/failure.json"))
        sweep = re.sub(r"[/\\#?%:]", "_", self.config.sweep)  # W&B takes none of these
        return f"{sweep}-{identity(self.config)}" + (f"-{failed + 1}" if failed else "")

    @property
    def tags(self) -> list[str]:
        """Model, layer, what of it the SAE replaces if not its output, width, L0, method and rank."""
        values = self.values
        hook = values["layer"]["hook"]
        facts = {
            "model": self.config.model.name.rstrip("/").split("/")[-1],
            "layer": values["layer"]["index"],
            "hook": None if hook == Hook.resid_post.name else hook,
            "width": values["sae"]["width"],
            "l0": values["sae"]["l0"],
            "method": self.config.method.kind.name,
            "rank": self.config.lora.rank if self.config.method.kind in ADAPTING else None,
        }
        return [
            f"{name}:{_joined(value)}"[:_LONGEST_TAG]
            for name, value in facts.items()
            if value is not None
        ]

    @property
    def values(self) -> dict[str, Any]:
        """The whole config, nested; layer, hook, width and L0 are what the request resolved to."""
        values = as_dict(self.config)
        used = self.config.sae.used
        values["layer"]["index"] = _one([choice.block for choice in used])
        values["layer"]["hook"] = _one([choice.hook.name for choice in used])
        values["sae"]["width"] = _one([choice.width for choice in used])
        values["sae"]["l0"] = _one([choice.l0 for choice in used])
        return without_secrets(values | ({"environment": self.environment} if self.environment else {}))


def without_secrets(values: Any) -> Any:
    """Nested values, their texts redacted."""
    match values:
        case dict():
            return {key: without_secrets(value) for key, value in values.items()}
        case list():
            return [without_secrets(value) for value in values]
        case str():
            return redacted(values)
        case _:
            return values


def _one(values: Sequence[Any]) -> Any:
    """What all of them are, or all of them."""
    return values[0] if len(set(values)) == 1 else list(values)


def _joined(value: Any) -> str:
    return "+".join(f"{one:g}" if isinstance(one, float) else str(one) for one in _listed(value))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
