"""Methods side by side, after the same tokens and after the same seconds."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from rich.table import Table

from sae_lora.common.errors import UserError
from sae_lora.common.plots import logarithmic
from sae_lora.comparisons.interpolate import value_at
from sae_lora.config.serialize import load
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint
from sae_lora.report.figures import gap_curves
from sae_lora.report.frames import curves_frame, runs_frame
from sae_lora.report.tables import in_whole_words, mean_and_range, right_aligned


@dataclass(frozen=True)
class Outcome:
    """Results of one method, with a value for each seed. CE gaps are in nats per token."""

    method: str
    """Name of the method; names of both methods if a run begins with another run's result."""
    trained_weights: int
    seconds: list[float]
    """Seconds of training until the number of tokens that all runs reach."""
    flops: list[float]
    """FLOPs of training until the same number of tokens."""
    gap_after_tokens: list[float]
    """CE gap after the same number of tokens."""
    gap_after_seconds: list[float]
    """CE gap after the seconds that the fastest run takes for this number of tokens."""
    initial_gap: float
    """CE gap before training, of the first seed."""
    fvu: list[float]
    """FVU at the end."""


def compare(folders: Sequence[RunFolder]) -> list[Outcome]:
    """The results of each method of a sweep, the smallest gap after the same tokens first.

    Args:
        folders: Runs on the same text, trained one by one (`launcher.pack=off`), because in a pack a
            run's seconds are only its share of the pack's.

    Raises:
        UserError: If no run is finished, or the run whose result one begins with is missing.
    """
    finished = [folder for folder in folders if folder.is_finished]
    if not finished:
        raise UserError("none of these runs is finished")
    curves = {folder.path: folder.read_curve() for folder in finished}
    tokens = min(curve[-1].tokens for curve in curves.values())
    seconds = min(value_at(curve, "tokens", tokens, "train_seconds") for curve in curves.values())
    by_method: dict[str, list[RunFolder]] = defaultdict(list)
    for folder in finished:
        by_method[method_of(folder)].append(folder)
    outcomes = []
    for method, runs in by_method.items():
        seeds = [curves[folder.path] for folder in runs]
        first = seeds[0][0]
        outcomes.append(
            Outcome(
                method=method,
                trained_weights=runs[0].read_summary()["trainable_parameters"],
                seconds=_values_at(seeds, "tokens", tokens, "train_seconds"),
                flops=_values_at(seeds, "tokens", tokens, "train_flops"),
                gap_after_tokens=_values_at(seeds, "tokens", tokens, "ce_gap"),
                gap_after_seconds=_values_at(seeds, "train_seconds", seconds, "ce_gap"),
                initial_gap=first.spliced_ce - first.base_ce,
                fvu=[curve[-1].fvu for curve in seeds],
            )
        )
    return sorted(outcomes, key=lambda outcome: statistics.mean(outcome.gap_after_tokens))


def _values_at(
    curves: Sequence[Sequence[CurvePoint]], over: str, amount: float, field: str
) -> list[float]:
    return [value_at(curve, over, amount, field) for curve in curves]


def figures(folders: Sequence[RunFolder]) -> dict[str, go.Figure]:
    """The CE gap of each method over its training: over tokens, seconds and FLOPs, by file name.

    The axis of the gap is logarithmic and covers the runs' final gaps, because the gap of a new SAE
    begins far above them.
    """
    frame, curves = runs_frame(folders), curves_frame(folders)
    frame["method"] = [method_of(RunFolder(Path(path))) for path in frame["folder"]]
    gaps = [gap for gap in frame["ce_gap"] if gap is not None and gap > 0]
    by_axis = {}
    for over in ("tokens", "train_seconds", "train_flops"):
        figure = gap_curves(frame, curves, over, ["method"])
        if gaps:
            figure.update_yaxes(logarithmic(gaps))
        by_axis[f"methods_{over}"] = figure
    return by_axis


def method_of(folder: RunFolder) -> str:
    """The method of a run; both methods if the run begins with another run's result.

    Raises:
        UserError: If the other run is missing.
    """
    config = load(folder.config.read_text())
    name = config.method.kind.name
    if config.init is None:
        return name
    previous = load(folder.before(config.init).config.read_text())
    return f"{name} after {previous.method.kind.name}"


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each method: means over seeds, with the smallest and the largest value in brackets."""
    columns = "method", "before", "after the same tokens", "after the same seconds", "FVU", "weights"
    rows = right_aligned("CE gap in nats per token", [*columns, "seconds", "FLOPs"])
    for outcome in outcomes:
        rows.add_row(
            outcome.method,
            f"{outcome.initial_gap:+.3f}",
            mean_and_range(outcome.gap_after_tokens),
            mean_and_range(outcome.gap_after_seconds),
            f"{statistics.mean(outcome.fvu):.3f}",
            f"{outcome.trained_weights:,}",
            f"{statistics.mean(outcome.seconds):.0f}",
            f"{statistics.mean(outcome.flops):.1e}",
        )
    return in_whole_words(rows)
