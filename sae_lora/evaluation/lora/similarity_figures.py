"""Figures of what adapters of two runs have in common.

Imports no torch: what is drawn may come from a file.
"""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_lora.common.plots import finished
from sae_lora.evaluation.lora.similarity_results import Grid, Pair

MOST_PAIRS = 6
"""Of a sweep that are drawn."""
_MOST_WITH_NUMBERS = 9
"""Sizes along a map whose cells still have room for a number."""
_MOST_KINDS = 8
_WHOLE = {"cmin": 0, "cmax": 1, "colorscale": "Cividis"}
"""All figures have the colours of all values that φ can have, so that pairs can be compared."""


def similarity_map(pair: Pair) -> go.Figure:
    """φ of i directions of one run and j of the other, beside that of random subspaces.

    Args:
        pair: The runs.
    """
    grid = pair.of_all
    parts = [("measured", grid.similarity), ("random subspaces", grid.expected)]
    figure = _maps(parts, pair, with_numbers=True)
    return figure.update_layout(height=460)


def kinds_map(pair: Pair) -> go.Figure:
    """The same of each kind of matrix, as measured.

    Args:
        pair: The runs; kinds beyond the first few are left out.
    """
    kinds: dict[str, Grid] = dict(list(pair.of_kinds.items())[:_MOST_KINDS])
    parts = [(kind, grid.similarity) for kind, grid in kinds.items()]
    return _maps(parts, pair, with_numbers=False)


def figures(found: Sequence[Pair]) -> dict[str, go.Figure]:
    """The figures of a sweep's first pairs, by the name of their file.

    Args:
        found: As `similarity.compare` gives them.
    """
    drawn = {}
    for number, pair in enumerate(found[:MOST_PAIRS], 1):
        drawn[f"similarity_{number}"] = similarity_map(pair)
        drawn[f"similarity_{number}_kinds"] = kinds_map(pair)
    return drawn


def _maps(
    parts: Sequence[tuple[str, list[list[float]]]], pair: Pair, *, with_numbers: bool
) -> go.Figure:
    """A map for each part, side by side, in rows of at most four."""
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
    few = max(len(pair.first_sizes), len(pair.second_sizes)) <= _MOST_WITH_NUMBERS
    for number, (name, values) in enumerate(parts):
        figure.add_heatmap(
            x=list(map(str, pair.second_sizes)),
            y=list(map(str, pair.first_sizes)),
            z=values,
            coloraxis="coloraxis",
            texttemplate="%{z:.2f}" if with_numbers and few else None,
            textfont={"size": 10},
            hovertemplate=f"{name}, i %{{y}}, j %{{x}}: %{{z:.3f}}<extra></extra>",
            row=1 + number // columns,
            col=1 + number % columns,
        )
    # Sizes are named, not measured out: they double after the first few.
    sizes: dict[str, Any] = {"type": "category", "showgrid": False, "tickangle": 0}
    figure.update_xaxes(**sizes)
    figure.update_yaxes(autorange="reversed", **sizes)
    for number in range(len(parts))[-columns:]:  # the lowest of each column
        figure.update_xaxes(
            title=f"j of {_short(pair.second)}",
            showticklabels=True,
            row=1 + number // columns,
            col=1 + number % columns,
        )
    for row in range(1, rows + 1):
        figure.update_yaxes(title=f"i of {_short(pair.first)}", row=row, col=1)
    figure.update_layout(
        coloraxis=_WHOLE | {"colorbar": {"title": {"text": "subspace similarity φ", "side": "right"}}}
    )
    return finished(figure)


def _short(name: str) -> str:
    """A run's name without what is the same in most, for an axis: the hash is enough to find it."""
    return name.rpartition("-")[2]
