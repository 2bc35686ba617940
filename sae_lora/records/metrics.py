"""The measures of a run: name, unit, format, better direction and meaning of each.

Tables, data frames, figures, W&B, the report, the model card and docs/metrics.md use this list. A new
measure needs an entry here, a field of `CurvePoint` or `Summary` in `schema.py`, and the line that
computes it, in `train/evaluator.py` or `train/train_state.py`.
"""

from dataclasses import dataclass
from enum import Enum

from sae_lora.common.console import duration, percent


class Kind(Enum):
    """Notation of a value: a format, or the name of the function that formats it."""

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
    """A measure of a run."""

    key: str
    """The field in `curve.jsonl` and `summary.json`, and the column in a data frame."""
    name: str
    """The name in tables and on pages."""
    kind: Kind
    text: str
    """The meaning, in a sentence."""
    unit: str = ""
    better: str = ""
    """`lower` or `higher`; empty if neither is better."""
    heading: str = ""
    """A shorter name for the heading of a column."""
    axis: str = ""
    """The title of an axis, if it is not the name with the unit."""
    remark: str = ""
    """Text after a value without a unit, in a table."""

    @property
    def column(self) -> str:
        """The heading of a column."""
        return self.heading or self.name

    @property
    def suffix(self) -> str:
        """The text after a value: the unit or the remark."""
        return self.unit or self.remark

    @property
    def title(self) -> str:
        """The title of an axis."""
        return self.axis or (f"{self.name} ({self.suffix})" if self.suffix else self.name)

    def written(self, value: float | None, digits: int = 3) -> str:
        """The value as text, also of `None`. `digits` applies to decimal and signed values."""
        if self.kind is Kind.share:
            return percent(value)
        if value is None:
            return "–"
        if self.kind is Kind.seconds:
            return duration(value)
        return format(value, self.kind.value.format(digits=digits))


NO_GAP = "the SAE opens no gap above rounding errors"
"""The reason for an undefined gap closed, unless the SAE is new."""
_NATS = "nats/token"
_ALL = (
    Metric("base_ce", "base CE", Kind.decimal, "Cross-entropy of the plain model, the teacher.", _NATS),
    Metric(
        *("spliced_ce", "spliced CE", Kind.decimal),
        "Cross-entropy of the model with the SAE, before training.",
        _NATS,
    ),
    Metric(
        *("student_ce", "student CE", Kind.decimal),
        "Cross-entropy of the model with the SAE and the trained weights.",
        *(_NATS, "lower"),
    ),
    Metric(
        *("initial_gap", "gap before", Kind.signed),
        "spliced CE − base CE: the cost of the SAE before training.",
        _NATS,
    ),
    Metric(
        *("ce_gap", "gap after", Kind.signed),
        "student CE − base CE: the cost of the SAE after training; positive is worse.",
        *(_NATS, "lower"),
        axis="CE gap (nats per token)",
    ),
    Metric(
        *("gap_closed", "gap closed", Kind.share),
        f"1 − gap after / gap before; 1 is a closed gap. Undefined if {NO_GAP}, or is new.",
        better="higher",
        axis="CE gap closed",
    ),
    Metric(
        *("best_gap_closed", "best gap closed", Kind.share),
        "Largest gap closed at any evaluation of the run.",
        better="higher",
    ),
    Metric(
        *("initial_kl", "KL before", Kind.decimal),
        "KL(plain model ‖ spliced model) before training.",
        _NATS,
    ),
    Metric(
        *("kl", "KL", Kind.decimal),
        "KL(plain model ‖ student) over the whole vocabulary, the training loss, on held-out text.",
        *(_NATS, "lower"),
    ),
    Metric(
        *("top1_agreement", "top-1 agreement", Kind.share),
        "Share of positions at which plain model and student have the same most likely token.",
        remark="with the base model",
        better="higher",
        heading="top-1",
    ),
    Metric(
        *("fvu", "FVU", Kind.decimal),
        "Fraction of variance unexplained: residual variance / total variance of the reconstruction, on "
        "the inputs of the student's SAEs; mean over SAEs.",
        remark="of the SAE's input",
        better="lower",
    ),
    Metric(
        *("fvu_without_outliers", "FVU without outliers", Kind.decimal),
        "FVU without the tokens whose SAE input has a norm of more than 10 times the median norm in "
        "their sequence, such as attention sinks; mean over SAEs.",
        better="lower",
        heading="FVU w/o outliers",
    ),
    Metric(
        *("l0", "L0", Kind.tenths),
        "Mean number of active latents per token; mean over SAEs.",
        "latents/token",
    ),
    Metric(
        *("dead_latents", "dead latents", Kind.share),
        "Share of latents that are active on no held-out token; mean over SAEs.",
        better="lower",
    ),
    Metric(
        *("trainable_parameters", "trainable parameters", Kind.count),
        "Number of trained weights.",
        heading="parameters",
        axis="trained parameters",
    ),
    Metric(*("tokens", "tokens", Kind.count), "Training tokens so far.", axis="training tokens"),
    Metric("train_tokens", "training tokens", Kind.count, "Training tokens in total."),
    Metric("train_steps", "training steps", Kind.count, "Number of optimiser steps."),
    Metric(
        *("train_flops", "training FLOPs", Kind.power),
        "Floating-point operations of the training, counted as if the run had trained alone.",
        better="lower",
        heading="FLOPs",
    ),
    Metric(
        *("train_seconds", "training time", Kind.seconds),
        "Seconds in training steps. For runs that train together: the share of this run.",
        better="lower",
        heading="training",
        axis="seconds of training",
    ),
    Metric(
        *("total_seconds", "total time", Kind.seconds),
        "Seconds of the run, with loading and evaluations.",
        better="lower",
    ),
    Metric(
        *("closed_per_million_parameters", "closed per million parameters", Kind.share),
        "Gap closed per 10^6 trained parameters.",
        better="higher",
    ),
    Metric(
        *("closed_per_petaflop", "closed per petaFLOP", Kind.share),
        "Gap closed per 10^15 training FLOPs.",
        better="higher",
    ),
    Metric(
        *("closed_per_minute", "closed per minute", Kind.share),
        "Gap closed per minute of training time.",
        better="higher",
    ),
    Metric(
        *("train_loss", "training loss", Kind.decimal),
        "Mean training KL since the last evaluation. With method=sae: mean squared error of the "
        "reconstruction, summed over d_model.",
        *(_NATS, "lower"),
    ),
    Metric("lr", "learning rate", Kind.number, "Learning rate of the last step."),
    Metric(
        *("grad_norm", "gradient norm", Kind.number),
        "Norm of the gradient in the last step, before clipping.",
    ),
    Metric(
        *("tokens_per_second", "tokens/s", Kind.count),
        "Training tokens per second of wall time in training, since the last evaluation. This time has "
        "steps and, with method=sae, the filling of the buffer, spread evenly over the steps that it "
        "serves; it has no evaluations and no checkpoints. Runs that train together have the same rate.",
        better="higher",
    ),
    Metric(
        *("peak_memory_gb", "peak memory", Kind.number),
        "Largest memory of the process so far, in 10^9 bytes: of the GPU if it uses one, else of the "
        "machine.",
        *("GB", "lower"),
    ),
)
METRICS: dict[str, Metric] = {metric.key: metric for metric in _ALL}
"""The measures by key."""
