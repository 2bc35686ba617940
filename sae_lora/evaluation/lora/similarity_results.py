"""Similarity of adapters' directions: `evaluation/similarity.json` of a sweep. Imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, json_digest, text_of, write_atomically

VERSION = 1
"""Version of the schema; fields are only ever added within a version."""


class Grid(TypedDict):
    """Subspace similarities φ of i directions of the first run and j of the second, `[i, j]`."""

    similarity: list[list[float]]
    """Mean over matrices, from 0 (orthogonal) to 1 (the smaller subspace lies in the larger)."""
    expected: list[list[float]]
    """Expected similarities of random subspaces of these sizes."""


class Pair(TypedDict):
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
    """File that holds the pairs of a sweep."""
    return sweep / "evaluation" / "similarity.json"


def write(sweep: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs into the sweep's folder, over older ones.

    Raises:
        UserError: If a file has the name of the folder, or a folder that of the file.
    """
    path = path_in(sweep)
    if path.parent.is_file() or path.is_dir():
        wrong = path if path.is_dir() else path.parent
        kinds = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise UserError(f"{wrong} is a {kinds[0]}, and must be a {kinds[1]}: move it away")
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, as_json({"pairs": pairs, "version": VERSION, "digest": json_digest(pairs)}))


def read(sweep: Path) -> list[Pair]:
    """Pairs of a sweep; empty without a file, and if it cannot be used."""
    content = _content(sweep)
    return content if isinstance(content, list) else []


def damage(sweep: Path) -> str | None:
    """Why the file of a sweep cannot be used, in one line; `None` if it can, and without a file."""
    content = _content(sweep)
    return content if isinstance(content, str) else None


def _content(sweep: Path) -> list[Pair] | str:
    """The pairs of a sweep, or why the file cannot be used."""
    path = path_in(sweep)
    try:
        values = json.loads(text_of(path))
        version, pairs = values["version"], values["pairs"]
    except FileNotFoundError:
        return []
    except KeyError as error:
        return f"{path} is damaged: it lacks {error}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return f"{path} is damaged: {' '.join(str(error).split())}"
    if version != VERSION:
        return f"{path} is of version {version}; this sae_lora reads version {VERSION}"
    # Files of older versions have no digest.
    if values.get("digest", json_digest(pairs)) != json_digest(pairs) or not _are_pairs(pairs):
        return f"{path} has changed since it was written"
    return pairs


def _are_pairs(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(pair, dict) and set(Pair.__annotations__) <= set(pair) for pair in values
    )
