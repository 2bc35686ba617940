"""Local files of text: text files, and tables with a column of text."""

import csv
import glob
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from sae_lora.common.console import count, say
from sae_lora.common.errors import ConfigError, UserError, listed
from sae_lora.common.files import sha256
from sae_lora.data.documents import Document, is_text, no_column, row_text

Row = dict[str, Any]
_Rows = Iterator[tuple[str, Row]]
"""Places such as `line 3` or `row 3`, and rows with at least the column of text if the file has it."""


def files_matching(patterns: Sequence[Any]) -> list[Path]:
    """The files that the paths or glob patterns name, in a fixed order, each once.

    A path that exists is taken as it is, also with characters of patterns in its name.

    Raises:
        ConfigError: If a pattern matches no file.
    """
    files: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
        except OSError as error:  # no access to the folder, or a name that is too long
            because = f"{path}: {error.strerror}"
            raise ConfigError("data.files", pattern, _ALLOWED, because=because) from error
        if is_folder:
            nearest = f"{str(pattern).rstrip('/')}/*"
            raise ConfigError("data.files", pattern, _ALLOWED, nearest, because="it is a folder")
        matches = [str(path)] if is_file else glob.glob(str(path), recursive=True)  # noqa: PTH207 patterns may be absolute
        names = [Path(name) for name in sorted(matches, reverse=True)]
        # By their real paths, since a link to a folder above repeats its files again and again.
        matching = {name.resolve(): name for name in names if name.is_file()}
        if not matching:
            raise ConfigError("data.files", pattern, _ALLOWED, because=_why_nothing_matches(path))
        files = matching | files
    return sorted(files.values())


def _why_nothing_matches(path: Path) -> str | None:
    if path.is_symlink():
        return "it is a link to nothing, or to itself"
    if "[" in str(path):
        return "[…] stands for one of the characters in it; write [[] for the character ["
    return None


_ALLOWED = "a path or glob pattern that matches files"


def content_digests(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file.

    Raises:
        UserError: If a file cannot be read.
    """
    digests = []
    for file in files:
        try:
            digests.append(sha256(file))
        except OSError as error:
            raise _unreadable(file, error.strerror) from error
    return digests


def file_documents(files: Sequence[Path], column: str) -> Iterator[Document]:
    """One document per text file, or per row of .jsonl, .ndjson, .json, .csv, .tsv and .parquet files.

    The last suffix tells the kind of a file, apart from suffixes of compressions and numbers of parts.
    Files may be compressed by gzip, zstd, bzip2 or xz; archives of files are refused. Only the column of
    text is read, so that other columns may have any content. Rows without text are left out, and counted
    in a note. The key of a document is the text itself, so that copies of a text are in the same split.

    Raises:
        UserError: If a file cannot be read or has no such column of text, or no file has text.
    """
    has_text = False
    for file in files:
        content = _content(file)
        if reader := _READERS.get(_kind(file)):
            documents = _row_documents(reader(file, content, column), file, column)
        else:
            _check_plain(file, content, column)
            text = _decoded(file, content).replace("\r\n", "\n").replace("\r", "\n")
            documents = iter([Document(text, text)])
        for document in documents:
            has_text = has_text or bool(document.text)
            yield document
    if not has_text:
        raise UserError(f"data.files: there is no text in {listed(map(str, files))}")


def _kind(file: Path) -> str:
    """The last suffix, in lower case, that is neither of a compression nor the number of a part."""
    suffixes = map(str.lower, file.suffixes)
    kinds = [name for name in suffixes if name not in _COMPRESSED and not name[1:].isdigit()]
    return kinds[-1] if kinds else ""


def _unreadable(file: Path, cause: object) -> UserError:
    return UserError(f"data.files = {str(file)!r} cannot be read: {cause}")


def _row_documents(rows: _Rows, file: Path, column: str) -> Iterator[Document]:
    source = f"data.files = {str(file)!r}"
    columns: dict[str, bool] = {}
    total = empty = 0
    has_column = False
    for place, row in rows:
        total += 1
        if not has_column:  # the first rows of .jsonl may lack it
            columns |= {name: columns.get(name, True) and is_text(row[name]) for name in row}
            has_column = column in row
        text = row_text(row.get(column), column, f"{place} of {source}")
        if text:
            yield Document(text, text)
        else:
            empty += 1
    if total and not has_column:
        raise no_column(column, source, columns)
    if empty:
        say(f"note: {file}: {empty:,} of {count(total, 'row')} have no text in `{column}`, left out")


def _content(file: Path) -> bytes:
    """The content of a file, decompressed. Its first bytes tell the compression, not its name.

    Raises:
        UserError: If the file cannot be read, or holds other files.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error.strerror) from error
    for magic, decompressed in _COMPRESSIONS.items():
        if re.match(magic, content):
            try:
                content = decompressed(content)
                break
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise _unreadable(file, f"it is damaged or incomplete: {error}") from error
    if any(re.match(magic, content) for magic in _COMPRESSIONS):
        raise _unreadable(file, "it is compressed twice; decompress it once")
    if content and not content.strip(b"\0"):
        raise _unreadable(file, "all its bytes are zero, as after a crash or on a full disk")
    for magic, archive in _ARCHIVES.items():
        if re.match(magic, content, re.DOTALL):
            raise _unreadable(file, f"it is {archive}; extract its files, and name them")
    return content


def _from_gzip(content: bytes) -> bytes:
    import gzip

    return gzip.decompress(content)


def _from_zstd(content: bytes) -> bytes:
    import zstandard

    parts = []
    try:
        while content:
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(content))
            if not frame.eof:
                raise EOFError("the compressed data ends too early")
            content = frame.unused_data
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return b"".join(parts)


def _from_bzip2(content: bytes) -> bytes:
    import bz2

    return bz2.decompress(content)


def _from_xz(content: bytes) -> bytes:
    import lzma

    try:
        return lzma.decompress(content)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from error


_COMPRESSIONS: dict[bytes, Callable[[bytes], bytes]] = {
    rb"\x1f\x8b": _from_gzip,
    rb"\x28\xb5\x2f\xfd": _from_zstd,
    rb"BZh\d(1AY&SY|\x17rE8P\x90)": _from_bzip2,
    rb"\xfd7zXZ\x00": _from_xz,
}
"""The first bytes of a compressed file, and its decompression."""
_COMPRESSED = {".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz"}
"""Suffixes of compressed files."""
_ARCHIVES = {
    rb"PK(\x03\x04|\x05\x06)": "a zip archive",
    rb".{257}ustar": "a tar archive",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
    rb"Rar!\x1a\x07": "a rar archive",
}
"""The first bytes of a file that holds other files, and its kind."""


def _decoded(file: Path, content: bytes) -> str:
    """The content as text, without a byte order mark."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        is_wide = content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content
        advice = "; it may be UTF-16" if is_wide else ""
        byte = error.object[error.start]
        cause = f"byte {error.start + 1:,} ({byte:#04x}) is not text in UTF-8{advice}"
        raise _unreadable(file, cause) from error
    if 10 * text.count("\0") > len(text):
        raise _unreadable(file, "much of it is zero bytes; it may be UTF-16 without a byte order mark")
    return text


def _json_rows(file: Path, content: bytes, column: str) -> _Rows:
    """Rows of JSON lines, or of one JSON value: a list, an object of lists, or a single row."""
    lines = enumerate(io.BytesIO(content.removeprefix(b"\xef\xbb\xbf")), 1)
    filled = ((number, line) for number, line in lines if line.strip())
    first = next(filled, None)
    if first is None:
        return
    if not _is_row(first[1]):
        yield from _rows_of_value(file, content, column)
        return
    for number, line in chain([first], filled):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            cut = "" if line.endswith(b"\n") else "; the file may be cut off here"
            cause = f"line {number:,} is not valid JSON: {_json_cause(error)}{cut}"
            raise _unreadable(file, cause) from error
        yield f"line {number:,}", _checked_row(file, row, f"line {number:,}")


def _is_row(line: bytes) -> bool:
    """True if the line is a JSON object by itself."""
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _check_plain(file: Path, content: bytes, column: str) -> None:
    """Refuse rows of JSON in a file whose name tells neither that it is a table nor that it is text."""
    line = content.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0]
    if _kind(file) != ".txt" and _is_row(line) and column in json.loads(line.decode()):
        cause = f"its first line is a row of JSON with `{column}`"
        raise _unreadable(file, f"{cause}; a table's name ends in .jsonl, and that of text in .txt")


def _json_cause(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError) and error.lineno == 1:
        return f"{error.msg} at character {error.colno:,}"
    return str(error)


def _rows_of_value(file: Path, content: bytes, column: str) -> _Rows:
    try:
        value = json.loads(_decoded(file, content))
    except (ValueError, RecursionError) as error:
        cut = "" if content.rstrip().endswith((b"}", b"]")) else "; the file may be cut off"
        raise _unreadable(file, f"not valid JSON: {error}{cut}") from error
    if isinstance(value, dict) and isinstance(value.get(column), list):
        value = [{column: entry} for entry in value[column]]
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        place = f"row {number:,}"
        yield place, {"text": row} if isinstance(row, str) else _checked_row(file, row, place)


def _checked_row(file: Path, row: object, place: str) -> Row:
    if not isinstance(row, dict):
        raise _unreadable(
            file, f'{place} is {type(row).__name__}, not an object such as {{"text": "…"}}'
        )
    return row


_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


def _delimited_rows(file: Path, content: bytes, column: str, separator: str) -> _Rows:
    """Rows of a table whose first line names the columns.

    Spaces after the separators are part of names and texts, except if the column is only found without
    them: such a table is written with a space after each separator.
    """
    csv.field_size_limit(sys.maxsize)  # documents may be long
    text = _decoded(file, content)
    _check_separator(file, text, column, separator)

    def reader(*, with_spaces: bool) -> Any:  # the type has no public name
        source = io.StringIO(text, newline="")
        return csv.reader(source, delimiter=separator, skipinitialspace=with_spaces, strict=True)

    lines = reader(with_spaces=False)
    try:
        names: list[str] = next(filter(None, lines), [])
        if column not in names:
            lines = reader(with_spaces=True)
            names = [name.strip() for name in next(filter(None, lines), [])]
        _check_named_once(column, file, dict.fromkeys(names, True), names)
        index = names.index(column)
        for line in lines:
            place = f"line {lines.line_num:,}"
            if any(line[len(names) :]):
                cause = f"{place} has {len(line)} fields, and the first line {len(names)}"
                raise _unreadable(file, f"{cause}; text with {_SEPARATORS[separator]} needs quotes")
            if line:
                yield place, {column: line[index] if index < len(line) else None}
    except csv.Error as error:
        raise _unreadable(file, f"line {lines.line_num:,} is not valid CSV: {error}") from error


def _check_separator(file: Path, text: str, column: str, separator: str) -> None:
    """Refuse a table whose first line has another separator."""
    header = next(filter(str.strip, io.StringIO(text)), "")
    names = {mark: [name.strip(' \r\n"') for name in header.split(mark)] for mark in _SEPARATORS}
    for mark, word in _SEPARATORS.items():
        is_asked = column in names[mark] and column not in names[separator]
        if len(names[mark]) > 1 and (is_asked or len(names[separator]) == 1):
            because = f"the columns in its first line are separated by {word}"
            allowed = "a .csv file with commas, or a .tsv file with tabs"
            raise ConfigError("data.files", str(file), allowed, because=because)


def _check_named_once(column: str, file: Path, columns: dict[str, bool], names: Sequence[str]) -> None:
    """Refuse a table that has no such column, or several.

    Args:
        column: The column of text.
        file: The table.
        columns: Names of its columns; true for those that may hold text.
        names: The names in order, also repeated ones.
    """
    source = f"data.files = {str(file)!r}"
    if column not in columns:
        raise no_column(column, source, columns)
    if names.count(column) > 1:
        because = f"{names.count(column)} columns of {source} have this name"
        raise ConfigError("data.column", column, "a name that one column has", because=because)


def _parquet_rows(file: Path, content: bytes, column: str) -> _Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(io.BytesIO(content))
        schema = table.schema_arrow
        may_be_text = {field.name: _may_be_text(field.type) for field in schema}
        _check_named_once(column, file, may_be_text, schema.names)
        batches = (batch.column(0).to_pylist() for batch in table.iter_batches(columns=[column]))
        for number, value in enumerate(chain.from_iterable(batches), 1):
            yield f"row {number:,}", {column: value}
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, f"it is damaged, or not Parquet: {error}") from error


def _may_be_text(kind: Any) -> bool:
    """True for types of pyarrow whose values can be read as text."""
    from pyarrow import types

    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_dictionary)
    return any(test(kind) for test in tests)


_READERS: dict[str, Callable[[Path, bytes, str], _Rows]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": partial(_delimited_rows, separator=","),
    ".tsv": partial(_delimited_rows, separator="\t"),
    ".parquet": _parquet_rows,
}
