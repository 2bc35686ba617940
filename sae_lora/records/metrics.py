"""Every measure of a run, once: name, unit, format, better direction and meaning.

Tables, data frames, figures, W&B, the report, the model card and docs/metrics.md read this table. A new
measure of training is one entry here, a field of `CurvePoint` or `Summary` in `schema.py`, and the line
that computes it, in `train/evaluator.py` or `train/train_state.py`.
"""

from dataclasses import dataclass
from enum import Enum

from sae_lora.common.console import duration, percent


class Kind(Enum):
    """Notation of a value: a format, or the name of the function that writes it."""

    decimal = ".{digits}f"
    signed = "+.{digits}f"
    tenths = ".1f"
    count = ",.0f"
    power = ".2e"
    number = ",.6g"
    share = "percent"
    seconds = "duration"


@dataclass(frozen=True)
class Metric:
    """One measure."""

    key: str
    """Its field in `curve.jsonl` and `summary.json`, and its column in a data frame."""
    name: str
    """Its name for people."""
    kind: Kind
    text: str
    """Its meaning, in a sentence."""
    unit: str = ""
    better: str = ""
    """`lower` or `higher`, where one of them is."""
    heading: str = ""
    """A shorter name, for the head of a column."""
    axis: str = ""
    """The title of an axis, where that is not the name with the unit."""
    remark: str = ""
    """Text behind the value in a table, where the value has no unit."""

    @property
    def column(self) -> str:
        """The head of a column."""
        return self.heading or self.name

    @property
    def suffix(self) -> str:
        """The unit or the remark, behind a value."""
        return self.unit or self.remark

    @property
    def title(self) -> str:
        """The title of an axis."""
        return self.axis or (f"{self.name} ({self.suffix})" if self.suffix else self.name)

    def written(self, value: float | None, digits: int = 3) -> str:
        """The value as people read it, `None` too; with `digits` if it is decimal or signed."""
        if self.kind is Kind.share:
            return percent(value)
        if value is None:
            return "–"
        if self.kind is Kind.seconds:
            return duration(value)
        return format(value, self.kind.value.format(digits=digits))


_NATS = "nats/token"
_ALL = (
    Metric("base_ce", "base CE", Kind.decimal, "Cross-entropy of the plain model, the teacher.", _NATS),
    Metric(
        *("spliced_ce", "spliced CE", Kind.decimal),
        "Cross-entropy with the SAE in place and nothing trained.",
        _NATS,
    ),
    Metric(
        *("student_ce", "student CE", Kind.decimal),
        "Cross-entropy with the SAE in place and with what was trained.",
        *(_NATS, "lower"),
    ),
    Metric(
        *("initial_gap", "gap before", Kind.signed),
        "spliced CE − base CE: what the SAE costs before training.",
        _NATS,
    ),
    Metric(
        *("ce_gap", "gap after", Kind.signed),
        "student CE − base CE: what the SAE costs after training; positive is worse.",
        *(_NATS, "lower"),
        axis="CE gap (nats per token)",
    ),
    Metric(
        *("gap_closed", "gap closed", Kind.share),
        "1 − gap after / gap before, where 1 is a closed gap. Undefined where the SAE opens no gap, and "
        "where it is new.",
        better="higher",
        axis="CE gap closed",
    ),
    Metric(
        *("best_gap_closed", "best gap closed", Kind.share),
        "The largest share of the gap that was closed at any evaluation.",
        better="higher",
    ),
    Metric(
        *("initial_kl", "KL before", Kind.decimal),
        "KL(plain model ‖ spliced model) before training.",
        _NATS,
    ),
    Metric(
        *("kl", "KL", Kind.decimal),
        "KL(plain model ‖ student) over the whole vocabulary: the training loss, on held-out text.",
        *(_NATS, "lower"),
    ),
    Metric(
        *("top1_agreement", "top-1 agreement", Kind.share),
        "Share of positions at which plain model and student put the same token first.",
        remark="with the base model",
        better="higher",
        heading="top-1",
    ),
    Metric(
        *("fvu", "FVU", Kind.decimal),
        "Residual variance / total variance of the reconstruction, on what the student's SAEs read; mean"
        " over SAEs.",
        remark="of the SAE's input",
        better="lower",
    ),
    Metric(
        *("l0", "L0", Kind.tenths),
        "Mean number of active latents per token; mean over SAEs.",
        "latents/token",
    ),
    Metric(
        *("dead_latents", "dead latents", Kind.share),
        "Share of latents that none of the held-out tokens makes active; mean over SAEs.",
        better="lower",
    ),
    Metric(
        *("trainable_parameters", "trainable parameters", Kind.count),
        "Weights that were trained.",
        heading="parameters",
        axis="trained parameters",
    ),
    Metric(*("tokens", "tokens", Kind.count), "Tokens trained on so far.", axis="training tokens"),
    Metric("train_tokens", "training tokens", Kind.count, "Tokens trained on."),
    Metric("train_steps", "training steps", Kind.count, "Optimiser steps taken."),
    Metric(
        *("train_flops", "training FLOPs", Kind.power),
        "Floating-point operations of the training, if the run had trained alone.",
        better="lower",
        heading="FLOPs",
    ),
    Metric(
        *("train_seconds", "time training", Kind.seconds),
        "Seconds spent in training steps; where runs train together, this run's share.",
        better="lower",
        heading="training",
        axis="seconds of training",
    ),
    Metric(
        *("total_seconds", "time in all", Kind.seconds),
        "Seconds that the run took, loading and evaluations included.",
        better="lower",
    ),
    Metric(
        *("closed_per_million_parameters", "closed per million parameters", Kind.share),
        "Gap closed over trained parameters.",
        better="higher",
    ),
    Metric(
        *("closed_per_petaflop", "closed per petaFLOP", Kind.share),
        "Gap closed over 10^15 operations of training.",
        better="higher",
    ),
    Metric(
        *("closed_per_minute", "closed per minute", Kind.share),
        "Gap closed over minutes of training.",
        better="higher",
    ),
    Metric(
        *("train_loss", "training loss", Kind.decimal),
        "Mean training KL since the last evaluation; with method=sae the squared error of a residual, "
        "summed over d_model.",
        *(_NATS, "lower"),
    ),
    Metric("lr", "learning rate", Kind.number, "Learning rate of the last step."),
    Metric(
        *("grad_norm", "gradient norm", Kind.number),
        "Norm of the gradient in the last step, before clipping.",
    ),
    Metric(
        *("tokens_per_second", "tokens/s", Kind.count),
        "Training tokens per second since the last evaluation.",
        better="higher",
    ),
    Metric(
        *("peak_memory_gb", "peak memory", Kind.number),
        "The most memory that the process has held so far, in 10^9 bytes: of the GPU where it computes "
        "on one, else of the machine.",
        *("GB", "lower"),
    ),
)
METRICS: dict[str, Metric] = {metric.key: metric for metric in _ALL}
"""By key."""
