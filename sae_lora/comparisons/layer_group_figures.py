"""Figures of layer groups: distances between blocks, the tree that groups are cut from, and its AMAD.

Imports no torch.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from scipy.cluster import hierarchy

from sae_lora.common.plots import COLOURS, LIGHT, finished, ticks

_DISTANCE = "angular distance"
_GREY = "#888888"
_MOST_WITH_NUMBERS = 13
"""Largest number of blocks along a map at which a number fits into a cell."""
_MOST_TICKS = 16
"""Largest number of named ticks of an axis."""
_MOST_LARGE_LEAVES = 30
"""Largest number of leaves of a tree whose names fit in the usual font size."""


def distance_map(distances: ArrayLike, groups: Sequence[Sequence[int]]) -> go.Figure:
    """The distance between each two blocks, with a frame around each group.

    Args:
        distances: Angular distances, `[block, block]`, as shares of π.
        groups: Block indices of each group, sorted. A group with gaps has several frames.
    """
    values = np.asarray(distances, dtype=float)
    n_blocks = len(values)
    names = list(range(n_blocks))
    figure = go.Figure(
        go.Heatmap(
            x=names,
            y=names,
            z=values.tolist(),
            colorscale=LIGHT,
            colorbar={"title": {"text": _DISTANCE, "side": "right"}},
            texttemplate="%{z:.2f}" if n_blocks <= _MOST_WITH_NUMBERS else None,
            textfont={"size": 12, "color": "#000"},
            hovertemplate="blocks %{x} and %{y}: %{z:.4f}<extra></extra>",
        )
    )
    for group in groups:
        gaps = np.flatnonzero(np.diff(group) > 1) + 1
        neighbours = np.split(np.asarray(group), gaps)
        for down, across in itertools.product(neighbours, repeat=2):
            figure.add_shape(
                type="rect",
                x0=across[0] - 0.5,
                x1=across[-1] + 0.5,
                y0=down[0] - 0.5,
                y1=down[-1] + 0.5,
                line={"color": COLOURS[5], "width": 3},
            )
    blocks = {"title": "block", "showgrid": False, "zeroline": False} | ticks(names, _MOST_TICKS)
    figure.update_layout(
        xaxis=blocks | {"constrain": "domain", "tickangle": 0},
        yaxis=blocks | {"autorange": "reversed", "scaleanchor": "x", "constrain": "domain"},
    )
    return finished(figure).update_layout(width=620, height=520)


def tree(linkage: ArrayLike, groups: Sequence[Sequence[int]]) -> go.Figure:
    """The tree of merges, each group in a colour, with the cut that makes the groups.

    Args:
        linkage: The merges of n blocks, `[n - 1, 4]`, in scipy's format.
        groups: Block indices of each group that the tree is cut into.
    """
    merges, first_block = _by_first_block(np.asarray(linkage, dtype=float))
    n = len(merges) + 1
    n_below = n - len(groups)  # merges below the cut
    colour_of = {
        block: COLOURS[number % len(COLOURS)] for number, group in enumerate(groups) for block in group
    }
    dendrogram = hierarchy.dendrogram(
        merges,
        no_plot=True,
        link_color_func=lambda node: colour_of[first_block[node]] if node < n + n_below else _GREY,
    )
    figure = go.Figure(
        [
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                line={"color": colour, "width": 2},
                hovertemplate="%{y:.4f}<extra></extra>",
            )
            for x, y, colour in zip(
                dendrogram["icoord"], dendrogram["dcoord"], dendrogram["color_list"], strict=True
            )
        ]
    )
    blocks = list(map(int, dendrogram["leaves"]))
    positions = [5 + 10 * number for number in range(n)]  # scipy's positions of leaves
    figure.add_scatter(
        x=positions,
        y=[0] * n,
        mode="markers",
        marker={"color": [colour_of[block] for block in blocks], "size": 9},
        customdata=blocks,
        hovertemplate="block %{customdata}<extra></extra>",
        cliponaxis=False,
    )
    heights = [0.0, *merges[:, 2].tolist()]
    # With one group, the cut is a little above the last merge.
    above = heights[n_below + 1] if n_below + 1 < n else heights[-1] * 1.1
    figure.add_hline(
        y=(heights[n_below] + above) / 2,
        line={"color": _GREY, "width": 1.5, "dash": "dash"},
        annotation={"text": count(len(groups)), "font": {"color": "#555555"}},
        annotation_position="top right",
    )
    figure.update_layout(
        showlegend=False,
        xaxis={"title": "block", "showgrid": False, "zeroline": False, "range": [-4, 10 * n + 4]}
        | {"tickvals": positions, "ticktext": list(map(str, blocks))}
        | {"ticks": "outside", "ticklen": 8, "tickcolor": "rgba(0, 0, 0, 0)"}  # room for the markers
        | ({"tickfont": {"size": 9}} if n > _MOST_LARGE_LEAVES else {}),
        yaxis={"title": f"largest {_DISTANCE} in the group", "rangemode": "tozero"},
    )
    return finished(figure)


def amad_by_groups(amads: Sequence[float], n_groups: int) -> go.Figure:
    """The AMAD of 1, 2, … n groups over their number, with a mark at the chosen number."""
    counts = list(range(1, len(amads) + 1))
    figure = go.Figure()
    figure.add_scatter(
        x=counts,
        y=list(amads),
        mode="lines+markers",
        name="by distance",
        line={"color": COLOURS[0], "width": 2},
        marker={"color": COLOURS[0], "size": 7},
        cliponaxis=False,
        hovertemplate="%{x} groups: %{y:.4f}<extra></extra>",
    )
    figure.add_scatter(
        x=[n_groups],
        y=[amads[n_groups - 1]],
        mode="markers",
        name=count(n_groups),
        marker={"color": COLOURS[5], "symbol": "circle-open", "size": 17, "line": {"width": 3}},
        hoverinfo="skip",
        cliponaxis=False,
    )
    figure.update_layout(
        xaxis={"title": "groups", "range": [0.5, len(amads) + 0.5], "tickangle": 0}
        | ticks(counts, _MOST_TICKS),
        yaxis={"title": "AMAD", "rangemode": "tozero"},
    )
    return finished(figure)


def count(n_groups: int) -> str:
    """`1 group`, `2 groups`."""
    return f"{n_groups} group{'s' if n_groups > 1 else ''}"


def _by_first_block(merges: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The tree in which the left branch of each merge contains the earlier block.

    Returns:
        The merges, and the first block of each node.
    """
    ordered, first = merges.copy(), list(range(len(merges) + 1))
    for merge in ordered:
        merge[:2] = sorted(merge[:2], key=lambda node: first[int(node)])
        first.append(first[int(merge[0])])
    return ordered, first
