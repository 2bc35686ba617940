"""Changes of latents by ways to adapt, beside those between two seeds and of finetuned SAEs."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Table

from sae_lora.common.errors import UserError
from sae_lora.common.plots import COLOURS, finished, line_and_markers
from sae_lora.config.enums import Method, Suite
from sae_lora.evaluation.suite_records import Record, evaluate_command, read
from sae_lora.records.factors import SEEDS, FinishedRun, finished_runs, label, text, varying
from sae_lora.records.folder import RunFolder
from sae_lora.records.metrics import METRICS
from sae_lora.report.repeats import Repeats, mean_of, repeats
from sae_lora.report.tables import in_whole_words, right_aligned

MEASURES = {
    "turned": ("turned", "share of latents whose effect on the logits turned by more than 30°"),
    "contexts_changed": (
        "contexts changed",
        "share of latents with most of their most active tokens changed",
    ),
    "cosine": ("cosine", "mean cosine of the effects before and after"),
    "overlap": ("overlap", "mean Jaccard index of the most active tokens before and after"),
    "promoted": ("promoted", "mean share of the ten most promoted tokens that are the same"),
}
"""Column and meaning of each measure. All lie between 0 and 1."""
_DRAWN = ("cosine", "overlap")
"""The measures in the figure; both are 1 for latents that did not change."""
_SEEDS = "seeds: "
"""Begins the columns that compare two seeds with each other."""


@dataclass(frozen=True)
class Way:
    """Results of runs that differ only in their seeds; lists have a value per seed."""

    settings: dict[str, Any]
    """The factors in which the ways differ."""
    gap_closed: list[float | None]
    changes: dict[str, list[float | None]]
    """The `MEASURES` from the plain model to the run, means over SAEs."""
    between_seeds: dict[str, list[float]]
    """The `MEASURES` from one seed's model to another's, for each pair; empty without pairs."""
    finetuned: dict[str, Any] | None
    """The settings of the finetuned SAEs that close the most similar part of the gap, their
    `gap_closed` and their `MEASURES`. `None` for these themselves, and if there are none."""


def compare(folders: Sequence[RunFolder]) -> list[Way]:
    """The changes of latents by each way, in the order of its factors.

    Raises:
        UserError: If the suite `latents` has measured none of the runs.
    """
    every = finished_runs(folders)
    records = {run.folder.path: read(run.folder, Suite.latents) for run in every}
    measured = {path: record for path, record in records.items() if record is not None}
    runs = [run for run in every if run.folder.path in measured]
    if not runs:
        sweep = next((folder.path.parent for folder in folders), Path("outputs/<sweep>"))
        raise UserError(f"no run has measured latents: `{evaluate_command(sweep, ['latents'])}`")
    groups = repeats(runs)
    names = [name for name in varying([group.factors for group in groups]) if name not in SEEDS]
    changes = [_changes([measured[run.folder.path] for run in group.runs]) for group in groups]
    return [
        Way(
            settings={name: group.factors.get(name) for name in names},
            gap_closed=_gap_closed(group),
            changes=of_group,
            between_seeds=_between(group.runs),
            finetuned=_nearest(group, groups, changes, names),
        )
        for group, of_group in zip(groups, changes, strict=True)
    ]


def _gap_closed(group: Repeats) -> list[float | None]:
    return [run.summary["gap_closed"] for run in group.runs]


def _changes(records: Sequence[Record]) -> dict[str, list[float | None]]:
    def mean(record: Record, name: str) -> float | None:
        return mean_of([sae[name]["value"] for sae in record.results["saes"].values()]).value

    return {name: [mean(record, name) for record in records] for name in MEASURES}


def _between(runs: Sequence[FinishedRun]) -> dict[str, list[float]]:
    from sae_lora.evaluation.latents.between import between  # brings torch in

    pairs = itertools.combinations([run.folder for run in runs], 2)
    compared = [each for first, second in pairs if (each := between(first, second)) is not None]
    return {name: [getattr(each, name) for each in compared] for name in MEASURES if compared}


def _nearest(
    group: Repeats,
    groups: Sequence[Repeats],
    changes: Sequence[dict[str, list[float | None]]],
    names: Sequence[str],
) -> dict[str, Any] | None:
    """The finetuned SAEs whose gap closed is nearest to that of this group."""
    closed = mean_of(_gap_closed(group)).value
    if _is_finetuned(group) or closed is None:
        return None
    best, smallest = None, float("inf")
    for other, of_other in zip(groups, changes, strict=True):
        value = mean_of(_gap_closed(other)).value if _is_finetuned(other) else None
        if value is not None and abs(value - closed) < smallest:
            settings = {name: other.factors.get(name) for name in names}
            best = {"settings": settings, "gap_closed": _gap_closed(other), "changes": of_other}
            smallest = abs(value - closed)
    return best


def _is_finetuned(group: Repeats) -> bool:
    return group.factors["method"] == Method.sae_finetune.name


def table(ways: Sequence[Way]) -> Table:
    """A row for each way: means over seeds, with 95% intervals; then two seeds beside each other."""
    names = list(ways[0].settings)
    has_pairs = any(way.between_seeds for way in ways)
    pairs = ("cosine", "overlap") if has_pairs else ()
    headings = [METRICS["gap_closed"].column, *(heading for heading, _ in MEASURES.values())]
    headings += [f"{_SEEDS}{MEASURES[name][0]}" for name in pairs]
    rows = right_aligned("Latents after training", [*map(label, names), *headings, "runs"])
    for way in ways:
        rows.add_row(
            *(text(way.settings[name]) for name in names),
            mean_of(way.gap_closed).written(METRICS["gap_closed"].written),
            *(written(name, way.changes[name]) for name in MEASURES),
            *(written(name, way.between_seeds.get(name, [])) for name in pairs),
            str(len(way.gap_closed)),
        )
    rows.caption = "\n".join(f"{heading}: {meaning}" for heading, meaning in MEASURES.values())
    if has_pairs:
        rows.caption += f"\n{_SEEDS}the same from one seed's model to another's"
    return in_whole_words(rows)


def written(name: str, values: Sequence[float | None]) -> str:
    """The mean of a measure over seeds; a dash without values."""
    if not values:
        return "–"
    as_text: Callable[[float | None], str] = METRICS["gap_closed"].written
    if name in ("cosine", "overlap"):
        as_text = _three_digits
    return mean_of(values).written(as_text)


def _three_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def figures(folders: Sequence[RunFolder]) -> dict[str, go.Figure]:
    """Changes of latents over the gap closed, a line for each way and a point for each rank."""
    ways = compare(folders)
    figure = make_subplots(1, 2, horizontal_spacing=0.14)
    for number, name in enumerate(dict.fromkeys(map(name_of, ways))):
        named = [way for way in ways if name_of(way) == name]
        named.sort(key=lambda way: mean_of(way.gap_closed).value or 0)
        style = line_and_markers(COLOURS[number % len(COLOURS)], number)
        for column, measure in enumerate(_DRAWN, 1):
            means = [mean_of(way.changes[measure]) for way in named]
            figure.add_scatter(
                x=[mean_of(way.gap_closed).value for way in named],
                y=[mean.value for mean in means],
                error_y={"array": [mean.margin or 0 for mean in means], "thickness": 1, "width": 3},
                text=[text(way.settings.get("rank")) for way in named],
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                **style,
                row=1,
                col=column,
            )
            seeds = [way.between_seeds.get(measure) for way in named]
            if all(seeds):
                figure.add_scatter(
                    x=[mean_of(way.gap_closed).value for way in named],
                    y=[statistics.mean(values) for values in seeds if values],
                    mode="lines",
                    name=f"{name}: two seeds",
                    legendgroup=f"{name}: two seeds",
                    showlegend=column == 1,
                    line={"color": COLOURS[number % len(COLOURS)], "dash": "dot", "width": 1.5},
                    row=1,
                    col=column,
                )
    figure.update_xaxes(title=METRICS["gap_closed"].title, tickformat=".0%")
    figure.update_yaxes(title="cosine of the effects before and after", col=1)
    figure.update_yaxes(title="overlap of the most active tokens", col=2)
    finished(figure)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}, height=460)
    return {"latents_changed": figure}


def name_of(way: Way) -> str:
    """The settings of a way besides its rank and its rate."""
    shown = (
        text(value)
        for name, value in way.settings.items()
        if name not in ("rank", "train.lr") and value is not None
    )
    return ", ".join(shown) or "runs"
