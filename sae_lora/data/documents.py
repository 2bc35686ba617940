"""Sources of text, as iterators of `Document`s, and the split into training and validation."""

import glob
import hashlib
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sae_lora.common import hub
from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name
from sae_lora.config.schema import DataConfig


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


def files_matching(patterns: Sequence[str]) -> list[Path]:
    """The files that the paths or glob patterns name, in a fixed order.

    Raises:
        ConfigError: If a pattern matches no file.
    """
    files: set[Path] = set()
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        matches = map(Path, glob.glob(expanded, recursive=True))  # noqa: PTH207 patterns may be absolute
        matching = {path for path in matches if path.is_file()}
        if not matching:
            folder = f"{pattern.rstrip('/')}/*" if Path(expanded).is_dir() else None
            raise ConfigError("data.files", pattern, "a path or glob pattern that matches files", folder)
        files |= matching
    return sorted(files)


_TABULAR = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def file_documents(files: Sequence[Path], column: str) -> Iterator[Document]:
    """One document per text file, or per row of .jsonl (also .zst, .gz), .parquet and .csv files.

    The key is the text itself, so that copies of a text are in the same split.

    Raises:
        UserError: If a file cannot be read or lacks the column.
    """
    for file in files:
        kinds = [_TABULAR[suffix] for suffix in file.suffixes if suffix in _TABULAR]
        if kinds:
            import datasets  # slow to import, and most runs do not need it

            rows = datasets.load_dataset(kinds[-1], data_files=str(file), split="train", streaming=True)
            yield from _rows(rows, column, f"data.files = {str(file)!r}")  # pyright: ignore[reportArgumentType]
        else:
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"data.files = {str(file)!r} cannot be read as text: {error}") from error
            yield Document(text, text)


def hub_documents(config: DataConfig) -> Iterator[Document]:
    """The rows of a Hugging Face data set, shuffled with the config's seed.

    For a stream, the shards and a buffer of rows are shuffled; for a downloaded data set, all rows.

    Raises:
        UserError: If the data set cannot be found, fetched or read.
    """
    import datasets  # slow to import, and most runs do not need it

    assert config.name is not None
    datasets.utils.logging.disable_progress_bar()
    with hub.explained("data.name", config.name):
        rows = datasets.load_dataset(
            config.name,
            config.subset,
            split=config.split,
            revision=config.revision,
            streaming=config.streaming,
        )
        buffer = {"buffer_size": config.shuffle_buffer} if config.streaming else {}
        rows = rows.shuffle(seed=config.seed, **buffer)  # pyright: ignore[reportArgumentType]
        yield from _rows(rows, config.column, f"data.name = {config.name!r}")  # pyright: ignore[reportArgumentType]


def _rows(rows: Iterable[dict[str, object]], column: str, source: str) -> Iterator[Document]:
    for row in rows:
        if column not in row:
            raise ConfigError(
                "data.column", column, f"a column of {source}: {listed(row)}", nearest_name(column, row)
            )
        text = row[column]
        if not isinstance(text, str | None):
            raise ConfigError(
                "data.column", column, f"a column of text; in {source} it has type {type(text).__name__}"
            )
        if text:
            yield Document(text, text)
