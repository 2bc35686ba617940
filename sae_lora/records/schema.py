"""Content of the files in a run folder: points of the curve, progress, summary."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

from sae_lora.common.console import stage_text

SUMMARY_VERSION = 1


def check_types(schema: type, values: Mapping[str, Any]) -> None:
    """Check the values that a file has for the fields of a schema. Other values are left out.

    Raises:
        ValueError: For a value of another type, and for a number that is not finite.
    """
    for name, kind in typing.get_type_hints(schema).items():
        if name in values and not _is_of(values[name], kind):
            raise ValueError(f"{name} is {str(values[name])[:40]!r}")


def _is_of(value: object, kind: Any) -> bool:
    kinds = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
    plain = tuple(typing.get_origin(each) or each for each in kinds)
    if isinstance(value, bool | float | int):
        is_number = not isinstance(value, bool) and math.isfinite(value)
        return is_number and (float in plain or (int in plain and isinstance(value, int)))
    return isinstance(value, plain)


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation on the held-out tokens: a line of `curve.jsonl`.

    `metrics.py` has the meaning and the unit of each measure. A field with a default is null in points
    of older versions.
    """

    step: int
    """Optimiser steps taken."""
    tokens: int
    train_seconds: float
    base_ce: float
    spliced_ce: float
    student_ce: float
    ce_gap: float
    gap_closed: float | None
    kl: float
    top1_agreement: float
    fvu: float
    l0: float
    per_sae: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """`fvu`, `fvu_without_outliers`, `l0` and `dead` of each SAE, by hookpoint."""
    fvu_without_outliers: float | None = None
    dead_latents: float | None = None
    train_flops: float | None = None
    train_loss: float | None = None
    """Null before the first step; so are `lr`, `grad_norm` and `tokens_per_second`."""
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    peak_memory_gb: float | None = None


@dataclass(frozen=True)
class Progress:
    """The progress of a run while a process works on it."""

    stage: str
    """The current work, in a few words."""
    done: int = 0
    """Parts of the stage that are done."""
    total: int = 0
    """All parts of the stage; 0 if unknown."""
    step: int = 0
    steps: int = 0
    tokens: int = 0
    """Training tokens so far."""
    train_tokens: int = 0
    """Training tokens in total."""
    loss: float | None = None
    """Training KL of the last batch, in nats per token."""
    tokens_per_second: float | None = None
    """Training tokens per second of training time, over the last half minute. `metrics.py` has the
    meaning."""
    checkpoint_step: int | None = None
    """Step of the newest checkpoint; null before the first."""
    seconds_left: float | None = None
    """Expected seconds until the last evaluation of the curve; null if unknown, and after it."""

    @property
    def text(self) -> str:
        """The stage with its share done: `evaluating 3/16`."""
        return stage_text(self.stage, self.done, self.total)


def gap_closed(base_ce: float, spliced_ce: float, student_ce: float, rounding: float) -> float | None:
    """`1 − (student − base) / (spliced − base)`; `None` if the SAE opens no gap above `rounding`."""
    initial_gap = spliced_ce - base_ce
    return 1 - (student_ce - base_ce) / initial_gap if initial_gap > rounding else None


_LOGIT_SIZE = 32
"""Size below which the logits of language models lie; Gemma 2 caps them at 30."""


def rounding_error(relative: float, tokens: int) -> float:
    """Difference between two CEs that rounding explains, in nats per token.

    The CE of a token is as inexact as its logits. Errors of different tokens are independent, so the
    error of their mean falls with the root of their number. Sums over tokens are in float64 and add
    nothing.

    Args:
        relative: Relative error of logits from rounding.
        tokens: Number of held-out tokens.
    """
    return _LOGIT_SIZE * relative / math.sqrt(tokens)


@dataclass(frozen=True)
class Summary:
    """Results and settings of a finished run: the schema of `summary.json`, version 1.

    Within a version, fields are only added. `metrics.py` has the meaning and the unit of each measure. A
    measure that is also in the curve has the value of the last point.
    """

    base_ce: float
    spliced_ce: float
    student_ce: float
    initial_gap: float
    ce_gap: float
    gap_closed: float | None
    kl: float
    initial_kl: float
    top1_agreement: float
    fvu: float
    l0: float
    """Measured on the held-out tokens; the published L0 is in `sae`."""
    trainable_parameters: int
    train_tokens: int
    train_steps: int
    train_seconds: float
    total_seconds: float
    """Sum over the attempts, each up to the checkpoint from which the next attempt resumed."""
    validation_tokens: int
    """Held-out tokens read by every evaluation."""
    best_gap_closed: float | None
    model: dict[str, Any]
    """Name, commit, class, number of blocks, and the precisions of loading and computing."""
    sae: list[dict[str, Any]]
    """Per SAE: block, hookpoint, the rule for positions that keep their activation (`kept`), release, id
    or path, width, stated L0, measured L0, FVU and share of dead latents, the repository's commit and
    the SHA-256 of its weights. With several SAEs, also `alone_ce` and `alone_fvu`, with only this SAE in
    the plain model, and without this SAE `left_out_ce`, of the student, and `spliced_left_out_ce`,
    before training."""
    lora: dict[str, Any]
    """Rank, alpha, dropout, targets, blocks, the scale (the factor of B · A), and `left_out`: the number
    of weights in the adapted blocks without an adapter, by path in the block, except weights of one
    dimension. Empty if the method trains no adapters."""
    seed: int
    """Seed of the adapters' initial values and dropout."""
    data: dict[str, Any]
    """Source, revision or content hash, and number of passes over the training text."""
    environment: dict[str, Any]
    """Python, package versions, device, threads, host, git commit."""
    tracked_at: str | None
    """The W&B run: its address, or the folder of an offline run."""
    name: str
    hash: str
    train_flops: float | None = None
    """Null in summaries of older versions; so are `dead_latents` and `fvu_without_outliers`."""
    trained_together: int = 1
    """Number of runs that trained in one process and shared the frozen computation. `train_seconds` and
    `total_seconds` are the share of this run in the time of the process."""
    dead_latents: float | None = None
    fvu_without_outliers: float | None = None
    method: dict[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "lora"})
    """Kind, the rank of trained weights other than LoRA on the model, and `init`."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """One line each: differences between the run and what the metadata of its SAEs states, and positions
    that hold most of the variance of an SAE's input."""
    weights: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of each file of trained weights, by its path in the folder. Empty in older versions."""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """The same of the other files that a run leaves: the curve, and the settings beside the weights."""
    digest: str | None = None
    """SHA-256 of the other fields. Null in older versions."""
    version: int = SUMMARY_VERSION
