"""A run as W&B shows it: id, name, tags, config and curves. Imports no wandb."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from sae_lora.common.secrets import redacted
from sae_lora.config.enums import Hook
from sae_lora.config.identity import identity, readable_name
from sae_lora.config.schema import Config
from sae_lora.config.serialize import as_dict
from sae_lora.records.factors import FACTORS, Factor, text, values_of
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint

AXES = ("tokens", "train_seconds")
"""What curves are drawn over."""
CURVES = tuple(
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
        """Factors that people filter runs by: model, layer, hook, width, L0, method and rank."""
        found = {factor.tag: value for factor, value in self._factors if factor.tag}
        found["model"] = self.config.model.name.rstrip("/").split("/")[-1]
        if found["hook"] == Hook.resid_post.name:
            del found["hook"]
        return [
            f"{tag}:{text(value)}"[:_LONGEST_TAG] for tag, value in found.items() if value is not None
        ]

    @property
    def values(self) -> dict[str, Any]:
        """The whole config, nested; layer, hook, width and L0 are what the request resolved to."""
        values = as_dict(self.config)
        used = values["sae"]["used"]
        resolved = {"block": ("layer", "index"), "hook": ("layer", "hook")}
        resolved |= {"width": ("sae", "width"), "l0": ("sae", "l0")}
        for name, (group, key) in resolved.items():
            of_saes = [choice[name] for choice in used]
            values[group][key] = of_saes[0] if len(set(of_saes)) == 1 else of_saes
        return without_secrets(values | ({"environment": self.environment} if self.environment else {}))

    @property
    def _factors(self) -> list[tuple[Factor, Any]]:
        values = values_of(as_dict(self.config), {})
        return [(factor, values[name]) for name, factor in FACTORS.items()]


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
