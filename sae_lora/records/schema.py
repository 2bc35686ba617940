"""Contents of the files in a run folder: points of a curve, progress, the summary."""

import dataclasses
from dataclasses import dataclass
from typing import Any

SUMMARY_VERSION = 1


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation on the held-out tokens: a line of `curve.jsonl`.

    The table in `metrics.py` says what each measure is, and its unit. A field with a default is null
    where an older version wrote the point.
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
    """`fvu`, `l0` and `dead` of each SAE by hookpoint."""
    dead_latents: float | None = None
    train_flops: float | None = None
    train_loss: float | None = None
    """Null before the first step, as `lr`, `grad_norm` and `tokens_per_second`."""
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    peak_memory_gb: float | None = None


@dataclass(frozen=True)
class Progress:
    """The progress of a run while a process works on it."""

    stage: str
    """The present work, in a few words."""
    step: int = 0
    steps: int = 0
    tokens: int = 0
    """Tokens trained on."""
    train_tokens: int = 0
    """Tokens to train on in all."""
    loss: float | None = None
    """Training KL of the last batch, in nats per token."""
    tokens_per_second: float | None = None
    """Over the last few seconds."""
    checkpoint_step: int | None = None
    """Step of the newest checkpoint; null before the first."""


def gap_closed(base_ce: float, spliced_ce: float, student_ce: float) -> float | None:
    """`1 − (student − base) / (spliced − base)`, or `None` where the SAE opens no gap."""
    initial_gap = spliced_ce - base_ce
    return 1 - (student_ce - base_ce) / initial_gap if initial_gap > 0 else None


@dataclass(frozen=True)
class Summary:
    """Results of a finished run, and how it got them: the schema of `summary.json`, version 1.

    Fields are only ever added within a version. The table in `metrics.py` says what each measure is, and
    its unit; a measure that the curve has too is that of its last point.
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
    """Measured on the held-out tokens; what the SAE's makers state is in `sae`."""
    trainable_parameters: int
    train_tokens: int
    train_steps: int
    train_seconds: float
    total_seconds: float
    """Summed over its attempts, as far as their checkpoints went on."""
    validation_tokens: int
    """Held-out tokens read by every evaluation."""
    best_gap_closed: float | None
    model: dict[str, Any]
    """Name, commit, class, number of blocks, and the precisions of loading and computing."""
    sae: list[dict[str, Any]]
    """Per SAE: block, hookpoint, release, id or path, width, stated L0, measured L0, FVU and share of
    dead latents, the repository's commit and the SHA-256 of its weights. Where there are several, also
    `alone_ce` and `alone_fvu`, with this one alone in the plain model, and `left_out_ce`, of the student
    without it."""
    lora: dict[str, Any]
    """Rank, alpha, dropout, targets, blocks, and the scale that B · A is multiplied by; empty with a
    method that trains no adapters."""
    seed: int
    """Seed of the adapters' initial values and dropout."""
    data: dict[str, Any]
    """Source, revision or content hash, and how often the training text was gone through."""
    environment: dict[str, Any]
    """Python, package versions, device, threads, host, git commit."""
    tracked_at: str | None
    """The run in W&B: an address, or the folder of an offline run."""
    name: str
    hash: str
    train_flops: float | None = None
    """Null in an older summary, as `dead_latents`."""
    trained_together: int = 1
    """Runs that trained in one process and shared the frozen part of their work; of that process's
    time, `train_seconds` and `total_seconds` are this run's share."""
    dead_latents: float | None = None
    method: dict[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "lora"})
    """Kind, the rank of what it trains where that is no LoRA on the model, and `init`."""
    version: int = SUMMARY_VERSION
