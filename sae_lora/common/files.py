"""Files that are there whole or not at all, also when the machine stops a moment later."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lora.common.errors import UserError


def check_writable(folder: Path, asked_by: str) -> None:
    """Make the folder and write into it, to know before anything else that there is room.

    Raises:
        UserError: Where that cannot be done; names `asked_by`, the option for the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".room", " " * 1_000_000)
        (folder / ".room").unlink(missing_ok=True)  # another launch may try at the same time
    except OSError as error:
        raise UserError(f"{asked_by}: cannot write to {folder}: {error.strerror}") from error


def as_json(values: dict[str, Any] | list[Any]) -> str:
    """Readable JSON; not-a-number is refused, because JSON has none."""
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears under its own name only when the block ends well."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed and had the same number
    beside.mkdir()
    try:
        yield beside
        for inside in beside.rglob("*"):
            _sync(inside)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _sync(path.parent)


def write_atomically(path: Path, text: str, *, lasting: bool = True) -> None:
    """Write the file whole or not at all; if `lasting`, also where the machine stops a moment later."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    if lasting:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Make the content of a file last, or the entries of a folder (a rename, say)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
