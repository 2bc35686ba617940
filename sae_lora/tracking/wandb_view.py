"""A run as W&B shows it: id, name, tags, config and curves. Imports no wandb."""

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any

from sae_lora.common.secrets import redacted
from sae_lora.config.enums import Hook
from sae_lora.config.identity import identity, readable_name
from sae_lora.config.schema import Config
from sae_lora.config.serialize import as_dict
from sae_lora.records.factors import FACTORS, text, values_of
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint

AXES = ("tokens", "train_seconds")
"""Fields of a point that are a horizontal axis of curves."""
CURVES = tuple(
    field.name
    for field in dataclasses.fields(CurvePoint)
    if field.name not in (*AXES, "step", "per_sae")
)
"""Fields of a point that are shown as curves."""
_MAX_LENGTH, _MAX_TAG_LENGTH = 128, 64
"""Longest id, name and group, and longest tag, that W&B accepts."""


@dataclass(frozen=True)
class WandbView:
    """A run as W&B shows it."""

    folder: RunFolder
    config: Config
    """The config, with resolved SAEs."""
    environment: dict[str, Any] | None = None
    """Versions and machine, if known (`provenance.environment`)."""

    @property
    def name(self) -> str:
        """The name of the run, as `tracking.name` or its settings give it."""
        return shortened(self.config.tracking.name or readable_name(self.config))

    def rows(self, points: int | None, first_step: int) -> list[dict[str, Any]]:
        """The rows from a step on, among the first `points` of the curve (`None`: all); no nulls."""
        new = [point for point in self.folder.read_curve()[:points] if point.step >= first_step]
        return [{key: value for key, value in vars(point).items() if value is not None} for point in new]

    @property
    def group(self) -> str:
        """The sweep."""
        return shortened(self.config.sweep)

    @property
    def id(self) -> str:
        """The id of the W&B run: equal for all attempts until one fails; the next attempt gets a new id.

        The W&B run of a failed attempt does not change; the next attempt shows its whole curve. In a
        trial of `wandb agent`, the id is the one that its server has given to the trial.
        """
        if (trial := trial_id()) is not None:
            return trial
        failed = sum(1 for _ in self.folder.path.glob("unfinished-*/failure.json"))
        sweep = re.sub(r"[/\\#?%:]", "_", self.config.sweep)  # W&B does not accept these characters
        end = f"-{identity(self.config)}" + (f"-{failed + 1}" if failed else "")
        return shortened(sweep, _MAX_LENGTH - len(end) - len("-offline")) + end

    @property
    def tags(self) -> list[str]:
        """Model, layer, hook, width, L0, method and rank, then `tracking.tags`."""
        factors = values_of(as_dict(self.config), {})
        tags = {factor.tag: factors[name] for name, factor in FACTORS.items() if factor.tag}
        tags["model"] = self.config.model.name.rstrip("/").split("/")[-1]
        if tags["hook"] == Hook.resid_post.name:
            del tags["hook"]
        named = [f"{tag}:{text(value)}" for tag, value in tags.items() if value is not None]
        every = dict.fromkeys([*named, *self.config.tracking.tags])
        return [shortened(tag, _MAX_TAG_LENGTH) for tag in every]

    @property
    def values(self) -> dict[str, Any]:
        """The whole config, nested; layer, hook, width and L0 are those of the resolved SAEs."""
        values = as_dict(self.config)
        for name in ("block", "hook", "width", "l0"):
            group, key = FACTORS[name].keys[0].split(".")
            sae_values = [choice[name] for choice in values["sae"]["used"]]
            values[group][key] = sae_values[0] if len(set(sae_values)) == 1 else sae_values
        return without_secrets(values | ({"environment": self.environment} if self.environment else {}))


def trial_id() -> str | None:
    """The id of the W&B run that `wandb agent` has started this process for; `None` without an agent."""
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None


def shortened(text: str, most: int = _MAX_LENGTH) -> str:
    """A text of at most `most` characters. If it is cut, its end is a hash, so that it stays unique."""
    if len(text) <= most:
        return text
    return f"{text[: most - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def without_secrets(values: Any) -> Any:
    """Nested values in which secrets in texts are redacted."""
    match values:
        case dict():
            return {key: without_secrets(value) for key, value in values.items()}
        case list():
            return [without_secrets(value) for value in values]
        case str():
            return redacted(values)
        case _:
            return values
