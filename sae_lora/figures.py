"""Figures made from run folders alone, with plotly. Imports no torch."""

from collections.abc import Sequence

import plotly.graph_objects as go

from sae_lora.errors import UserError
from sae_lora.records import RunFolder
from sae_lora.report import FACTORS, varying_factors

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def gap_curves(folders: Sequence[RunFolder]) -> go.Figure:
    """The CE gap of each finished run over its training tokens.

    Args:
        folders: Runs; those that are not finished are left out.

    Raises:
        UserError: Where none is finished.
    """
    finished = [folder for folder in folders if folder.is_finished]
    if not finished:
        raise UserError("none of these runs is finished: there is nothing to draw")
    summaries = [folder.read_summary() for folder in finished]
    varying = varying_factors(summaries)
    figure = go.Figure()
    for number, (folder, summary) in enumerate(zip(finished, summaries, strict=True)):
        curve = folder.read_curve()
        label = ", ".join(FACTORS[name](summary) for name in varying) or summary["name"]
        figure.add_scatter(
            x=[point.tokens for point in curve],
            y=[point.ce_gap for point in curve],
            name=label,
            mode="lines+markers",
            line={"color": COLOURS[number % len(COLOURS)], "width": 2.5},
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
