"""Text: full sequences with the right special tokens, disjoint splits, a correct cache."""

import dataclasses
import gzip
import json
import signal
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import zstandard
from transformers import PreTrainedTokenizerFast

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import TextSource
from sae_lora.config.schema import DataConfig
from sae_lora.data import corpus, packing
from sae_lora.data.documents import Document, in_validation, shuffled, stdlib_documents
from sae_lora.data.packing import Convention, Packer, convention_of, tokenised
from scripts.embedded.language_model import BOS, EOS, train_tokenizer

TEXTS = [f"document {number} speaks of {number * 7} things and of nothing else" for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[DataConfig]:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    yield DataConfig(
        source=TextSource.text_files,
        files=str(folder / "*.txt"),
        context_length=16,
        validation_tokens=16 * 5,
        cache_dir=str(tmp_path / "cache"),
    )


def test_packing_drops_only_the_last_few_tokens() -> None:
    documents = [list(range(10 * n, 10 * n + n)) for n in range(1, 9)]
    packer = Packer(5, Convention(bos=1000, separator=2000), most=None)
    for document in documents:
        packer.add(document)
    rows = packer.sequences
    assert rows.shape[1] == 5
    assert (rows[:, 0] == 1000).all()
    stream = [token for document in documents for token in [*document, 2000]]
    assert rows[:, 1:].flatten().tolist() == stream[: len(rows) * 4]
    assert len(stream) - len(rows) * 4 < 4


def test_conventions(tokenizer: PreTrainedTokenizerFast) -> None:
    bos, eos = tokenizer.convert_tokens_to_ids([BOS, EOS])
    assert convention_of(tokenizer) == Convention(bos, eos)
    plain = train_tokenizer(TEXTS, 300)
    plain._tokenizer.post_processor = None
    assert convention_of(plain) == Convention(None, eos)


@pytest.mark.parametrize(
    ("documents", "words", "few", "notes"),
    [(200, 40_000, "1 document,", 1), (400, 300, "", 0)],  # a document fills all sequences, or some
)
def test_held_out_tokens_of_few_long_documents_are_noted(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    documents: int,
    words: int,
    few: str,
    notes: int,
) -> None:
    rows = [f"{number} " + "things and nothing else " * (words // 4) for number in range(documents)]
    file = Path(config.files).parent / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    config = dataclasses.replace(config, files=str(file), validation_tokens=9_600)
    planned = corpus.check(config, tokenizer, 20, 1, 300)
    for _ in range(2):  # the second time from the cache
        text = corpus.load(config, tokenizer, train_sequences=20)
        assert len(text.notes) == notes and all(few in note for note in text.notes)
        assert text.notes == planned
    (recipe,) = Path(config.cache_dir).glob("corpora/*/recipe.json")
    older = json.loads(recipe.read_text())
    assert older.pop("validation_documents") == text.description["validation_documents"]
    recipe.write_text(json.dumps(older))
    assert corpus.load(config, tokenizer, train_sequences=20).notes == []


def test_sequences_decode_to_the_text(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    text = corpus.load(config, tokenizer, train_sequences=20)
    assert text.train.shape == (20, 16)
    assert text.validation.shape == (5, 16)
    joined = tokenizer.decode(text.train[:, 1:].flatten())
    pieces = [piece for piece in joined.split(EOS) if piece][:-1]
    assert pieces
    assert set(pieces) <= set(TEXTS)
    assert set(text.special_ids) == set(tokenizer.convert_tokens_to_ids([BOS, EOS]))


def test_splits_are_disjoint_by_document(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    everything = dataclasses.replace(config, repeat=True)
    text = corpus.load(everything, tokenizer, train_sequences=10_000)

    def contained(rows: np.ndarray) -> set[str]:
        return set(tokenizer.decode(rows[:, 1:].flatten()).split(EOS)[1:-1])

    train, validation = contained(text.train), contained(text.validation)
    assert train and validation
    assert not train & validation
    assert all(not in_validation(document, config.validation_share) for document in train)


def test_the_split_does_not_depend_on_seed_or_amount() -> None:
    held_out = [text for text in TEXTS if in_validation(text, 0.1)]
    assert 5 < len(held_out) < 40
    assert [text for text in TEXTS if in_validation(text, 0.2)] != held_out
    assert set(held_out) <= {text for text in TEXTS if in_validation(text, 0.2)}


def test_cached_by_content(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = corpus.load(config, tokenizer, 20)
    calls = []
    original = corpus._packed
    monkeypatch.setattr(corpus, "_packed", lambda *arguments: calls.append(1) or original(*arguments))
    again = corpus.load(config, tokenizer, 20)
    assert not calls
    assert np.array_equal(first.train, again.train)
    for change in ({"seed": 1}, {"context_length": 12}, {"validation_share": 0.3}):
        corpus.load(dataclasses.replace(config, **change), tokenizer, 20)
    assert len(calls) == 3
    changed = Path(str(config.files)).parent / "0.txt"
    changed.write_text("something else entirely")
    corpus.load(config, tokenizer, 20)
    assert len(calls) == 4


@pytest.mark.parametrize("damaged", ["train.npy", "validation.npy", "recipe.json", "missing"])
def test_a_damaged_entry_of_the_cache_is_made_again(
    damaged: str, config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = corpus.load(config, tokenizer, 20)
    train, entry = np.array(first.train), first.description["corpus"]
    folder = tmp_path / "cache" / "corpora" / entry
    if damaged == "missing":
        (folder / "train.npy").unlink()
    else:
        content = (folder / damaged).read_bytes()
        (folder / damaged).write_bytes(content[: len(content) // 2])
    again = corpus.load(config, tokenizer, 20)
    assert np.array_equal(again.train, train)
    assert again.description == first.description


def test_a_full_disk_is_named(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("1000 requested and 0 written")  # numpy's error if the disk is full

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write to .*the disk may be full"):
        corpus.load(config, tokenizer, 20)
    monkeypatch.undo()
    assert len(corpus.load(config, tokenizer, 20).train) == 20


@pytest.mark.parametrize(
    ("changes", "sequences", "field"),
    [
        ({"repeat": False}, 100_000, "train.train_tokens"),
        ({"repeat": True, "validation_tokens": 10**6}, 20, "data.validation_tokens"),
        ({"repeat": True, "files": "{folder}/0.txt"}, 20, "too few documents"),
        ({"files": "{folder}/bad.jsonl"}, 20, "line 2 is not valid JSON"),
        ({"files": "{folder}/none.txt"}, 20, "data.files"),
        ({"column": "n", "files": "{folder}/late.jsonl", "repeat": True}, 1, "line 201"),
    ],
)
def test_a_dry_run_refuses_what_the_launch_refuses(
    changes: dict[str, object],
    sequences: int,
    field: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "texts"
    corpus.check(config, tokenizer, 20, 1, 300)
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b')
    rows = [{"n": text} for text in TEXTS] + [{"n": 3}]  # a fault after more text than is needed
    (folder / "late.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if "files" in changes:
        changes = changes | {"files": str(changes["files"]).format(folder=folder)}
    changed = dataclasses.replace(config, **changes)
    messages = []
    for refuse in (
        lambda: corpus.check(changed, tokenizer, sequences, 1, 300),
        lambda: corpus.load(changed, tokenizer, sequences, 1, vocabulary=300),
    ):
        assert not (tmp_path / "cache").exists()
        with pytest.raises(UserError, match=field) as error:
            refuse()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_too_little_text(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"data\.repeat=true") as error:
        corpus.load(config, tokenizer, 100_000)
    assert error.value.field == "train.train_tokens"
    nearest = error.value.nearest
    assert isinstance(nearest, int)
    assert corpus.load(config, tokenizer, nearest // 16).train.shape == (nearest // 16, 16)
    text = corpus.load(dataclasses.replace(config, repeat=True), tokenizer, 100_000)
    assert text.description["passes"] > 1
    with pytest.raises(ConfigError) as error:
        corpus.load(dataclasses.replace(config, validation_tokens=10**6), tokenizer, 20)
    assert error.value.field == "data.validation_tokens"
    assert isinstance(error.value.nearest, int)
    corpus.load(dataclasses.replace(config, validation_tokens=error.value.nearest), tokenizer, 20)


def test_every_pass_takes_every_sequence_once(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = corpus.load(config, tokenizer, 24)
    batches = list(islice(text.batches(batch_size=4, seed=3), 12))
    rows = [tuple(row.tolist()) for batch in batches for row in batch]
    expected = sorted(tuple(row.tolist()) for row in text.train)
    assert sorted(rows[:24]) == expected
    assert sorted(rows[24:]) == expected
    assert rows[:24] != rows[24:]
    repeated = list(islice(text.batches(batch_size=4, seed=3), 12))
    assert all((batch == again).all() for batch, again in zip(batches, repeated, strict=True))
    other_seed = next(text.batches(batch_size=4, seed=4))
    assert not (other_seed == batches[0]).all()


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_tables_give_the_same_text_as_files(
    ending: str, config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = "\n".join(json.dumps({"body": text}) for text in TEXTS).encode()
    path = tmp_path / f"table{ending}"
    match ending:
        case ".jsonl":
            path.write_bytes(lines)
        case ".jsonl.zst":
            path.write_bytes(zstandard.compress(lines))
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case _:
            import pandas

            pandas.DataFrame({"body": TEXTS}).to_parquet(path)
    table = dataclasses.replace(config, files=[str(path)], column="body")
    assert np.array_equal(
        corpus.load(table, tokenizer, 20).train, corpus.load(config, tokenizer, 20).train
    )
    with pytest.raises(ConfigError) as error:
        corpus.load(dataclasses.replace(table, column="bdy"), tokenizer, 20)
    assert error.value.nearest == "body"


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        (
            "files",
            "{folder}/book.txt",
            UserError,
            "too few documents",
        ),  # a single document cannot be split
        ("files", "/no/such/*.txt", ConfigError, r"data\.files"),
        ("cache_dir", "{folder}/book.txt/cache", UserError, r"data\.cache_dir"),
    ],
)
def test_messages_name_unreadable_and_unwritable_paths(
    key: str,
    value: str,
    error: type[UserError],
    message: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    (tmp_path / "book.txt").write_text("a long story " * 500)
    changed = dataclasses.replace(config, **{key: value.format(folder=tmp_path)})
    with pytest.raises(error, match=message):
        corpus.load(changed, tokenizer, 20)


def test_rows_without_text(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"body": text, "n": 1} for text in TEXTS]
    path = tmp_path / "table.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [{"body": None, "n": 1}, *rows]))
    table = dataclasses.replace(config, files=str(path), column="body")
    assert np.array_equal(
        corpus.load(table, tokenizer, 20).train, corpus.load(config, tokenizer, 20).train
    )
    with pytest.raises(ConfigError, match="a column of text"):
        corpus.load(dataclasses.replace(table, column="n"), tokenizer, 20)


def test_the_standard_library_has_enough_text() -> None:
    documents = stdlib_documents()
    assert sum(len(document.text) for document in documents) > 3_000_000
    keys = [document.key for document in documents]
    assert len(set(keys)) == len(keys)
    assert "json/encoder.py" in keys
    assert not any(key.startswith(("test/", "encodings/", "site-packages/")) for key in keys)
    held_out = [document for document in documents if in_validation(document.key, 0.1)]
    assert sum(len(document.text) for document in held_out) > 200_000


def test_the_tests_of_the_library_are_separate() -> None:
    library = {document.key for document in stdlib_documents()}
    tests = {document.key for document in stdlib_documents(tests=True)}
    assert not library & tests
    assert all({"test", "tests"} & set(key.split("/")) for key in tests)
    assert not any({"test", "tests"} & set(key.split("/")) for key in library)
    assert not any("site-packages" in key for key in library | tests)


def test_the_order_depends_only_on_the_seed() -> None:
    documents = [Document(str(number), "") for number in range(50)]
    assert list(shuffled(documents, 1)) == list(shuffled(reversed(documents), 1))
    assert list(shuffled(documents, 1)) != list(shuffled(documents, 2))


def test_tokenised_is_lazy(tokenizer: PreTrainedTokenizerFast) -> None:
    taken = []

    def endless() -> Iterator[Document]:
        while True:
            taken.append(1)
            yield Document("x", "a text")

    next(tokenised(endless(), tokenizer))
    assert len(taken) < 100


def test_calls_of_the_tokenizer_hold_a_limited_number_of_characters(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        packing.PlainText, "__call__", lambda self, texts: calls.append(sum(map(len, texts))) or texts
    )
    sizes = [10_000] * 400 + [3_000_000] * 3
    documents = [Document(str(number), "x" * size) for number, size in enumerate(sizes)]
    assert [document for document, _ in tokenised(documents, tokenizer)] == documents
    assert sum(calls) == sum(sizes)
    assert max(calls[:-3]) <= 2**20
    assert calls[-3:] == [3_000_000] * 3


def test_ctrl_c_is_heard_while_the_tokenizer_works(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_ended, waits = threading.Event(), []
    monkeypatch.setattr(packing.PlainText, "__call__", lambda self, texts: has_ended.wait(60))
    monkeypatch.setattr(packing, "_WAITING_S", 0.01)

    def press() -> None:
        waits.append(1)
        if len(waits) == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background processes
    try:
        with pytest.raises(KeyboardInterrupt):
            next(tokenised([Document("x", "a text")], tokenizer, press))
    finally:
        signal.signal(signal.SIGINT, before)
    has_ended.set()
    assert len(waits) == 3
