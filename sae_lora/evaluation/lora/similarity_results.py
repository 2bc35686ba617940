"""`evaluation/similarity.json` in a sweep's folder: directions that adapters have in common.

Imports no torch.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from sae_lora.common.files import as_json, write_atomically

VERSION = 1
"""Version of the schema; fields are only ever added within a version."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Subspace similarities φ of i directions of the first run and j of the second, `[i, j]`."""

    similarity: list[list[float]]
    """From 0, orthogonal, to 1, where the smaller subspace lies in the larger. Mean over matrices."""
    expected: list[list[float]]
    """Expected similarities of random subspaces of these sizes."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two runs that adapt the same matrices of the same model."""

    first: str
    """Name of the run's folder in the sweep."""
    second: str
    matrices: int
    first_sizes: list[int]
    """Values of i: numbers of directions, the largest first."""
    second_sizes: list[int]
    """Values of j."""
    of_all: Grid
    of_kinds: dict[str, Grid]
    """By a matrix's path inside its block."""


def path_in(sweep: Path) -> Path:
    """File that keeps the pairs of a sweep."""
    return sweep / "evaluation" / "similarity.json"


def write(sweep: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs into the sweep's folder, in place of older ones."""
    path = path_in(sweep)
    path.parent.mkdir(exist_ok=True)
    values = {"pairs": [dataclasses.asdict(pair) for pair in pairs], "version": VERSION}
    write_atomically(path, as_json(values))


def read(sweep: Path) -> list[Pair]:
    """Pairs of a sweep; none where no file of this version exists."""
    path = path_in(sweep)
    values = json.loads(path.read_text()) if path.exists() else {}
    if values.get("version") != VERSION:
        return []
    return [
        Pair(
            **pair
            | {
                "of_all": Grid(**pair["of_all"]),
                "of_kinds": {kind: Grid(**grid) for kind, grid in pair["of_kinds"].items()},
            }
        )
        for pair in values["pairs"]
    ]
