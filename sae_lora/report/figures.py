"""Figures of a sweep, made from its tables, with plotly. Imports no torch."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from sae_lora.common.console import count
from sae_lora.common.plots import COLOURS, LIGHT, finished, line_and_markers, ticks
from sae_lora.records.factors import FACTORS, label, text, title
from sae_lora.records.metrics import METRICS
from sae_lora.report.fits import Fit, Frame, group_of
from sae_lora.report.frames import factors, in_order
from sae_lora.report.repeats import mean_of

_MOST_IN_LEGEND = 10
"""Largest number of entries of a legend, and of named ticks of an axis."""
_PROMINENT = ("rank", "l0", "width", "block", "blocks")
"""Factors that come first in figures and legends."""
_CLOSED_AXIS = {"title": METRICS["gap_closed"].title, "tickformat": ".2~%"}


def _is_logarithmic(factor: str) -> bool:
    """True if values of a factor are compared by their ratios."""
    return factor.endswith("lr") or (factor in FACTORS and FACTORS[factor].is_logarithmic)


def by_prominence(factors: Sequence[str]) -> list[str]:
    """The factors, the most prominent ones first."""
    first = [name for name in _PROMINENT if name in factors]
    return first + [name for name in factors if name not in first]


class _GroupStyle:
    """Style of groups of runs: their first factor sets the colour, the second the dash and the symbol.

    The legend has an entry for each combination if there are few, or else for each value of the two
    factors.
    """

    def __init__(self, frame: Frame, by: Sequence[str]) -> None:
        self._by = list(by)
        self._values = [list(dict.fromkeys(map(text, frame[name]))) for name in by]
        count = len(self._values[0]) if by else 1
        self._colours: Sequence[Any] = COLOURS
        if count > len(COLOURS):
            shares = [number / (count - 1) for number in range(count)]
            self._colours = sample_colorscale("Cividis", shares)
        self._names_combinations = len(set(group_of(frame, by))) <= _MOST_IN_LEGEND
        self._named: set[str] = set()

    def of(self, group: tuple[str, ...]) -> dict[str, Any]:
        """The line, the markers and the legend entry of a group's trace."""
        places = [values.index(value) for values, value in zip(self._values, group, strict=True)]
        first, second = [*places, 0, 0][:2]
        name = "runs"
        if group:
            name = ", ".join(group) if self._names_combinations else group[0]
        is_new = name not in self._named and len(self._named) < _MOST_IN_LEGEND
        self._named.add(name)
        entry = {"name": name, "legendgroup": name, "showlegend": is_new and bool(group)}
        return entry | line_and_markers(self._colours[first % len(self._colours)], second)

    def explain(self, figure: go.Figure) -> None:
        """Add the title of the legend, and entries for the second factor if it has none yet."""
        named = self._by if self._names_combinations else self._by[:1]
        title = ", ".join(map(label, named))
        figure.update_layout(legend={"title": {"text": title}, "tracegroupgap": 0})
        if self._names_combinations or len(self._by) < 2:
            return
        for number, value in enumerate(self._values[1][:_MOST_IN_LEGEND]):
            figure.add_scatter(
                x=[None],
                y=[None],
                mode="lines+markers",
                name=f"{label(self._by[1])} {value}",
                **line_and_markers("#666666", number),
            )


def gap_curves(
    frame: Frame,
    curves: Frame,
    over: str = "tokens",
    by: Sequence[str] | None = None,
) -> go.Figure:
    """The CE gap of each run over its training.

    Args:
        frame: Runs, as `runs_frame` gives them.
        curves: The points of their curves, as `curves_frame` gives them.
        over: `tokens`, `train_seconds` or `train_flops`.
        by: Factors that the legend names; by default the factors in which the runs differ.
    """
    by = by_prominence(factors(frame)) if by is None else by
    styles = _GroupStyle(frame, by)
    points = dict(iter(curves.groupby(["sweep", "run"], sort=False)))
    traces = []  # added all at once: adding a trace takes longer the more traces there are
    for (_, run), group in zip(frame.iterrows(), group_of(frame, by), strict=True):
        curve = points.get((run["sweep"], run["run"]))
        if curve is None:
            continue
        style = styles.of(group)
        unfinished = "" if run["state"] == "done" else f" ({run['state']})"
        hover = f"{run['run']}{unfinished}<br>%{{x:,.6~g}}: gap %{{y:.4f}}<extra></extra>"
        traces.append(
            go.Scatter(
                x=_numbers(curve[over]),
                y=_numbers(curve["ce_gap"]),
                mode="lines+markers" if len(curve) <= 30 else "lines",
                hovertemplate=hover,
                meta=run["run"],
                **style | {"marker": style["marker"] | {"size": 5}},
            )
        )
    figure = go.Figure(traces)
    figure.update_layout(
        xaxis={"title": METRICS[over].title, "rangemode": "tozero"},
        yaxis={"title": METRICS["ce_gap"].title, "rangemode": "tozero"},
    )
    styles.explain(figure)
    return finished(figure)


def gap_closed_against(
    frame: Frame, factor: str, others: Sequence[str], fitted: Fit | None = None
) -> go.Figure:
    """The gap closed over a factor: a line for each combination of the other factors.

    Points are means over seeds. With several seeds, error bars are the confidence interval of the mean.

    Args:
        frame: Finished runs with a gap closed, as `runs_frame` gives them.
        factor: Column of the factor.
        others: The other factors in which the runs differ, without the seed.
        fitted: Fit whose lines are drawn, thin and grey.
    """
    styles = _GroupStyle(frame, others)
    figure = go.Figure()
    groups = group_of(frame, others)
    numeric = [value for value in frame[factor] if isinstance(value, int | float)]
    has_order = len(numeric) == len(frame)
    for group in dict.fromkeys(groups):
        means = _over_seeds(frame[groups == group], factor)
        has_seeds = any(margin is not None for margin in means["margin"])
        figure.add_scatter(
            x=means["value"],
            y=means["mean"],
            error_y={"array": means["margin"], "thickness": 1.5} if has_seeds else None,
            mode="lines+markers" if has_order else "markers",
            customdata=means["first"],
            text=means["runs"],
            hovertemplate=f"{title(factor)} %{{x}}: %{{y:.1%}}<br>%{{text}}<extra></extra>",
            **styles.of(group),
        )
        if fitted is not None and group in fitted.intercepts:
            figure.add_scatter(
                x=list(fitted.values),
                y=[fitted.at(group, value) for value in fitted.values],
                mode="lines",
                line={"color": "#888888", "width": 1},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=", ".join(group),
            )
    axis: dict[str, Any] = {"title": title(factor)}
    if not has_order:
        axis["type"] = "category"
    elif _is_logarithmic(factor) and min(numeric) > 0:
        axis["type"] = "log"
    distinct = sorted(set(numeric))
    if has_order and len(distinct) <= _MOST_IN_LEGEND:
        axis |= ticks(distinct, _MOST_IN_LEGEND)
    figure.update_layout(xaxis=axis, yaxis=_CLOSED_AXIS)
    styles.explain(figure)
    return finished(figure)


def heat_map(frame: Frame, by: Sequence[str], *, stacked: bool = False) -> go.Figure:
    """The gap closed over two factors. With a third factor, there is a map for each of its values.

    Args:
        frame: Finished runs with a gap closed, as `runs_frame` gives them.
        by: The two or three factors. A cell is the mean over all runs with its values.
        stacked: True for several maps one below the other, for a narrow screen.
    """
    across, down, *third = by
    parts = list(frame.groupby(third[0])) if third else [("", frame)]
    titles = [f"{title(third[0])}: {text(value)}" for value, _ in parts] if third else None
    figure = _parts(len(parts), stacked=stacked, subplot_titles=titles)
    columns, rows = (list(frame[name].sort_values(key=in_order).unique()) for name in (across, down))
    for number, (_, part) in enumerate(parts, 1):
        means = part.pivot_table("gap_closed", down, across, "mean").reindex(index=rows, columns=columns)
        figure.add_heatmap(
            x=list(map(text, columns)),
            y=list(map(text, rows)),
            z=[_numbers(row) for _, row in means.iterrows()],
            coloraxis="coloraxis",
            texttemplate="%{z:.0%}",
            textfont={"color": "#000"},
            hovertemplate=f"{title(across)} %{{x}}, {title(down)} %{{y}}: %{{z:.1%}}<extra></extra>",
            **_place(number, stacked=stacked),
        )
    figure.update_xaxes(type="category", title=title(across))
    figure.update_yaxes(type="category")
    if stacked:
        figure.update_yaxes(title=title(down))
    figure.update_layout(
        yaxis={"title": title(down)},
        coloraxis={"colorscale": LIGHT, "colorbar": _CLOSED_AXIS},
    )
    return finished(figure)


def efficiency(frame: Frame, by: Sequence[str], *, stacked: bool = False) -> go.Figure:
    """The gap closed over its cost: trained parameters, FLOPs, seconds.

    Args:
        frame: Finished runs with a gap closed, as `runs_frame` gives them.
        by: The factors in which the runs differ, without the seed. Only the first two are shown.
        stacked: True for the costs one below the other, for a narrow screen.
    """
    by = by[:2]
    styles = _GroupStyle(frame, by)
    costs = ("trainable_parameters", "train_flops", "train_seconds")
    figure = _parts(len(costs), stacked=stacked)
    groups = group_of(frame, by)
    traces = []
    for group in dict.fromkeys(groups):
        part, style = frame[groups == group], styles.of(group)
        for number, cost in enumerate(costs):
            traces.append(
                go.Scatter(
                    x=_numbers(part[cost]),
                    y=_numbers(part["gap_closed"]),
                    mode="markers",
                    customdata=list(part["run"]),
                    hovertemplate="%{customdata}<br>%{x:.3~g}: %{y:.1%}<extra></extra>",
                    **style | {"showlegend": style["showlegend"] and number == 0},
                )
            )
    places = [_place(1 + number % len(costs), stacked=stacked) for number in range(len(traces))]
    figure.add_traces(traces, [place["row"] for place in places], [place["col"] for place in places])
    for number, cost in enumerate(costs, 1):
        # Ranks from 1 to 256 do not fit on a linear axis of parameters.
        is_wide = cost == "trainable_parameters"
        kind: dict[str, Any] = {"type": "log", "nticks": 4} if is_wide else {"rangemode": "tozero"}
        place = _place(number, stacked=stacked)
        figure.update_xaxes(title=METRICS[cost].title, exponentformat="power", **place, **kind)
    figure.update_yaxes(tickformat=_CLOSED_AXIS["tickformat"])
    figure.update_layout(yaxis=_CLOSED_AXIS)
    styles.explain(figure)
    return finished(figure)


def _parts(number: int, *, stacked: bool, **options: Any) -> go.Figure:
    """An empty figure with this number of parts, beside each other or one below the other."""
    if stacked:
        return make_subplots(number, 1, vertical_spacing=0.3 / max(1, number), **options)
    return make_subplots(1, number, shared_yaxes=True, horizontal_spacing=0.03, **options)


def _place(number: int, *, stacked: bool) -> dict[str, int]:
    """The place of a part of `_parts`; the first is 1."""
    return {"row": number, "col": 1} if stacked else {"row": 1, "col": number}


def _over_seeds(runs: Frame, factor: str) -> dict[str, list[Any]]:
    """The mean of the gap closed and half its confidence interval, for each value of a factor."""
    means: dict[str, list[Any]] = {"value": [], "mean": [], "margin": [], "runs": [], "first": []}
    for value, part in runs.groupby(factor):
        closed = mean_of(list(part["gap_closed"].astype(float)))
        row = value, closed.value, closed.margin, count(len(part), "run"), part["run"].iloc[0]
        for column, cell in zip(means.values(), row, strict=True):
            column.append(cell)
    return means


def _numbers(column: Any) -> list[float | None]:
    """The values of a column as floats; `None` for missing values."""
    return [None if value is None or value != value else float(value) for value in column]
