"""Ways to adapt a model with many transcoders at once: gaps, shares of blocks, errors by depth."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Table

from sae_lora.common.plots import COLOURS, finished, line_and_markers
from sae_lora.comparisons.saes import evaluated_one_by_one
from sae_lora.config.enums import Suite
from sae_lora.evaluation.suite_records import read
from sae_lora.records.factors import SEEDS, FinishedRun, label, text, varying
from sae_lora.records.folder import RunFolder
from sae_lora.records.metrics import METRICS
from sae_lora.report.repeats import Repeats, mean_of, repeats
from sae_lora.report.tables import in_whole_words, right_aligned

_CELLS = {"before": "spliced", "after": "student"}
"""The cells of the suite `mechanism` before and after training."""
_RANK = "rank"


@dataclass(frozen=True)
class Block:
    """One of several SAEs or transcoders: means over seeds."""

    block: int
    alone: float
    """CE with it alone in the plain model, minus CE of the plain model, in nats per token."""
    before: float | None
    """CE before training, minus CE without it. `None` in runs of older versions."""
    after: float
    """CE after training, minus CE of the student without it."""


@dataclass(frozen=True)
class Way:
    """Results of runs that differ only in their seeds; lists have a value per seed."""

    settings: dict[str, Any]
    """The factors in which the ways differ."""
    trained_weights: int
    initial_gap: list[float]
    """CE gap before training, in nats per token."""
    gap_closed: list[float | None]
    initial_kl: list[float]
    """KL before training, in nats per token."""
    kl_closed: list[float | None]
    """1 − KL after training / KL before it; `None` if it was zero."""
    initial_top1: list[float]
    """Share of positions with the plain model's most likely token, before training."""
    top1_gain: list[float]
    """This share after training minus that before it."""
    blocks: list[Block]
    distance: dict[str, list[float]] = field(default_factory=dict)
    """By `before` and `after` and block: L2 distance of the residual stream after the block to the plain
    model's, relative to its norm. Means over seeds; empty without the suite `mechanism`."""


def compare(folders: Sequence[RunFolder]) -> list[Way]:
    """The results of each way, in the order of its factors.

    Raises:
        UserError: If no finished run has several SAEs that were also evaluated one by one.
    """
    groups = repeats(evaluated_one_by_one(folders))
    names = [name for name in varying([group.factors for group in groups]) if name not in SEEDS]
    return [_way(group, names) for group in groups]


def _way(group: Repeats, names: Sequence[str]) -> Way:
    summaries = [run.summary for run in group.runs]
    first = [run.folder.read_curve()[0] for run in group.runs]
    return Way(
        settings={name: group.factors.get(name) for name in names},
        trained_weights=summaries[0]["trainable_parameters"],
        initial_gap=[summary["initial_gap"] for summary in summaries],
        gap_closed=[summary["gap_closed"] for summary in summaries],
        initial_kl=[summary["initial_kl"] for summary in summaries],
        kl_closed=[
            1 - summary["kl"] / summary["initial_kl"] if summary["initial_kl"] else None
            for summary in summaries
        ],
        initial_top1=[point.top1_agreement for point in first],
        top1_gain=[
            summary["top1_agreement"] - point.top1_agreement
            for summary, point in zip(summaries, first, strict=True)
        ],
        blocks=[_block(summaries, number) for number in range(len(summaries[0]["sae"]))],
        distance=_distance(group.runs),
    )


def _block(summaries: Sequence[Mapping[str, Any]], number: int) -> Block:
    pairs = [(summary, summary["sae"][number]) for summary in summaries]
    before = [
        summary["spliced_ce"] - sae["spliced_left_out_ce"] if "spliced_left_out_ce" in sae else None
        for summary, sae in pairs
    ]
    return Block(
        block=pairs[0][1]["block"],
        alone=statistics.mean(sae["alone_ce"] - summary["base_ce"] for summary, sae in pairs),
        before=mean_of(before).value,
        after=statistics.mean(summary["student_ce"] - sae["left_out_ce"] for summary, sae in pairs),
    )


def _distance(runs: Sequence[FinishedRun]) -> dict[str, list[float]]:
    records = [read(run.folder, Suite.mechanism) for run in runs]
    results = [record.results for record in records if record is not None]
    if len(results) < len(runs):
        return {}
    means = {}
    for name, cell in _CELLS.items():
        if all(cell in result["distance"] for result in results):
            relative = (_relative(result["distance"][cell]["l2"], result["norm"]) for result in results)
            means[name] = [statistics.mean(values) for values in zip(*relative, strict=True)]
    return means


def _relative(
    distances: Sequence[Mapping[str, float]], norms: Sequence[Mapping[str, float]]
) -> list[float]:
    return [l2["value"] / norm["value"] for l2, norm in zip(distances, norms, strict=True)]


def table(ways: Sequence[Way]) -> Table:
    """A row for each way: means over seeds, with 95% intervals."""
    names = list(ways[0].settings)
    measures = ("trainable_parameters", "initial_gap", "gap_closed", "initial_kl")
    headings = [METRICS[name].column for name in measures]
    others = "KL closed", "top-1 before", "top-1 gain", "seeds"
    rows = right_aligned("The model with all SAEs at once", [*map(label, names), *headings, *others])
    for way in ways:
        rows.add_row(
            *(text(way.settings[name]) for name in names),
            METRICS["trainable_parameters"].written(way.trained_weights),
            _written("initial_gap", way.initial_gap),
            _written("gap_closed", way.gap_closed),
            _written("initial_kl", way.initial_kl),
            _written("gap_closed", way.kl_closed),
            _written("top1_agreement", way.initial_top1),
            _written("top1_agreement", way.top1_gain),
            str(len(way.kl_closed)),
        )
    return in_whole_words(rows)


def _written(name: str, values: Sequence[float | None]) -> str:
    return mean_of(values).written(METRICS[name].written)


def figures(folders: Sequence[RunFolder]) -> dict[str, go.Figure]:
    """Gap and KL closed over the rank; the share of each block; the distance after each block."""
    ways = compare(folders)
    best = {}
    for way in sorted(ways, key=lambda way: (len(way.kl_closed), mean_of(way.kl_closed).value or 0)):
        best[name_of(way)] = way  # of the ranks with most seeds, the one that closes most of the KL
    kinds = [best[name] for name in dict.fromkeys(map(name_of, ways))]
    made = {"replacement_rank": _over_rank(ways), "replacement_blocks": _over_blocks(kinds)}
    if all(way.distance for way in kinds):
        made["replacement_depth"] = _over_depth(kinds)
    return made


def name_of(way: Way) -> str:
    """The settings of a way besides its rank."""
    return ", ".join(
        text(value) for name, value in way.settings.items() if name != _RANK and value is not None
    )


def _with_rank(way: Way) -> str:
    rank = way.settings.get(_RANK)
    return name_of(way) + ("" if rank is None else f", rank {rank}")


def _over_rank(ways: Sequence[Way]) -> go.Figure:
    """Gap and KL closed; ways without a rank are horizontal lines."""
    figure = make_subplots(1, 2, horizontal_spacing=0.15)
    ranks = sorted({rank for way in ways if (rank := way.settings.get(_RANK)) is not None})
    for number, name in enumerate(dict.fromkeys(map(name_of, ways))):
        named = [way for way in ways if name_of(way) == name]
        named.sort(key=lambda way: way.settings.get(_RANK) or 0)
        x = [way.settings.get(_RANK) for way in named]
        for column, values in (
            (1, [way.gap_closed for way in named]),
            (2, [way.kl_closed for way in named]),
        ):
            means = [mean_of(each) for each in values]
            y = [mean.value for mean in means]
            has_rank = None not in x
            figure.add_scatter(
                x=x if has_rank else ranks,
                y=y if has_rank else y * len(ranks),
                error_y={"array": [mean.margin or 0 for mean in means], "thickness": 1, "width": 3}
                if has_rank
                else None,
                mode="lines+markers" if has_rank else "lines",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                **line_and_markers(COLOURS[number % len(COLOURS)], number),
                row=1,
                col=column,
            )
    figure.update_xaxes(title="rank", type="log", tickvals=ranks)
    figure.update_yaxes(title=METRICS["gap_closed"].title, tickformat=".0%", rangemode="tozero", col=1)
    figure.update_yaxes(title="KL closed", tickformat=".0%", rangemode="tozero", col=2)
    return _with_legend_above(figure)


def _over_blocks(ways: Sequence[Way]) -> go.Figure:
    """CE that each block adds: alone, among all before training, and among all after it."""
    figure = go.Figure()
    first = ways[0].blocks
    x = [block.block for block in first]
    drawn = [("alone in the plain model", "#bbbbbb", [block.alone for block in first])]
    before = [block.before for block in first if block.before is not None]
    if len(before) == len(first):
        drawn.append(("with all others, before training", "#666666", before))
    for colour, way in zip(COLOURS, ways, strict=False):
        drawn.append((_with_rank(way), colour, [block.after for block in way.blocks]))
    for name, colour, values in drawn:
        figure.add_bar(x=x, y=values, name=name, marker={"color": colour})
    figure.update_xaxes(title="block", dtick=1)
    figure.update_yaxes(title="CE that it adds (nats per token)")
    return _with_legend_above(figure)


def _over_depth(ways: Sequence[Way]) -> go.Figure:
    """Distance to the plain model after each block, before training and after it."""
    figure = go.Figure()
    before = ways[0].distance["before"]
    x = list(range(len(before)))
    grey = {"line": {"color": "#666666", "dash": "dot", "width": 2}}
    figure.add_scatter(x=x, y=before, mode="lines", name="before training", **grey)
    for number, way in enumerate(ways):
        style = line_and_markers(COLOURS[number % len(COLOURS)], number)
        figure.add_scatter(
            x=x, y=way.distance["after"], mode="lines+markers", name=_with_rank(way), **style
        )
    figure.update_xaxes(title="after block", dtick=1)
    title = "L2 distance to the plain model<br>relative to its norm"
    figure.update_yaxes(title=title, tickformat=".0%", rangemode="tozero")
    return _with_legend_above(figure)


def _with_legend_above(figure: go.Figure) -> go.Figure:
    finished(figure)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}, height=460)
    return figure
