"""Figures of layer groups: distances between blocks, the tree that groups are cut from, and its AMAD.

Imports no torch: what is drawn may come from a file.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from scipy.cluster import hierarchy

from sae_lora.common.plots import COLOURS, finished, ticks

_DISTANCE = "angular distance"
_GREY = "#888888"
_MOST_WITH_NUMBERS = 13
"""Blocks along a map whose cells still have room for a number."""
_MOST_TICKS = 16
"""Blocks or counts that an axis names one by one."""
_MOST_LARGE_LEAVES = 30
"""Blocks below a tree, all of which are named, with names as large as elsewhere."""


def distance_map(distances: ArrayLike, groups: Sequence[Sequence[int]]) -> go.Figure:
    """The distance between any two blocks, with a frame around what lies within a group.

    Args:
        distances: `[block, block]`, as shares of half a turn.
        groups: Block indices of each group, sorted. A group with gaps has a frame for each part.
    """
    values = np.asarray(distances, dtype=float)
    n_blocks = len(values)
    names = list(range(n_blocks))
    figure = go.Figure(
        go.Heatmap(
            x=names,
            y=names,
            z=values.tolist(),
            colorscale="Cividis",
            colorbar={"title": {"text": _DISTANCE, "side": "right"}},
            texttemplate="%{z:.2f}" if n_blocks <= _MOST_WITH_NUMBERS else None,
            textfont={"size": 12},
            hovertemplate="blocks %{x} and %{y}: %{z:.4f}<extra></extra>",
        )
    )
    for down, across in _frames(groups):
        figure.add_shape(
            type="rect",
            x0=across[0] - 0.5,
            x1=across[1] + 0.5,
            y0=down[0] - 0.5,
            y1=down[1] + 0.5,
            line={"color": COLOURS[5], "width": 3},
        )
    blocks = {"title": "block", "showgrid": False, "zeroline": False} | ticks(names, _MOST_TICKS)
    figure.update_layout(
        xaxis=blocks | {"constrain": "domain", "tickangle": 0},
        yaxis=blocks | {"autorange": "reversed", "scaleanchor": "x", "constrain": "domain"},
    )
    return finished(figure).update_layout(width=620, height=520)


def tree(linkage: ArrayLike, n_groups: int) -> go.Figure:
    """The tree of merges, each group in a colour, with the cut that makes the groups.

    Args:
        linkage: Two blocks' merges or more, `[n - 1, 4]`, as scipy lays them out.
        n_groups: Into how many groups it is cut.
    """
    merges = _by_first_block(np.asarray(linkage, dtype=float))
    n = len(merges) + 1
    made = n - n_groups  # merges below the cut
    group_of = _group_of_each_node(merges, made)
    drawn = hierarchy.dendrogram(
        merges,
        no_plot=True,
        link_color_func=lambda node: _colour(group_of[node]) if node < n + made else _GREY,
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
            for x, y, colour in zip(drawn["icoord"], drawn["dcoord"], drawn["color_list"], strict=True)
        ]
    )
    blocks = list(map(int, drawn["leaves"]))
    places = [5 + 10 * place for place in range(n)]  # where scipy puts leaves
    figure.add_scatter(
        x=places,
        y=[0] * n,
        mode="markers",
        marker={"color": [_colour(group_of[block]) for block in blocks], "size": 9},
        customdata=blocks,
        hovertemplate="block %{customdata}<extra></extra>",
        cliponaxis=False,
    )
    heights = [0.0, *merges[:, 2].tolist()]
    # Above all merges there is nothing to cut at: a little higher says that all is one group.
    above = heights[made + 1] if made + 1 < n else heights[-1] * 1.1
    _threshold(figure, (heights[made] + above) / 2, _count(n_groups))
    figure.update_layout(
        showlegend=False,
        xaxis={"title": "block", "showgrid": False, "zeroline": False, "range": [-4, 10 * n + 4]}
        | {"tickvals": places, "ticktext": list(map(str, blocks))}
        | {"ticks": "outside", "ticklen": 8, "tickcolor": "rgba(0, 0, 0, 0)"}  # room for the markers
        | ({"tickfont": {"size": 9}} if n > _MOST_LARGE_LEAVES else {}),
        yaxis={"title": f"largest {_DISTANCE} within", "rangemode": "tozero"},
    )
    return finished(figure)


def amad_by_groups(
    amads: Sequence[float],
    n_groups: int,
    amad_max: float | None = None,
    evenly: Sequence[float] | None = None,
) -> go.Figure:
    """The AMAD over the number of groups, with the one chosen and the threshold that chose it.

    Args:
        amads: Of 1, 2, … n groups.
        n_groups: The number chosen.
        amad_max: The threshold; `None` where the number was given.
        evenly: The same of neighbouring blocks in groups of equal size, to compare with.
    """
    counts = list(range(1, len(amads) + 1))
    figure = go.Figure()
    if evenly is not None:
        figure.add_scatter(
            x=counts,
            y=list(evenly),
            mode="lines+markers",
            name="equal sizes",
            line={"color": COLOURS[1], "width": 2, "dash": "dash"},
            marker={"color": COLOURS[1], "symbol": "square", "size": 6},
            cliponaxis=False,
            hovertemplate="%{x} groups of equal size: %{y:.4f}<extra></extra>",
        )
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
        name=_count(n_groups),
        marker={
            "color": COLOURS[5],
            "symbol": "circle-open",
            "size": 17,
            "line": {"width": 3},
        },
        hoverinfo="skip",
        cliponaxis=False,
    )
    if amad_max is not None:
        _threshold(figure, amad_max, f"AMAD {amad_max:g}")
    figure.update_layout(
        xaxis={"title": "groups", "range": [0.5, len(amads) + 0.5], "tickangle": 0}
        | ticks(counts, _MOST_TICKS),
        yaxis={"title": "AMAD", "rangemode": "tozero"},
    )
    return finished(figure)


def _frames(
    groups: Sequence[Sequence[int]],
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """First and last block, down and across, of each rectangle of a map that lies within a group."""
    found = []
    for group in groups:
        ends = np.flatnonzero(np.diff(group) > 1) + 1
        parts = [(int(part[0]), int(part[-1])) for part in np.split(np.asarray(group), ends)]
        found += [(down, across) for down in parts for across in parts]
    return found


def _by_first_block(merges: np.ndarray) -> np.ndarray:
    """The same tree, of each two branches the one with the earlier block to the left."""
    ordered, first = merges.copy(), list(range(len(merges) + 1))
    for merge in ordered:
        merge[:2] = sorted(merge[:2], key=lambda node: first[int(node)])
        first.append(first[int(merge[0])])
    return ordered


def _group_of_each_node(merges: np.ndarray, made: int) -> dict[int, int]:
    """The group of each node below the cut, by its place among the groups from left to right.

    Args:
        merges: The tree, of each two branches the left one first.
        made: How many merges lie below the cut.
    """
    n = len(merges) + 1
    pairs = merges[:, :2].astype(int).tolist()
    tops = {*range(n + made)} - {node for pair in pairs[:made] for node in pair}
    first = list(range(n))
    for left, _ in pairs:
        first.append(first[left])
    found = {top: group for group, top in enumerate(sorted(tops, key=first.__getitem__))}
    for number in reversed(range(made)):
        for node in pairs[number]:
            found[node] = found[n + number]
    return found


def _colour(group: int) -> str:
    """Neighbouring groups differ, however many there are."""
    return COLOURS[group % len(COLOURS)]


def _count(n_groups: int) -> str:
    return f"{n_groups} group{'s' if n_groups > 1 else ''}"


def _threshold(figure: go.Figure, y: float, text: str) -> None:
    """A dashed line across, named at its right end."""
    figure.add_hline(
        y=y,
        line={"color": _GREY, "width": 1.5, "dash": "dash"},
        annotation={"text": text, "font": {"color": "#555555"}},
        annotation_position="top right",
    )
