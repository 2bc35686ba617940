"""Figures made from run folders alone, with plotly. Imports no torch."""

from collections.abc import Sequence

import plotly.graph_objects as go

from sae_lora.errors import UserError
from sae_lora.records import RunFolder
from sae_lora.report import FACTORS, finished_summaries, varying_factors

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
DASHES = ("solid", "dash", "dot", "dashdot")


class _Styles:
    """A style for each value, the same for equal values, in order of appearance."""

    def __init__(self, styles: Sequence[str]) -> None:
        self._styles = styles
        self._given: dict[str, str] = {}

    def __getitem__(self, value: str) -> str:
        return self._given.setdefault(value, self._styles[len(self._given) % len(self._styles)])


def gap_curves(folders: Sequence[RunFolder]) -> go.Figure:
    """The CE gap of each finished run over its training tokens.

    Args:
        folders: Runs; those that are not finished are left out.

    Raises:
        UserError: Where none is finished.
    """
    runs = finished_summaries(folders)
    if not runs:
        raise UserError("none of these runs is finished: there is nothing to draw")
    varying = varying_factors([summary for _, summary in runs])
    colours = _Styles(COLOURS)
    dashes = _Styles(DASHES)
    figure = go.Figure()
    for folder, summary in runs:
        curve = folder.read_curve()
        values = [FACTORS[name](summary) for name in varying]
        label = ", ".join(values) or summary["name"]
        # Two factors are told apart as colour and dash; of more, the last say nothing more.
        first, second = (values[0], values[1]) if len(values) == 2 else (label, "")
        figure.add_scatter(
            x=[point.tokens for point in curve],
            y=[point.ce_gap for point in curve],
            name=label,
            mode="lines+markers",
            line={"color": colours[first], "dash": dashes[second], "width": 2.5},
        )
    figure.update_layout(
        template="plotly_white",
        width=760,
        height=420,
        font={"size": 14},
        margin={"l": 70, "r": 20, "t": 30, "b": 60},
        xaxis={"title": "training tokens", "rangemode": "tozero"},
        yaxis={"title": "CE gap to the plain model (nats/token)", "rangemode": "tozero"},
        legend={"title": {"text": ", ".join(varying) or "run"}},
    )
    return figure
