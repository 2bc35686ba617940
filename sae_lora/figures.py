"""Figures made from run folders alone, with plotly. Imports no torch."""

from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from sae_lora.errors import UserError
from sae_lora.records import RunFolder

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
    labels = _labels(finished)
    figure = go.Figure()
    for number, (folder, label) in enumerate(zip(finished, labels, strict=True)):
        curve = folder.read_curve()
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
        legend={"title": {"text": _legend_title(finished)}},
    )
    return figure


_FACTORS: dict[str, Callable[[dict], object]] = {
    "rank": lambda summary: summary["lora"]["rank"],
    "blocks": lambda summary: summary["lora"]["blocks"],
    "SAE after block": lambda summary: "+".join(str(sae["block"]) for sae in summary["sae"]),
    "width": lambda summary: "+".join(sorted({str(sae["width"]) for sae in summary["sae"]})),
    "L0": lambda summary: f"{summary['l0']:.0f}",
    "model": lambda summary: summary["model"]["name"],
}


def _varying(folders: Sequence[RunFolder]) -> list[str]:
    summaries = [folder.read_summary() for folder in folders]
    return [name for name, read in _FACTORS.items() if len({str(read(one)) for one in summaries}) > 1]


def _legend_title(folders: Sequence[RunFolder]) -> str:
    return ", ".join(_varying(folders)) or "run"


def _labels(folders: Sequence[RunFolder]) -> list[str]:
    names = _varying(folders)
    labels = []
    for folder in folders:
        summary = folder.read_summary()
        parts = [str(_FACTORS[name](summary)) for name in names]
        labels.append(", ".join(parts) or summary["name"])
    return labels
