"""`evaluation/similarity.json` in a sweep's folder: what adapters have in common, run by run.

Imports no torch.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from sae_lora.common.files import as_json, write_atomically

VERSION = 1
"""Of the schema; fields are only ever added within a version."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Subspace similarities φ, `[i, j]`: of i directions of the first run and j of the second."""

    similarity: list[list[float]]
    """From 0, orthogonal, to 1, where the smaller subspace lies in the larger. Mean over matrices."""
    expected: list[list[float]]
    """Of random subspaces of these sizes."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two runs that adapt the same matrices of the same model."""

    first: str
    """The run's folder, as it is named in the sweep."""
    second: str
    matrices: int
    first_sizes: list[int]
    """i: that many directions, the largest first."""
    second_sizes: list[int]
    """j, likewise."""
    of_all: Grid
    of_kinds: dict[str, Grid]
    """By a matrix's path inside of its block."""


def path_in(sweep: Path) -> Path:
    """Where the pairs of a sweep are kept."""
    return sweep / "evaluation" / "similarity.json"


def write(sweep: Path, found: Sequence[Pair]) -> None:
    """Puts pairs into the sweep's folder, in the place of older ones."""
    path = path_in(sweep)
    path.parent.mkdir(exist_ok=True)
    values = {"pairs": [dataclasses.asdict(pair) for pair in found], "version": VERSION}
    write_atomically(path, as_json(values))


def read(sweep: Path) -> list[Pair]:
    """The pairs of a sweep; none where none were written, or by another version."""
    path = path_in(sweep)
    values = json.loads(path.read_text()) if path.exists() else {}
    if values.get("version") != VERSION:
        return []
    return [
        Pair(
            **one
            | {
                "of_all": Grid(**one["of_all"]),
                "of_kinds": {kind: Grid(**grid) for kind, grid in one["of_kinds"].items()},
            }
        )
        for one in values["pairs"]
    ]
