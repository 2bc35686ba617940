"""Files and folders that are written completely or not at all, also if the machine stops suddenly."""

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
    """Create the folder and write 1 MB into it, to find a full or read-only disk before any work starts.

    Raises:
        UserError: If this is impossible. The message names `asked_by`, the option for the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".room", " " * 1_000_000)
        (folder / ".room").unlink(missing_ok=True)  # another launch may check at the same time
    except OSError as error:
        raise UserError(f"{asked_by}: cannot write to {folder}: {error.strerror}") from error


def as_json(values: dict[str, Any] | list[Any]) -> str:
    """Indented JSON. NaN and infinity raise a ValueError, because JSON has no such numbers."""
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill. It is renamed to `path` only if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same PID
    temporary.mkdir()
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            _sync(entry)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(path.parent)


def write_atomically(path: Path, text: str, *, lasting: bool = True) -> None:
    """Write the file completely or not at all. `lasting`: also if the machine stops suddenly."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if lasting:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder (a rename, for example), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
