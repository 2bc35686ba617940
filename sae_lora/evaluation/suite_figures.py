"""Figures of suites' results, for several runs side by side. Imports no torch."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lora.common.plots import COLOURS, finished
from sae_lora.config.enums import Suite
from sae_lora.evaluation.headlines import SHOWN_FIRST, Results, first_metric

MOST_RUNS = len(COLOURS)
"""Largest number of runs in a figure: one per colour."""
_DASHES = {"spliced": "dot", "student": "solid"}
"""Cells that are drawn as lines, before and after training."""
_CELLS = ["base", "spliced", "student", "adapted"]
"""Order of the cells from left to right."""

_LATENTS = {
    "share of latents": {"turned": "effect turned > 30°", "contexts_changed": "contexts changed"},
    "similarity before and after": {
        "cosine": "effect",
        "correlation": "activations",
        "overlap": "contexts",
        "promoted": "promoted tokens",
    },
}
"""The panels about latents: the name of each measure."""

_Runs = Mapping[str, Results]
"""Results of a suite by name of the run, of at most `MOST_RUNS` runs."""
_Values = dict[str, dict[str, tuple[float, float, float]]]
"""A value and the lengths of its error bar downwards and upwards, by run and cell."""


def loss_change(runs: _Runs) -> go.Figure:
    """Suite `core`: share of tokens over the change of their loss by training."""
    figure = go.Figure()
    for colour, (name, results) in zip(COLOURS, runs.items(), strict=False):
        change = results["loss_change"].get("student over spliced")
        if change is None:
            continue
        edges, tokens = results["change_edges"], change["tokens"]
        width = edges[1] - edges[0]
        figure.add_scatter(
            x=[edges[0] - width / 2, *(edge + width / 2 for edge in edges)],
            y=[count / sum(tokens) for count in tokens],
            mode="lines",
            line={"color": colour, "width": 2, "shape": "hvh"},
            name=name,
        )
    figure.add_vline(0, line={"color": "#999999", "dash": "dot", "width": 1})
    figure.update_layout(
        xaxis={"title": "change of a token's loss by training (nats)"},
        yaxis={"title": "share of tokens", "type": "log", "exponentformat": "power"},
    )
    return finished(figure)


def by_position(runs: _Runs) -> go.Figure:
    """Suite `core`: CE gap over the position in the sequence."""
    figure = go.Figure()
    for colour, (name, results) in zip(COLOURS, runs.items(), strict=False):
        losses = results["ce_by_position"]
        for cell in _drawn_cells(losses):
            pairs = zip(losses[cell], losses["base"], strict=True)
            positions, gaps = _in_octaves([ce - base for ce, base in pairs])
            figure.add_scatter(x=positions, y=gaps, **_line(colour, name, cell))
    figure.update_layout(
        xaxis={"title": "position in the sequence", "type": "log", "dtick": math.log10(2)},
        yaxis={"title": "CE gap (nats per token)", "rangemode": "tozero"},
    )
    return finished(figure)


def distances(runs: _Runs) -> go.Figure:
    """Suite `mechanism`: distance of the residual stream to the plain model's, after each block."""
    figure = go.Figure()
    for colour, (name, results) in zip(COLOURS, runs.items(), strict=False):
        for cell in _drawn_cells(results["distance"]):
            values, below, above = zip(*map(_bounded, results["distance"][cell]["l2"]), strict=True)
            figure.add_scatter(
                x=list(range(len(values))),
                y=values,
                error_y=_bars(below, above),
                **_line(colour, name, cell),
            )
    figure.update_layout(
        xaxis={"title": "after block", "dtick": 1},
        yaxis={"title": "L2 distance to the plain model", "rangemode": "tozero"},
    )
    return finished(figure)


def tasks(runs: _Runs) -> go.Figure:
    """Suite `tasks`: the first metric of each task, with bars of 1.96 standard errors."""
    panels: dict[str, _Values] = defaultdict(dict)
    for name, results in runs.items():
        for task, scores in results["scores"].items():
            metric = first_metric(scores)
            panels[f"{task}, {metric}"][name] = {
                cell: (score["value"], error := 1.96 * (score["stderr"] or 0), error)
                for cell, metrics in scores["cells"].items()
                if (score := metrics.get(metric)) is not None
            }
    return _by_cell(panels)


def steering(runs: _Runs) -> go.Figure:
    """Suite `steering`: effect of steering on each model, with 95% intervals."""
    values: _Values = {
        name: {
            cell: _bounded(effect["difference"])
            for cell, effect in results["cells"].items()
            if None not in effect["difference"].values()
        }
        for name, results in runs.items()
    }
    return _by_cell({"difference (nats per token)": values})


def saebench(runs: _Runs) -> go.Figure:
    """Suite `saebench`: the metric that SAEBench shows first, by benchmark, of a run's first SAE."""
    panels: dict[str, _Values] = defaultdict(dict)
    for name, results in runs.items():
        for benchmark, cells in next(iter(results["scores"].values()), {}).items():
            metric = SHOWN_FIRST[benchmark]
            panels[f"{benchmark}, {metric}".replace("_", " ")][name] = {
                cell: (metrics[metric], 0.0, 0.0) for cell, metrics in cells.items() if metric in metrics
            }
    return _by_cell(panels)


def circuits(runs: _Runs) -> go.Figure:
    """Suite `circuits`: scores of attribution graphs, with 95% intervals."""
    panels: dict[str, _Values] = defaultdict(dict)
    for name, results in runs.items():
        for cell, means in results["means"].items():
            for score, mean_of in means.items():
                if None not in mean_of.values():
                    panels[score.replace("_", " ")].setdefault(name, {})[cell] = _bounded(mean_of)
    return _by_cell(panels)


def latents(runs: _Runs) -> go.Figure:
    """Suite `latents`: shares of latents that changed, and similarities, of a run's first SAE."""
    panels: dict[str, _Values] = defaultdict(dict)
    for name, results in runs.items():
        change = next(iter(results["saes"].values()))
        for title, measures in _LATENTS.items():
            panels[title][name] = {
                label: _bounded(change[measure])
                for measure, label in measures.items()
                if None not in change[measure].values()
            }
    return _by_cell(panels)


def _by_cell(panels: Mapping[str, _Values]) -> go.Figure:
    """A figure with a panel per title, two in a row. A panel shows the cells from left to right."""
    across = min(2, len(panels)) or 1
    down = math.ceil(len(panels) / across) or 1
    figure = make_subplots(down, across, horizontal_spacing=0.16, vertical_spacing=0.24 / down)
    names = list(dict.fromkeys(name for runs in panels.values() for name in runs))
    for number, (title, runs) in enumerate(panels.items()):
        row, column = number // across + 1, number % across + 1
        for name, cells in runs.items():
            values, below, above = zip(*cells.values(), strict=True) if cells else ((), (), ())
            figure.add_scatter(
                x=list(cells),
                y=list(values),
                error_y=_bars(below, above) if any(above) else None,
                mode="markers",
                marker={"color": COLOURS[names.index(name)], "size": 8},
                name=name,
                offsetgroup=name,
                legendgroup=name,
                showlegend=number == 0,
                row=row,
                col=column,
            )
        figure.update_xaxes(categoryorder="array", categoryarray=_CELLS, row=row, col=column)
        figure.update_yaxes(title=title, title_font={"size": 12}, row=row, col=column)
    finished(figure)
    return figure.update_layout(scattermode="group", scattergap=0.5, height=max(420, 300 * down))


def _bounded(interval: Mapping[str, float]) -> tuple[float, float, float]:
    value = interval["value"]
    return value, value - interval["low"], interval["high"] - value


def _bars(below: Sequence[float], above: Sequence[float]) -> dict[str, Any]:
    return {"array": list(above), "arrayminus": list(below), "thickness": 1}


def _drawn_cells(cells: Mapping[str, Any]) -> list[str]:
    return [cell for cell in _DASHES if cell in cells]


def _line(colour: str, name: str, cell: str) -> dict[str, Any]:
    """Style of a run's line in a cell; the run has one entry in the legend."""
    return {
        "mode": "lines+markers",
        "line": {"color": colour, "width": 2, "dash": _DASHES[cell]},
        "marker": {"size": 5},
        "name": name,
        "legendgroup": name,
        "showlegend": cell == "student",
    }


def _in_octaves(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The geometric middle of positions 1, 2–3, 4–7 …, and the mean of the values there."""
    middles, means = [], []
    start = 1
    while start <= len(values):
        part = values[start - 1 : 2 * start - 1]
        middles.append(math.sqrt(start * (start + len(part) - 1)))
        means.append(mean(part))
        start *= 2
    return middles, means


class SuiteFigure(NamedTuple):
    """A figure in the report."""

    suite: Suite
    """The suite whose results it shows."""
    draw: Callable[[_Runs], go.Figure]
    heading: str
    note: str
    """A sentence below the figure."""

    @property
    def name(self) -> str:
        """Name of the figure's files."""
        return self.draw.__name__


FIGURES = (
    SuiteFigure(
        Suite.core,
        loss_change,
        "Change of the loss of single tokens",
        "Held-out tokens. Left of zero: tokens that become likelier.",
    ),
    SuiteFigure(Suite.core, by_position, "CE gap by position", "Dotted: before training."),
    SuiteFigure(
        Suite.mechanism,
        distances,
        "Distance of the residual stream to the plain model's",
        "Dotted: before training. Bars: 90% intervals.",
    ),
    SuiteFigure(Suite.tasks, tasks, "Task scores", "Bars: 1.96 standard errors."),
    SuiteFigure(Suite.steering, steering, "Effect of steering", "Bars: 95% intervals."),
    SuiteFigure(Suite.saebench, saebench, "SAEBench", "The first SAE of each run."),
    SuiteFigure(
        Suite.latents,
        latents,
        "Latents before and after training",
        "The first SAE of each run. Bars: 95% intervals.",
    ),
    SuiteFigure(Suite.circuits, circuits, "Attribution graphs", "Bars: 95% intervals over prompts."),
)
"""The figures of suites, in the order of the report."""
