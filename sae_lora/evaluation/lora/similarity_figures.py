"""Maps of the similarity of adapters' directions. Imports no torch."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lora.common.plots import LIGHT, finished
from sae_lora.evaluation.lora.similarity_results import Pair

MOST_PAIRS = 6
"""Largest number of pairs of a sweep that are drawn."""
_MOST_WITH_NUMBERS = 9
"""Largest number of sizes along a map at which a number fits into a cell."""
_MOST_KINDS = 8
_WHOLE = {"cmin": 0, "cmax": 1, "colorscale": LIGHT}
"""The same colour for the same φ in all figures, so that pairs can be compared."""


def similarity_map(pair: Pair) -> go.Figure:
    """Two maps of φ between i directions of one run and j of the other: measured, and expected of random
    subspaces."""
    grid = pair["of_all"]
    parts = [("measured", grid["similarity"]), ("random subspaces", grid["expected"])]
    return _maps(parts, pair, with_numbers=True).update_layout(height=460)


def kinds_map(pair: Pair) -> go.Figure:
    """Maps of measured φ for the first few kinds of matrices."""
    parts = [(kind, grid["similarity"]) for kind, grid in pair["of_kinds"].items()]
    return _maps(parts[:_MOST_KINDS], pair, with_numbers=False)


def figures(pairs: Sequence[Pair]) -> dict[str, go.Figure]:
    """Figures of a sweep's first pairs, by file name."""
    maps = {}
    for number, pair in enumerate(pairs[:MOST_PAIRS], 1):
        maps[f"similarity_{number}"] = similarity_map(pair)
        maps[f"similarity_{number}_kinds"] = kinds_map(pair)
    return maps


def _maps(
    parts: Sequence[tuple[str, list[list[float]]]], pair: Pair, *, with_numbers: bool
) -> go.Figure:
    """A map for each part, in rows of at most four."""
    columns = min(4, len(parts))
    rows = -(-len(parts) // columns)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[name for name, _ in parts],
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.12,
    )
    has_room = max(len(pair["first_sizes"]), len(pair["second_sizes"])) <= _MOST_WITH_NUMBERS
    for number, (name, values) in enumerate(parts):
        figure.add_heatmap(
            x=list(map(str, pair["second_sizes"])),
            y=list(map(str, pair["first_sizes"])),
            z=values,
            coloraxis="coloraxis",
            texttemplate="%{z:.2f}" if with_numbers and has_room else None,
            textfont={"size": 10, "color": "#000"},
            hovertemplate=f"{name}, i %{{y}}, j %{{x}}: %{{z:.3f}}<extra></extra>",
            row=1 + number // columns,
            col=1 + number % columns,
        )
    # A category axis, because sizes double after the first few.
    sizes: dict[str, Any] = {"type": "category", "showgrid": False, "tickangle": 0}
    figure.update_xaxes(**sizes)
    figure.update_yaxes(autorange="reversed", **sizes)
    hashes = [name.rpartition("-")[2] for name in (pair["first"], pair["second"])]
    for number in range(len(parts))[-columns:]:  # the lowest map of each column
        figure.update_xaxes(
            title=f"j of {hashes[1]}",
            showticklabels=True,
            row=1 + number // columns,
            col=1 + number % columns,
        )
    for row in range(1, rows + 1):
        figure.update_yaxes(title=f"i of {hashes[0]}", row=row, col=1)
    figure.update_layout(
        coloraxis=_WHOLE | {"colorbar": {"title": {"text": "subspace similarity φ", "side": "right"}}}
    )
    return finished(figure)
