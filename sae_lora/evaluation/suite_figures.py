"""Figures of what suites have found, for several runs side by side. Imports no torch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lora.common.plots import COLOURS, finished
from sae_lora.evaluation.headlines import SHOWN_FIRST, first_metric

MOST_RUNS = len(COLOURS)
"""Runs that a figure can tell apart."""
_BEFORE_AND_AFTER = {"spliced": "dot", "student": "solid"}
"""Cells that are drawn of each run, and how."""
_CELLS = ["base", "spliced", "student", "adapted"]
"""From left to right."""


def loss_change(results: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """How the loss of single tokens changes by what was trained: their shares, by nats.

    Args:
        results: Of the suite core, by the run's name; those without an SAE before are left out.
    """
    drawn = go.Figure()
    for number, (name, found) in enumerate(results.items()):
        change = found["loss_change"].get("student over spliced")
        if change is None:
            continue
        edges, tokens = found["change_edges"], change["tokens"]
        width = edges[1] - edges[0]
        drawn.add_scatter(
            x=[edges[0] - width / 2, *(edge + width / 2 for edge in edges)],
            y=[count / sum(tokens) for count in tokens],
            mode="lines",
            line={"color": COLOURS[number % MOST_RUNS], "width": 2, "shape": "hvh"},
            name=name,
        )
    drawn.add_vline(0, line={"color": "#999999", "dash": "dot", "width": 1})
    drawn.update_layout(
        xaxis={"title": "change of a token's loss by training (nats)"},
        yaxis={"title": "share of tokens", "type": "log", "exponentformat": "power"},
    )
    return finished(drawn)


def by_position(results: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """The CE gap over the position in the sequence, before training (dotted) and after.

    Args:
        results: Of the suite core, by the run's name.
    """
    drawn = go.Figure()
    for number, (name, found) in enumerate(results.items()):
        losses = found["ce_by_position"]
        for cell in _there(losses):
            pairs = zip(losses[cell], losses["base"], strict=True)
            at, gaps = _in_octaves([ce - base for ce, base in pairs])
            drawn.add_scatter(x=at, y=gaps, **_line(number, name, cell))
    drawn.update_layout(
        xaxis={"title": "position in the sequence", "type": "log", "dtick": math.log10(2)},
        yaxis={"title": "CE gap (nats per token)", "rangemode": "tozero"},
    )
    return finished(drawn)


def distances(results: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """How far the residual stream is from the plain model's after each block, before (dotted) and after.

    Args:
        results: Of the suite mechanism, by the run's name.
    """
    drawn = go.Figure()
    for number, (name, found) in enumerate(results.items()):
        for cell in _there(found["distance"]):
            moved = found["distance"][cell]["l2"]
            drawn.add_scatter(
                x=list(range(len(moved))),
                y=[one["value"] for one in moved],
                error_y=_bars(
                    [one["value"] - one["low"] for one in moved],
                    [one["high"] - one["value"] for one in moved],
                ),
                **_line(number, name, cell),
            )
    drawn.update_layout(
        xaxis={"title": "after block", "dtick": 1},
        yaxis={"title": "L2 distance to the plain model", "rangemode": "tozero"},
    )
    return finished(drawn)


class _Panel(NamedTuple):
    """What is measured of several runs' cells, on one axis.

    Args:
        title: Of the axis.
        runs: By run and cell a value, and how far it may be off, downwards and upwards.
    """

    title: str
    runs: dict[str, dict[str, tuple[float, float, float]]]


def tasks(results: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """What each model reaches in each task, with and without SAEs: its first metric.

    Args:
        results: Of the suite tasks, by the run's name.
    """
    panels: dict[str, _Panel] = {}
    for name, found in results.items():
        for task, scores in found["scores"].items():
            metric = first_metric(scores)
            values = {
                cell: (one["value"], 1.96 * (one["stderr"] or 0), 1.96 * (one["stderr"] or 0))
                for cell, metrics in scores["cells"].items()
                if (one := metrics.get(metric)) is not None
            }
            panels.setdefault(task, _Panel(f"{task}, {metric}", {})).runs[name] = values
    return _by_cell(list(panels.values()))


def steering(results: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """How well latents steer each model.

    Args:
        results: Of the suite steering, by the run's name.
    """
    panel = _Panel("difference (nats per token)", {})
    for name, found in results.items():
        effects = {cell: effect["difference"] for cell, effect in found["cells"].items()}
        panel.runs[name] = {
            cell: (one["value"], one["value"] - one["low"], one["high"] - one["value"])
            for cell, one in effects.items()
            if None not in one.values()
        }
    return _by_cell([panel])


def saebench(results: Mapping[str, Mapping[str, Any]]) -> go.Figure:
    """What SAEs are worth to SAEBench before and after: of each benchmark the metric it shows first.

    Args:
        results: Of the suite saebench, by the run's name; of several SAEs the first is drawn.
    """
    panels: dict[str, _Panel] = {}
    for name, found in results.items():
        for benchmark, cells in next(iter(found["scores"].values()), {}).items():
            metric = SHOWN_FIRST[benchmark]
            values = {
                cell: (metrics[metric], 0.0, 0.0) for cell, metrics in cells.items() if metric in metrics
            }
            title = f"{benchmark.replace('_', ' ')}, {metric.replace('_', ' ')}"
            panels.setdefault(benchmark, _Panel(title, {})).runs[name] = values
    return _by_cell(list(panels.values()))


def _by_cell(panels: Sequence[_Panel]) -> go.Figure:
    """Panels side by side and below each other, in each the cells from left to right, by run."""
    across = min(2, len(panels)) or 1
    down = math.ceil(len(panels) / across) or 1
    drawn = make_subplots(down, across, horizontal_spacing=0.16, vertical_spacing=0.24 / down)
    names = list(dict.fromkeys(name for panel in panels for name in panel.runs))
    for at, panel in enumerate(panels):
        row, column = at // across + 1, at % across + 1
        for name, cells in panel.runs.items():
            values, below, above = zip(*cells.values(), strict=True) if cells else ((), (), ())
            drawn.add_scatter(
                x=list(cells),
                y=list(values),
                error_y=_bars(below, above) if any(above) else None,
                mode="markers",
                marker={"color": COLOURS[names.index(name) % MOST_RUNS], "size": 8},
                name=name,
                offsetgroup=name,
                legendgroup=name,
                showlegend=at == 0,
                row=row,
                col=column,
            )
        drawn.update_xaxes(categoryorder="array", categoryarray=_CELLS, row=row, col=column)
        drawn.update_yaxes(title=panel.title, title_font={"size": 12}, row=row, col=column)
    finished(drawn)
    return drawn.update_layout(scattermode="group", scattergap=0.5, height=max(420, 300 * down))


def _bars(below: Sequence[float], above: Sequence[float]) -> dict[str, Any]:
    return {"array": list(above), "arrayminus": list(below), "thickness": 1}


def _there(by_cell: Mapping[str, Any]) -> list[str]:
    """Those of `_BEFORE_AND_AFTER` that a run has."""
    return [cell for cell in _BEFORE_AND_AFTER if cell in by_cell]


def _line(number: int, name: str, cell: str) -> dict[str, Any]:
    """What the line of a run's cell looks like; the legend names the run once.

    Args:
        number: Of the run in the figure.
        name: Of the run.
        cell: One of `_BEFORE_AND_AFTER`.
    """
    return {
        "mode": "lines+markers",
        "line": {"color": COLOURS[number % MOST_RUNS], "width": 2, "dash": _BEFORE_AND_AFTER[cell]},
        "marker": {"size": 5},
        "name": name,
        "legendgroup": name,
        "showlegend": cell == "student",
    }


def _in_octaves(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over positions 1, 2–3, 4–7 …, and the middles of these."""
    middles, means = [], []
    start = 1
    while start <= len(values):
        part = values[start - 1 : 2 * start - 1]
        middles.append(math.sqrt(start * (start + len(part) - 1)))
        means.append(statistics.mean(part))
        start *= 2
    return middles, means
