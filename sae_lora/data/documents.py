"""Sources of text, as iterators of `Document`s, and the split into training and validation."""

import hashlib
import os
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sae_lora.common import hub
from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name
from sae_lora.config.schema import DataConfig
from sae_lora.config.serialize import written


class Document(NamedTuple):
    """A text, and the key that determines its split: documents with equal keys are in the same split."""

    key: str
    text: str


def in_validation(key: str, share: float) -> bool:
    """True if the document with this key is held out, which is true for this share of all documents.

    The split depends only on key and share, not on the order of reading, the seed or the amount of text.
    A run never trains on text that another run with the same data and share validates on.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


# Missing on some machines (Linux distributions package them separately), generated, or tables.
_STDLIB_LEFT_OUT = {
    *("idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"),
    *("site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "config"),
}
_STDLIB_TESTS = {"test", "tests"}
_STDLIB_TABLES = {"html/entities.py", "stringprep.py", "turtle.py"}
_STDLIB_MAX_BYTES = 400_000
_STDLIB_MAX_NON_ASCII = 0.005


@cache
def stdlib_documents(*, tests: bool = False) -> tuple[Document, ...]:
    """The source files of the Python standard library, the default text.

    Every machine with Python has them. The key is the path relative to the library, so that the split is
    stable between Python versions, whose texts differ a little.

    Args:
        tests: Read the tests of the library instead. Not every machine has them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        # `config-3.11-x86_64-linux-gnu` counts as `config`.
        subfolders[:] = [
            name for name in subfolders if not {name, name.split("-")[0]} & _STDLIB_LEFT_OUT
        ]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    documents = []
    for path in sorted(paths):
        relative = path.relative_to(root)
        if tests != bool(_STDLIB_TESTS.intersection(relative.parts[:-1])):
            continue
        name = relative.as_posix()
        if name in _STDLIB_TABLES or relative.name.startswith("_sysconfigdata"):
            continue
        if not 200 < path.stat().st_size < _STDLIB_MAX_BYTES:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) - len(text.encode("ascii", "ignore")) > _STDLIB_MAX_NON_ASCII * len(text):
            continue
        documents.append(Document(name, text))
    return tuple(documents)


def shuffled(documents: Iterable[Document], seed: int) -> Iterator[Document]:
    """The documents in an order that depends only on the seed and their keys."""
    ordered = sorted(documents, key=lambda document: document.key)
    random.Random(seed).shuffle(ordered)
    yield from ordered


def check_hub_name(name: str) -> None:
    """Refuse a name that no data set on the hub can have, and the name of a local folder.

    `datasets` would read a folder of this name in place of the data set on the hub.

    Raises:
        ConfigError: For such a name.
    """
    allowed = "a data set on the hub, such as org/name; local files with data=text_files data.files=…"
    if Path(name).is_dir():
        raise ConfigError("data.name", name, allowed, because=f"{name} is a folder on this machine")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError("data.name", name, allowed) from error


def hub_documents(config: DataConfig) -> Iterator[Document]:
    """The rows of a Hugging Face data set, shuffled with the config's seed.

    For a stream, the shards and a buffer of rows are shuffled; for a downloaded data set, all rows. Rows
    without text are left out.

    Raises:
        UserError: If the data set cannot be found, fetched or read.
    """
    import datasets  # slow to import, and most runs do not need it

    assert config.name is not None
    datasets.utils.logging.disable_progress_bar()
    with _library_errors(config):
        rows = datasets.load_dataset(
            config.name,
            config.subset,
            split=config.split,
            revision=config.revision,
            streaming=config.streaming,
        )
        buffer = {"buffer_size": config.shuffle_buffer} if config.streaming else {}
        iterator = iter(rows.shuffle(seed=config.seed, **buffer))  # pyright: ignore[reportArgumentType]
    source = f"data.name = {config.name!r}"
    while True:
        with _library_errors(config):
            row: Any = next(iterator, None)
        if row is None:
            return
        if config.column not in row:
            raise no_column(config.column, source, {name: is_text(row[name]) for name in row})
        if text := row_text(row[config.column], config.column, source):
            yield Document(text, text)


_NAMES = {
    r"BuilderConfig '.*' not found\. Available: (\[.*\])": "data.subset",
    r"(?s)Config name is missing.*available configs: (\[.*?\])": "data.subset",
    r"Bad split: .*\. Available splits: (\[.*\])": "data.split",
    r"Unknown split .*\. Should be one of (\[.*\])": "data.split",
}
"""Errors of the library `datasets` with a list of names, and the key that has another name."""


@contextmanager
def _library_errors(config: DataConfig) -> Iterator[None]:
    """Turn errors of the library `datasets` in the block, which calls only it, into one message."""
    assert config.name is not None
    try:
        with hub.explained("data.name", config.name):
            yield
    except UserError:
        raise
    except Exception as error:  # its readers raise errors of many libraries
        for pattern, key in _NAMES.items():
            if match := re.search(pattern, str(error)):
                names = re.findall(r"'([^']*)'", match[1])
                asked = config.subset if key == "data.subset" else config.split
                allowed = f"one of {config.name}'s: {listed(names)}"
                raise ConfigError(key, asked, allowed, nearest_name(asked or "", names)) from error
        cause = [*str(error).splitlines(), ""][0]
        message = f"data.name = {config.name!r} cannot be read: {type(error).__name__}: {cause}"
        raise UserError(message) from error


def no_column(column: str, source: str, columns: Mapping[str, bool]) -> ConfigError:
    """The error for a table without the column of text.

    Args:
        column: The column that was asked for.
        source: The key and value that name the table.
        columns: The names of the columns; true for those that may hold text.
    """
    allowed = f"a column of {source}: {listed(columns)}"
    # Hydra drops spaces around a name, so that the message would repeat itself.
    names = [name for name, may_be_text in columns.items() if may_be_text and name == name.strip()]
    nearest = nearest_name(column, names)
    outer = column.partition(".")[0]
    because = None
    if outer != column and not columns.get(outer, True):
        because = f"`{outer}` holds no text, and columns inside it are not read"
    return ConfigError("data.column", column, allowed, nearest and written(nearest), because)


def is_text(value: object) -> bool:
    """True for text, and for a row without text."""
    return isinstance(value, str | None)


def row_text(value: object, column: str, place: str) -> str | None:
    """The text of a row; `None` or empty if the row has none.

    Raises:
        ConfigError: If the value is not text.
    """
    if not isinstance(value, str | None):
        allowed = f"a column of text; in {place} it has type {type(value).__name__}"
        raise ConfigError("data.column", column, allowed)
    if value is not None:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place} has half a character (U+{ord(value[error.start]):04X}) at position "
                f"{error.start + 1:,} of `{column}`, which is not text in UTF-8"
            ) from error
    return value
