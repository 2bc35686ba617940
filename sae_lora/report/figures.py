"""Figures of a sweep, made from its tables, with plotly. Imports no torch."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from sae_lora.common.plots import COLOURS, DASHES, SYMBOLS, finished, ticks
from sae_lora.records.factors import FACTORS, SEED, label, text, title
from sae_lora.records.metrics import METRICS
from sae_lora.report.fits import CONFIDENCE, Fit, Frame, group_of
from sae_lora.report.frames import factors

_MOST_IN_LEGEND = 10
"""Combinations of factors that a legend names one by one."""
_PROMINENT = ("rank", "l0", "width", "block", "blocks")
_CLOSED_AXIS = {"title": METRICS["gap_closed"].title, "tickformat": ".2~%"}


def by_prominence(factors: Sequence[str]) -> list[str]:
    """Those first that figures show best: what a reader of a sweep asks for first."""
    first = [name for name in _PROMINENT if name in factors]
    return first + [name for name in factors if name not in first]


class _Look:
    """How the runs of a group are drawn: their first factor as colour, the second as dash and symbol.

    The legend names each combination where they are few, else the values of each of the two.
    """

    def __init__(self, frame: Frame, by: Sequence[str]) -> None:
        self._by = list(by)
        self._values = [list(dict.fromkeys(map(text, frame[name]))) for name in by]
        first = len(self._values[0]) if by else 1
        self._colours: Sequence[Any] = (
            COLOURS
            if first <= len(COLOURS)
            else sample_colorscale("Cividis", [at / (first - 1) for at in range(first)])
        )
        self._each = len(set(group_of(frame, by))) <= _MOST_IN_LEGEND
        self._named: set[str] = set()

    def of(self, group: tuple[str, ...]) -> dict[str, Any]:
        """What a trace of this group looks like, and how the legend names it."""
        places = [values.index(value) for values, value in zip(self._values, group, strict=True)]
        first, second = [*places, 0, 0][:2]
        name = (", ".join(group) if self._each else group[0]) if group else "runs"
        shown = name not in self._named and len(self._named) < _MOST_IN_LEGEND
        self._named.add(name)
        colour = self._colours[first % len(self._colours)]
        return {"name": name, "legendgroup": name, "showlegend": shown and bool(group)} | _drawn(
            colour, second
        )

    def explain(self, figure: go.Figure) -> None:
        """Adds the legend's title, and what it says beyond the traces that are there."""
        title = ", ".join(map(label, self._by if self._each else self._by[:1]))
        figure.update_layout(legend={"title": {"text": title}, "tracegroupgap": 0})
        if self._each or len(self._by) < 2:
            return
        for number, value in enumerate(self._values[1][:_MOST_IN_LEGEND]):
            figure.add_scatter(
                x=[None],
                y=[None],
                mode="lines+markers",
                name=f"{label(self._by[1])} {value}",
                **_drawn("#666666", number),
            )


def _drawn(colour: str, number: int) -> dict[str, Any]:
    """A line and its markers, in a colour, of which dash and symbol are those of a number."""
    return {
        "line": {"color": colour, "dash": DASHES[number % len(DASHES)], "width": 2},
        "marker": {"color": colour, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7},
    }


def gap_curves(
    frame: Frame,
    curves: Frame,
    over: str = "tokens",
    by: Sequence[str] | None = None,
) -> go.Figure:
    """The CE gap of each run over what it was trained with.

    Args:
        frame: Runs, as `Sweep.frame` gives them.
        curves: Their points, as `Sweep.curves` gives them.
        over: `tokens`, `train_seconds` or `train_flops`.
        by: The factors that tell them apart; by default those in which they differ.
    """
    by = by_prominence(factors(frame)) if by is None else by
    look = _Look(frame, by)
    points = dict(iter(curves.groupby(["sweep", "run"], sort=False)))
    traces = []  # added at once: one by one, each takes as long as there are others
    for (_, run), group in zip(frame.iterrows(), group_of(frame, by), strict=True):
        curve = points.get((run["sweep"], run["run"]))
        if curve is None:
            continue
        style = look.of(group)
        unfinished = "" if run["state"] == "done" else f" ({run['state']})"
        hover = f"{run['run']}{unfinished}<br>%{{x:,.6~g}}: gap %{{y:.4f}}<extra></extra>"
        traces.append(
            go.Scatter(
                x=_numbers(curve[over]),
                y=_numbers(curve["ce_gap"]),
                mode="lines+markers" if len(curve) <= 30 else "lines",
                hovertemplate=hover,
                **style | {"marker": style["marker"] | {"size": 5}},
            )
        )
    figure = go.Figure(traces)
    figure.update_layout(
        xaxis={"title": METRICS[over].title, "rangemode": "tozero"},
        yaxis={"title": METRICS["ce_gap"].title, "rangemode": "tozero"},
    )
    look.explain(figure)
    return finished(figure)


def gap_closed_against(
    frame: Frame, factor: str, others: Sequence[str], fitted: Fit | None = None
) -> go.Figure:
    """The gap closed over a factor: a line for each combination of the others, seeds as their mean.

    Error bars are the confidence interval of that mean, where there are several seeds.

    Args:
        frame: Finished runs, as `Sweep.frame` gives them.
        factor: Its column.
        others: What else they differ in, the seed left out.
        fitted: Lines to draw, thin and grey.
    """
    frame = frame[frame["gap_closed"].notna()]
    look = _Look(frame, others)
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
            customdata=means["runs"],
            hovertemplate=f"{title(factor)} %{{x}}: %{{y:.1%}}<br>%{{customdata}} runs<extra></extra>",
            **look.of(group),
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
    if not has_order:
        axis: dict[str, Any] = {"type": "category"}
    elif factor in FACTORS and FACTORS[factor].is_logarithmic and min(numeric, default=0) > 0:
        axis = {"type": "log"} | _ticks(numeric)
    else:
        axis = _ticks(numeric)
    figure.update_layout(
        xaxis={"title": title(factor)} | axis,
        yaxis=_CLOSED_AXIS,
    )
    look.explain(figure)
    return finished(figure)


def heat_map(frame: Frame, by: Sequence[str]) -> go.Figure:
    """The gap closed over two factors; over three, a map for each value of the third.

    Args:
        frame: Finished runs, as `Sweep.frame` gives them.
        by: The two or three factors; what else differs is averaged.
    """
    frame = frame[frame["gap_closed"].notna()]
    across, down, *third = by
    parts = list(frame.groupby(third[0])) if third else [("", frame)]
    titles = [f"{title(third[0])}: {text(value)}" for value, _ in parts] if third else None
    figure = make_subplots(
        1, len(parts), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03
    )
    columns, rows = (list(dict.fromkeys(frame.sort_values(name)[name])) for name in (across, down))
    for number, (_, part) in enumerate(parts, 1):
        means = part.pivot_table("gap_closed", down, across, "mean").reindex(index=rows, columns=columns)
        figure.add_heatmap(
            x=list(map(text, columns)),
            y=list(map(text, rows)),
            z=[_numbers(row) for _, row in means.iterrows()],
            coloraxis="coloraxis",
            texttemplate="%{z:.0%}",
            hovertemplate=f"{title(across)} %{{x}}, {title(down)} %{{y}}: %{{z:.1%}}<extra></extra>",
            row=1,
            col=number,
        )
    figure.update_xaxes(type="category", title=title(across))
    figure.update_yaxes(type="category")
    figure.update_layout(
        yaxis={"title": title(down)},
        coloraxis={"colorscale": "Cividis", "colorbar": _CLOSED_AXIS},
    )
    return finished(figure)


def efficiency(frame: Frame, by: Sequence[str]) -> go.Figure:
    """The gap closed over what it cost: trained parameters, FLOPs, seconds.

    Args:
        frame: Finished runs, as `Sweep.frame` gives them.
        by: The factors that tell runs apart, the seed left out.
    """
    frame, by = frame[frame["gap_closed"].notna()], by[:2]  # of more, nothing can be seen
    look = _Look(frame, by)
    costs = ("trainable_parameters", "train_flops", "train_seconds")
    figure = make_subplots(1, len(costs), shared_yaxes=True, horizontal_spacing=0.03)
    groups = group_of(frame, by)
    traces = []
    for group in dict.fromkeys(groups):
        part, style = frame[groups == group], look.of(group)
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
    columns = [1 + number % len(costs) for number in range(len(traces))]
    figure.add_traces(traces, rows=[1] * len(traces), cols=columns)
    for number, cost in enumerate(costs, 1):
        spread = cost == "trainable_parameters"  # from rank 1 to 256: that is all that fits on no line
        kind: dict[str, Any] = {"type": "log", "nticks": 4} if spread else {"rangemode": "tozero"}
        figure.update_xaxes(title=METRICS[cost].title, exponentformat="power", row=1, col=number, **kind)
    figure.update_layout(yaxis=_CLOSED_AXIS)
    look.explain(figure)
    return finished(figure)


def _over_seeds(runs: Frame, factor: str) -> dict[str, list[Any]]:
    """For each value of a factor the mean of the gap closed, and half its confidence interval."""
    from scipy import stats

    found: dict[str, list[Any]] = {"value": [], "mean": [], "margin": [], "runs": []}
    for value, part in runs.groupby(factor, sort=True):
        closed, n = part["gap_closed"].astype(float), len(part)
        margin = None
        if part[SEED].nunique() > 1:
            margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * closed.std(ddof=1) / math.sqrt(n))
        for name, one in zip(found, (value, float(closed.mean()), margin, n), strict=True):
            found[name].append(one)
    return found


def _ticks(values: Sequence[float]) -> dict[str, Any]:
    """A tick at each value that there is, where they are few."""
    different = sorted(set(values))
    few = 1 <= len(different) <= _MOST_IN_LEGEND
    return ticks(different, _MOST_IN_LEGEND) if few else {}


def _numbers(column: Any) -> list[float | None]:
    """Without what is not there."""
    return [None if value is None or value != value else float(value) for value in column]
