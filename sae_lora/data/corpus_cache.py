"""The cache of packed sequences: a folder for each corpus, complete or not there at all."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_lora.common.console import say
from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, new_folder, write_atomically
from sae_lora.data.packing import Packer


class Sequences(NamedTuple):
    """The sequences of both splits, `[sequence, pos]`, and their largest token id."""

    train: np.ndarray
    validation: np.ndarray
    largest_token: int
    validation_documents: int | None
    """Number of documents of the held-out sequences; `None` in a cache of an older version."""


_LARGEST = "largest_token"
_DOCUMENTS = "validation_documents"


def read(folder: Path) -> Sequences | None:
    """The sequences in a folder of the cache; `None` if there are none. Remove a damaged folder."""
    if not folder.exists():
        return None
    try:
        recipe = json.loads((folder / "recipe.json").read_text())
        largest, documents = recipe[_LARGEST], recipe.get(_DOCUMENTS)
        train, validation = (
            np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "validation")
        )
        return Sequences(train, validation, largest, documents)
    except (FileNotFoundError, EOFError, ValueError, LookupError, TypeError) as error:
        say(f"note: {folder} is damaged, and made again: {error}")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    except OSError as error:
        raise UserError(f"data.cache_dir: {folder} cannot be read: {error.strerror}") from error


def write(folder: Path, recipe: dict[str, Any], train: Packer, validation: Packer) -> Sequences:
    """Write the folder, complete or not at all, and return its sequences."""
    measured = {
        _LARGEST: int(max(train.largest, validation.largest)),
        _DOCUMENTS: validation.documents,
    }
    try:
        with new_folder(folder) as temporary:
            np.save(temporary / "train.npy", train.sequences)
            np.save(temporary / "validation.npy", validation.sequences)
            write_atomically(temporary / "recipe.json", as_json(recipe | measured))
    except OSError as error:
        # Perhaps another run has written the same corpus in the meantime.
        if (written := read(folder)) is None:
            cause = error.strerror or f"the disk may be full ({error})"  # numpy's errors are only text
            raise UserError(f"data.cache_dir: cannot write to {folder}: {cause}") from error
        return written
    written = read(folder)
    assert written is not None
    return written
