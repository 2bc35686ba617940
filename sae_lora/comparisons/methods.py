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
from sae_lora.records.factors import differing, finished_runs, label, text
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint
from sae_lora.report.figures import gap_curves
from sae_lora.report.frames import curves_frame, runs_frame
from sae_lora.report.repeats import Repeats, in_words, repeats
from sae_lora.report.tables import in_whole_words, right_aligned


@dataclass(frozen=True)
class Outcome:
    """Results of one method, with a value for each seed. CE gaps are in nats per token."""

    method: str
    """Name of the method; names of both methods if a run begins with another run's result."""
    settings: dict[str, str]
    """The factors in which runs of the same method differ besides their seeds."""
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
    trained_together: int
    """Largest number of runs that trained in one process: in a pack, seconds are a share of its time."""


def compare(folders: Sequence[RunFolder]) -> list[Outcome]:
    """The results of each method and its settings, the smallest gap after the same tokens first.

    Args:
        folders: Runs on the same text. To compare seconds, train them one by one (`launcher.pack=off`).

    Raises:
        UserError: If no run is finished, or the run whose result one begins with is missing.
    """
    finished = finished_runs(folders)
    if not finished:
        raise UserError("none of these runs is finished")
    curves = {run.folder.path: run.folder.read_curve() for run in finished}
    tokens = min(curve[-1].tokens for curve in curves.values())
    seconds = min(value_at(curve, "tokens", tokens, "train_seconds") for curve in curves.values())
    by_method: dict[str, list[Repeats]] = defaultdict(list)
    for group in repeats(finished):
        by_method[method_of(group.runs[0].folder)].append(group)
    outcomes = []
    for method, group in ((method, group) for method, groups in by_method.items() for group in groups):
        seeds = [curves[run.folder.path] for run in group.runs]
        first = seeds[0][0]
        names = differing([other.factors for other in by_method[method]])
        outcomes.append(
            Outcome(
                method=method,
                settings={name: text(group.factors.get(name)) for name in names},
                trained_weights=group.runs[0].summary["trainable_parameters"],
                seconds=_values_at(seeds, "tokens", tokens, "train_seconds"),
                flops=_values_at(seeds, "tokens", tokens, "train_flops"),
                gap_after_tokens=_values_at(seeds, "tokens", tokens, "ce_gap"),
                gap_after_seconds=_values_at(seeds, "train_seconds", seconds, "ce_gap"),
                initial_gap=first.spliced_ce - first.base_ce,
                fvu=[curve[-1].fvu for curve in seeds],
                trained_together=max(run.summary.get("trained_together", 1) for run in group.runs),
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
    """A row for each method and its settings: means over seeds, with 95% intervals."""
    settings = list(dict.fromkeys(name for outcome in outcomes for name in outcome.settings))
    columns = "before", "after the same tokens", "after the same seconds", "FVU", "weights"
    headings = ["method", *map(label, settings), *columns, "seconds", "FLOPs", "seeds"]
    rows = right_aligned("CE gap in nats per token", headings)
    for outcome in outcomes:
        rows.add_row(
            outcome.method,
            *(outcome.settings.get(name, "") for name in settings),
            f"{outcome.initial_gap:+.3f}",
            in_words(outcome.gap_after_tokens, "+.3f"),
            in_words(outcome.gap_after_seconds, "+.3f"),
            in_words(outcome.fvu, ".3f"),
            f"{outcome.trained_weights:,}",
            in_words(outcome.seconds, ".0f"),
            f"{statistics.mean(outcome.flops):.1e}",
            str(len(outcome.seconds)),
        )
    if any(outcome.trained_together > 1 for outcome in outcomes):
        rows.caption = "seconds: runs trained in packs, and these are their shares of a pack's time"
        rows.caption_justify = "left"
    return in_whole_words(rows)
