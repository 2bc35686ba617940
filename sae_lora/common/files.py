"""Files and folders that are written completely or not at all, also if the machine stops suddenly."""

import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lora.common.errors import UserError

LONGEST_NAME = 255
"""Longest name of a file or folder on Linux and macOS, in bytes of UTF-8."""


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


def check_readable(file: Path, asked_by: str) -> None:
    """Open the file for reading.

    Raises:
        UserError: If this is impossible. The message names `asked_by`, the option for the file.
    """
    try:
        file.open("rb").close()
    except OSError as error:
        raise UserError(f"{asked_by} = {str(file)!r} cannot be read: {error.strerror}") from error


def check_can_be_made(folder: Path, asked_by: str) -> None:
    """Refuse a folder that `check_writable` would refuse for another reason than a full disk.

    For a moment, an empty folder is in the nearest parent that exists.

    Raises:
        UserError: If a file is in its place, or its nearest existing parent is not writable.
    """
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    cause = None
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in folder.parts):
        cause = f"a name in it is longer than {LONGEST_NAME} bytes"
    elif not existing.is_dir():
        cause = f"{existing} is not a folder"
    else:
        try:
            tempfile.TemporaryDirectory(prefix=".room", dir=existing).cleanup()
        except OSError as error:
            cause = f"{existing}: {error.strerror}"
    if cause is not None:
        raise UserError(f"{asked_by}: cannot write to {folder}: {cause}")


def as_json(values: dict[str, Any] | list[Any]) -> str:
    """Indented JSON. NaN and infinity raise a ValueError, because JSON has no such numbers."""
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def text_of(file: Path) -> str:
    """The content of a regular file. Reading a FIFO could wait for ever.

    Raises:
        OSError: If it is missing, or is no regular file, or cannot be read.
        UnicodeDecodeError: If it is not UTF-8.
    """
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "it is no file", str(file))
    return file.read_text(encoding="utf-8")


def json_digest(values: Any) -> str:
    """SHA-256 of values as a JSON file has them, whatever the order of their keys; in hexadecimal."""
    read_again = json.loads(json.dumps(values))  # tuples become lists, keys become text
    return hashlib.sha256(json.dumps(read_again, sort_keys=True).encode()).hexdigest()


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
