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
    """Results of one method; CE gaps in nats per token, a value for each seed."""

    method: str
    """Name of the method; of both methods where a run begins with another's result."""
    trained_weights: int
    seconds: list[float]
    """Seconds of training, up to the tokens that all runs have been trained on."""
    flops: list[float]
    """FLOPs of training, up to the same tokens."""
    gap_after_tokens: list[float]
    """CE gap after the tokens that all runs have been trained on."""
    gap_after_seconds: list[float]
    """CE gap after the seconds that the quickest run took for them."""
    initial_gap: float
    """CE gap before training, of the first seed."""
    fvu: list[float]
    """FVU at the end."""


def compare(folders: Sequence[RunFolder]) -> list[Outcome]:
    """The results of each method of a sweep, the smallest gap after the same tokens first.

    Args:
        folders: Runs on the same text, trained one by one (`launcher.pack=off`): in packs, a run's
            seconds are shares.

    Raises:
        UserError: Where none of them is finished, or a run that one has begun with is gone.
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
    curves: Sequence[Sequence[CurvePoint]], over: str, amount: float, wanted: str
) -> list[float]:
    return [value_at(curve, over, amount, wanted) for curve in curves]


def figures(folders: Sequence[RunFolder]) -> dict[str, go.Figure]:
    """The CE gap of each method while it trains, over tokens, seconds and FLOPs, by file name.

    The axis of the gap is logarithmic and ends where the worst method ends: a new SAE begins far above.
    """
    frame, curves = runs_frame(folders), curves_frame(folders)
    frame["method"] = [method_of(RunFolder(Path(path))) for path in frame["folder"]]
    gaps = [gap for gap in frame["ce_gap"] if gap is not None and gap > 0]
    drawn = {}
    for over in ("tokens", "train_seconds", "train_flops"):
        figure = gap_curves(frame, curves, over, ["method"])
        if gaps:
            figure.update_yaxes(logarithmic(gaps))
        drawn[f"methods_{over}"] = figure
    return drawn


def method_of(folder: RunFolder) -> str:
    """The method of a run; of both runs where it begins with another's result.

    Raises:
        UserError: Where that other run is gone.
    """
    config = load(folder.config.read_text())
    name = config.method.kind.name
    if config.init is None:
        return name
    before = load(folder.before(config.init).config.read_text())
    return f"{name} after {before.method.kind.name}"


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each method; means over seeds, in brackets the least and the largest."""
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
