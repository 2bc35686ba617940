"""The look of all figures, and files of them. Imports no torch."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")


def ticks(values: Sequence[float], most: int) -> dict[str, Any]:
    """An axis with a tick at each value, or at every second or third where `most` are fewer."""
    shown = values[:: max(1, math.ceil(len(values) / most))]
    return {"tickvals": list(shown), "ticktext": [f"{value:,.6g}" for value in shown]}


def logarithmic(values: Sequence[float], tickformat: str = ".3~g") -> dict[str, Any]:
    """A logarithmic axis around values above zero, with whole numbers at its ticks: 1, 2, 5, 10 …"""
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
    """The figure in the look of all: wide enough for a column of a paper, the legend beside the data."""
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


def try_pictures(wanted: Sequence[tuple[go.Figure, Path]]) -> list[str]:
    """Write figures to .svg or .png files, in the size of their layout; kaleido needs a browser for it.

    Returns:
        Messages about pictures that cannot be made here; none where all are there.
    """
    figures = [figure for figure, _ in wanted]
    # Without a size for each, all are of plotly's default size.
    layouts = [figure.to_dict()["layout"] for figure in figures]
    try:
        plotly.io.write_images(
            figures,
            [path for _, path in wanted],
            width=[layout.get("width") for layout in layouts],
            height=[layout.get("height") for layout in layouts],
            scale=2,
            validate=False,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [f"no pictures ({reason}): they need `pip install kaleido` and Chrome or Chromium"]
    return []
