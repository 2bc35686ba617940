"""The common style of all figures, and export to files. Imports no torch."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

from sae_lora.common.console import complain

# Okabe and Ito's palette, which colour-blind readers can distinguish too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
LIGHT = ((0.0, "#f4f9fd"), (1.0, "#56b4e9"))
"""Colours of a map from its smallest to its largest value, on all of which black numbers can be read."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")


def line_and_markers(colour: str, number: int) -> dict[str, Any]:
    """Style of a line and its markers: a colour, and the dash and the symbol with a number."""
    return {
        "line": {"color": colour, "dash": DASHES[number % len(DASHES)], "width": 2},
        "marker": {"color": colour, "symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7},
    }


def ticks(values: Sequence[float], limit: int) -> dict[str, Any]:
    """An axis with a tick at each value, or at every n-th value: at most `limit` ticks."""
    shown = values[:: max(1, math.ceil(len(values) / limit))]
    return {"tickvals": list(shown), "ticktext": [f"{value:,.6g}" for value in shown]}


def logarithmic(values: Sequence[float], tickformat: str = ".3~g") -> dict[str, Any]:
    """A logarithmic axis around positive values, with ticks at round numbers: 1, 2, 5, 10 …"""
    low, high = 0.9 * min(values), 1.1 * max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    return {
        "type": "log",
        "rangemode": "normal",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": [tick for tick in ticks if low <= tick <= high],
        "tickformat": tickformat,
    }


def finished(figure: go.Figure) -> go.Figure:
    """The figure in the common style: one column of a paper wide, the legend beside the data."""
    figure.update_layout(
        template="plotly_white",
        width=760,
        height=420,
        font={"size": 14},
        margin={"l": 70, "r": 20, "t": 40, "b": 60},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def try_pictures(targets: Sequence[tuple[go.Figure, Path]]) -> list[str]:
    """Write figures to .svg or .png files, in the size of their layout. kaleido needs a browser for it.

    Returns:
        Messages about pictures that could not be written; empty if all were written.
    """
    figures = [figure for figure, _ in targets]
    # Without explicit sizes, plotly writes all figures in its default size.
    layouts = [figure.to_dict()["layout"] for figure in figures]
    try:
        plotly.io.write_images(
            figures,
            [path for _, path in targets],
            width=[layout.get("width") for layout in layouts],
            height=[layout.get("height") for layout in layouts],
            scale=2,
            validate=False,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        reason = re.split(r"[,.:] ", " ".join(str(error).split()))[0] or type(error).__name__
        return [f"no pictures ({reason}): they need `pip install kaleido` and Chrome or Chromium"]
    return []


def write_svgs(figures: Mapping[str, go.Figure], folder: Path) -> None:
    """Write figures as `<name>.svg` into a folder; without a browser, say that they are left out."""
    for note in try_pictures([(figure, folder / f"{name}.svg") for name, figure in figures.items()]):
        complain("left out", note)
