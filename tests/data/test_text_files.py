"""Local text: only the column of text matters; a file that cannot be read is named with its cause."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.data.text_files import file_documents, files_matching

gzipped = partial(gzip.compress, mtime=0)
"""Without the time, which would be part of the names of tests."""

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzipped,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def texts(path: Path, column: str = "text") -> list[str]:
    return [document.text for document in file_documents([path], column)]


def refusal(path: Path, column: str = "text") -> str:
    with pytest.raises(UserError) as error:
        texts(path, column)
    message = str(error.value)
    assert str(path) in message
    return message


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        # other columns change their type, appear late, or are absent
        ("a.jsonl", '{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n{"n": [], "text": "c"}', "abc"),
        (
            "a.jsonl",
            '{"n": 1}\n\n{"text": "b", "new": {"a": [1, {}]}}\r\n{"text": null}\n{"text": ""}',
            "b",
        ),
        ("a.jsonl", "\ufeff" + '{"text": "a"}\n', "a"),
        ("a.JSONL", '{"text": "a", "text2": NaN}', "a"),
        ("a.json", '[{"text": "a"},\n {"x": 1, "text": "b"}]', "ab"),
        ("a.json", '["a", "b"]', "ab"),
        ("a.json", '{\n "text": ["a", "b"], "n": [1, 2]\n}', "ab"),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', "ab"),
        ("a.ndjson", '{"text": "a"}\n{"text": "b"}', "ab"),
        ("a.jsonl.1", '{"text": "a"}\n{"text": "b"}', "ab"),
        ("a.tsv", 'n\ttext\n1\ta, b\n2\t"c\td"\n', ["a, b", "c\td"]),
        ("a.csv", 'id, text\n1, "a, b"\n2,  c\n', ["a, b", "c"]),
        ("a.csv", "text, id\n  a, 1\n", ["  a"]),
        ("a.csv", "text,a;b\nx;y,1\n", ["x;y"]),
        ("my.json.notes.txt", "a", "a"),
        ("a.csv.md", "a", "a"),
        ("a.txt", '{"text": "a"}', ['{"text": "a"}']),
        ("a.log", '{"level": "a"}', ['{"level": "a"}']),
        ("a.txt.jsonl", '{"text": "a"}', "a"),
        ("a.csv", 'n,text\n1,a\nx,"b, c\nd"\n,NA\n3,\n4\n5,e,,\n\n', ["a", "b, c\nd", "NA", "e"]),
        ("a.csv", "\ufefftext\n1\n2\n", "12"),
        ("a.txt", "\ufeffa\r\nb\rc", ["a\nb\nc"]),
        ("no_suffix", "a", "a"),
    ],
)
@pytest.mark.case("B5")
def test_only_the_column_of_text_matters(
    name: str, content: str, expected: str | list[str], tmp_path: Path
) -> None:
    plain = written(tmp_path / name, content)
    assert texts(plain) == list(expected)
    for suffix, compress in COMPRESSORS.items():
        assert texts(written(tmp_path / f"{name}{suffix}", compress(content.encode()))) == list(expected)


def test_parquet_with_odd_columns(tmp_path: Path) -> None:
    table = pandas.DataFrame({"n": [[1], None, [2]], "text": ["a", None, "b"], "when": [None] * 3})
    table.to_parquet(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["a", "b"]
    pandas.DataFrame({"text": pandas.Categorical(["a", "b", "a"])}).to_parquet(tmp_path / "b.parquet")
    assert texts(tmp_path / "b.parquet") == ["a", "b", "a"]


def test_rows_without_text_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": null}\n{"n": 1}\n')
    assert texts(path) == ["a"]
    assert f"{path}: 2 of 3 rows have no text in `text`, left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b', ["line 2 is not valid JSON", "may be cut off here"]),
        ("a.jsonl", '{"text": "a"}\n{"text": b}\n', ["line 2 is not valid JSON: Expecting value"]),
        ("a.jsonl", '{"text": "a"}\n[1]\n', ["line 2 is list, not an object"]),
        ("a.jsonl", '{"text": "a', ["not valid JSON", "line 1", "the file may be cut off"]),
        ("a.jsonl", "", ["no text in", "a.jsonl"]),
        ("a.txt", "", ["no text in", "a.txt"]),
        ("a.jsonl.gz", gzipped(b""), ["no text in", "a.jsonl.gz"]),
        ("a.txt", bytes(1000), ["all its bytes are zero"]),
        ("a.jsonl.gz", gzipped(bytes(1000)), ["all its bytes are zero"]),
        ("a.txt", "\u6587\n".encode("utf-16-le"), ["not text in UTF-8; it may be UTF-16"]),
        ("a.txt.gz", gzipped(gzipped(b"text")), ["compressed twice"]),
        ("a.txt.gz", gzipped(b"text")[:2], ["damaged or incomplete"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2", "0xff"]),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}', ["line 2", "U+D83D", "not text in UTF-8"]),
        ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}', ["data.column = 'text'", "line 2", "type list"]),
        ("a.json", "[1, 2]", ["row 1 is int, not an object"]),
        ("a.json", '[{"text": "a"}', ["not valid JSON"]),
        ("a.json", "[" * 100_000, ["not valid JSON"]),
        ("a.csv", "text,n\na, b,1\n", ["line 2 has 3 fields, and the first line 2", "needs quotes"]),
        ("a.csv", 'text,n\n"a,1\n', ["not valid CSV"]),
        ("a.csv", "", ["data.column = 'text'"]),
        ("a.parquet", "", ["damaged, or not Parquet"]),
        ("a.parquet", "PAR1 and no more", ["damaged, or not Parquet"]),
        ("a.jsonl.bak", '{"text": "a"}\n', ["row of JSON with `text`", "ends in .jsonl"]),
        ("a", '\ufeff\n{"text": "a"}\n{"text": "b"}', ["row of JSON with `text`", "in .txt"]),
        ("a.txt", b"ab\xe9c", ["byte 3 (0xe9) is not text in UTF-8"]),
        ("a.txt", "text".encode("utf-16"), ["byte 1 (0xff)", "UTF-16"]),
        ("a.txt", "text".encode("utf-16-le"), ["zero bytes", "UTF-16"]),
        ("a.csv", "text\na".encode("utf-32-be"), ["zero bytes", "UTF-16"]),
        ("a.csv", b"text\n\xe9", ["byte 6 (0xe9)"]),
        ("a.tsv", "text\tn\na\tb\t1\n", ["line 2 has 3 fields", "text with tabs needs quotes"]),
        ("a.csv", "id;text\n1;a", ["data.files", "separated by semicolons"]),
        ("a.csv", '"id";"text"\n1;"a, b"', ["data.files", "separated by semicolons"]),
        ("a.csv", "text;a, b;id\n", ["separated by semicolons"]),
        ("a.csv", "id\ttext\n1\ta", ["separated by tabs"]),
        ("a.csv", "id|text\n1|a", ["separated by vertical bars"]),
        ("a.tsv", "id,text\n1,a", ["separated by commas"]),
        ("a.csv", "text,text\n1,a", ["data.column = 'text'", "2 columns of", "have this name"]),
        ("a.csv", "id, text, text\n1, a, b", ["2 columns of", "have this name"]),
    ],
)
@pytest.mark.case("B5")
def test_unreadable_content_is_named(
    name: str, content: str | bytes, words: list[str], tmp_path: Path
) -> None:
    message = refusal(written(tmp_path / name, content))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_compressed_file_that_is_cut_off(suffix: str, tmp_path: Path) -> None:
    """Also where it ends between two rows, so that every row that is left is valid."""
    rows = "\n".join(json.dumps({"text": f"document {number * 7919}"}) for number in range(500))
    whole = COMPRESSORS[suffix](rows.encode())
    assert "damaged or incomplete" in refusal(
        written(tmp_path / f"a.jsonl{suffix}", whole[: len(whole) // 2])
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_column_that_does_not_exist(name: str, tmp_path: Path) -> None:
    path, table = tmp_path / name, pandas.DataFrame({"body": ["a"], "n": [1]})
    match path.suffix:
        case ".jsonl":
            table.to_json(path, orient="records", lines=True)
        case ".csv":
            table.to_csv(path, index=False)
        case _:
            table.to_parquet(path)
    with pytest.raises(ConfigError, match="body, n") as error:
        texts(path, "bdy")
    assert (error.value.field, error.value.nearest) == ("data.column", "body")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a", "a.tar"])
@pytest.mark.parametrize("suffix", ["", *COMPRESSORS])
def test_archives_are_refused(name: str, suffix: str, tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(written(tmp_path / "text", "a"), "text")
    compress = COMPRESSORS.get(suffix, bytes)
    assert "a tar archive; extract its files" in refusal(
        written(tmp_path / f"{name}{suffix}", compress(content.getvalue()))
    )


def test_a_zip_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        archive.writestr("a.jsonl", '{"text": "a"}')
    assert "a zip archive; extract its files" in refusal(tmp_path / "a.jsonl.zip")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("asked", ["meta.text", "meat"])
def test_the_nearest_column_is_one_of_text(asked: str, suffix: str, tmp_path: Path) -> None:
    path, table = tmp_path / f"a{suffix}", pandas.DataFrame({"meta": [{"text": "a"}], "metal": ["b"]})
    table["meat0"] = 1
    match suffix:
        case ".jsonl":
            table.to_json(path, orient="records", lines=True)
        case _:
            table.to_parquet(path)
    with pytest.raises(ConfigError, match="meta, metal, meat0") as error:
        texts(path, asked)
    assert error.value.nearest == "metal"
    assert ("columns inside it are not read" in str(error.value)) == (asked == "meta.text")


def test_the_nearest_column_can_be_typed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{" text": "a", "the;text": "b"}\n')
    with pytest.raises(ConfigError) as error:
        texts(path, "text")
    assert error.value.nearest == '"the;text"'


def test_parquet_with_two_columns_of_the_name(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert "2 columns of" in refusal(tmp_path / "a.parquet")


@pytest.mark.case("B17")
def test_files_are_found_once_and_by_their_names(tmp_path: Path) -> None:
    for name in ("a.txt", "a,b=[1].txt", "b1.txt", "c*.txt", "cd.txt"):
        written(tmp_path / name, name)
    assert files_matching([f"{tmp_path}/a,b=[1].txt"]) == [tmp_path / "a,b=[1].txt"]
    assert files_matching([f"{tmp_path}/c*.txt"]) == [tmp_path / "c*.txt"]
    assert len(files_matching([f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"])) == 5
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "same.txt").symlink_to(tmp_path / "a.txt")
    assert len(files_matching([f"{tmp_path}/**/*.txt"])) == 5


def test_paths_that_name_no_file(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {
        str(tmp_path): "it is a folder",
        str(tmp_path / "loop"): "a link to nothing, or to itself",
        str(tmp_path / "[1]" / "*.txt"): r"write \[\[\] for the character",
        str(tmp_path / ("x" * 300)): "name too long",
        str(tmp_path / "none"): "a path or glob pattern that matches files",
    }
    for pattern, words in cases.items():
        with pytest.raises(ConfigError, match=words) as error:
            files_matching([pattern])
        assert error.value.field == "data.files"
