"""Text is text: no document becomes a special token, whatever the tokenizer; BOS as `data.bos` asks."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    ByT5Tokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import TextSource
from sae_lora.config.identity import identity
from sae_lora.config.schema import DataConfig
from sae_lora.data import corpus
from sae_lora.data.packing import Convention, Packer, PlainText, convention_of
from scripts.embedded.language_model import BOS, EOS, train_tokenizer
from tests.support.composing import with_values

TEXTS = [f"document {number} speaks of {number * 7} things, and of nothing else" for number in range(60)]
MARKUP = "<|im_start|>"


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXTS, 300)
    stripping = AddedToken("<pad>", special=True, lstrip=True, rstrip=True)
    tokenizer.add_special_tokens({"pad_token": stripping, "additional_special_tokens": [MARKUP]})
    tokenizer.add_tokens(["  ", "\n\n"])
    return tokenizer


def with_undeclared_eos() -> PreTrainedTokenizerFast:
    """As in models whose files list the end of a chat's turn, their EOS, as an ordinary added token."""
    content = json.loads(train_tokenizer(TEXTS, 300).backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)


def normalised() -> PreTrainedTokenizerFast:
    """Special tokens that are found in lower-cased text."""
    tokenizer = train_tokenizer(TEXTS, 300)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([AddedToken("<END>", normalized=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token="<END>")


def unigram() -> PreTrainedTokenizerFast:
    """As from sentencepiece: the control symbols are pieces of the vocabulary."""
    letters = sorted(set("".join(TEXTS) + "<s>/|pad_im") - {" "})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((x, -3.0) for x in letters)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


SPELLED = {
    byte_level: [BOS, EOS, MARKUP, "<pad>"],
    with_undeclared_eos: [BOS, EOS],
    normalised: [BOS, "<END>", "<end>"],
    unigram: ["<s>", "</s>", "<unk>"],
    ByT5Tokenizer: ["</s>", "<pad>", "<extra_id_3>"],
}


@pytest.mark.parametrize(
    ("make", "spelled"), [(make, word) for make, words in SPELLED.items() for word in words]
)
@pytest.mark.case("A7")
def test_text_that_spells_a_special_token_is_text(make: type, spelled: str) -> None:
    tokenizer: PreTrainedTokenizerBase = make()
    special = set(tokenizer.all_special_ids)
    text = f"speaks of {spelled} and of  nothing\n\nelse"
    assert special & set(tokenizer(text, add_special_tokens=False).input_ids)
    (ids,) = PlainText(tokenizer)([text])
    assert not (special - {tokenizer.unk_token_id}) & set(ids)
    read = tokenizer.decode(ids)
    assert spelled.lower() in read.lower() or tokenizer.unk_token_id in ids
    # The tokens of the text around it are what they are without it.
    before, after = (PlainText(tokenizer)([part])[0] for part in ("speaks of", "nothing\n\nelse"))
    assert ids[: len(before)] == before
    assert ids[-len(after) + 2 :] == after[2:]


@pytest.mark.parametrize("make", SPELLED)
def test_text_without_special_tokens_has_the_tokens_of_the_tokenizer(make: type) -> None:
    tokenizer: PreTrainedTokenizerBase = make()
    texts = [*TEXTS, "  two spaces,\n\ntwo lines", "1 < 2", "<|not a token|>"]
    expected = tokenizer(texts, add_special_tokens=False).input_ids
    assert PlainText(tokenizer)(texts) == expected


def test_added_tokens_that_are_not_special_stay_tokens_of_text() -> None:
    """Pythia's runs of spaces and Gemma's line breaks, also in a text that spells a special token."""
    tokenizer = byte_level()
    added = tokenizer.convert_tokens_to_ids(["  ", "\n\n"])
    for text in ("a  b\n\nc", f"a  b\n\nc{EOS}"):
        (ids,) = PlainText(tokenizer)([text])
        assert [id for id in ids if id in added] == added


def test_a_special_token_that_text_cannot_spell_otherwise() -> None:
    words = {"[UNK]": 0, "</s>": 1, "and": 2, "go": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")
    assert PlainText(tokenizer)(["go and go"]) == [[3, 2, 3]]
    assert PlainText(tokenizer)(["go </s>", "unknown words"]) == [[3, 0], [0, 0]]

    class Letters(ByT5Tokenizer):
        """A tokenizer in Python that knows no other way to write EOS."""

        def _tokenize(self, text: str, **_: object) -> list[str]:
            return text.split()

    with pytest.raises(UserError, match=r"its special token '</s>'.*remove it from the text"):
        PlainText(Letters())(["a </s> b"])


def test_a_special_character_stays_a_character() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens({"pad_token": "!"})
    (ids,) = PlainText(tokenizer)([f"wait!{EOS}!"])
    assert tokenizer.decode(ids) == f"wait!{EOS}!"


def bpe_with_markup() -> PreTrainedTokenizerFast:
    """Learned from texts with the markup, split only at spaces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    backend.train_from_iterator(["the other <eos>", "then<eos> the<eos>"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def word_pieces() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "the", "other", "##r", "then", "<", ">", "/", "eos", "n", "o"]
    pieces = models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]")
    backend = Tokenizer(pieces)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def pieces_with_words() -> PreTrainedTokenizerFast:
    letters = sorted(set("the other then <eos>") - {" "})
    pieces = [("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize("role", ["pad_token", "eos_token"])
@pytest.mark.parametrize(
    ("make", "word"),
    [
        *((byte_level, word) for word in ("Ġof", "ng")),
        *((bpe_with_markup, "▁the"), (word_pieces, "the"), (pieces_with_words, "▁the")),
    ],
)
@pytest.mark.case("A7")
def test_a_special_token_that_is_a_word_stays_a_word(make: type, word: str, role: str) -> None:
    """Text has the tokens that it has without the special role, also inside other words."""
    texts = [*TEXTS[:5], "the other then", f"a {word} b{word}c", "ng othering of\n thingsof"]
    plain = PlainText(make())(texts)
    tokenizer: PreTrainedTokenizerBase = make()
    assert word in tokenizer.get_vocab()
    setattr(tokenizer, role, word)
    assert PlainText(tokenizer)(texts) == plain


@pytest.mark.case("A7")
def test_markup_that_merges_make_is_no_special_token_in_text() -> None:
    text = "then <eos> other<eos>"
    tokenizer = bpe_with_markup()
    plain = tokenizer(text, add_special_tokens=False).input_ids
    assert set(plain) & set(tokenizer.convert_tokens_to_ids(["<eos>", "▁<eos>"]))
    tokenizer.eos_token, tokenizer.pad_token = "<eos>", "▁<eos>"
    special = set(tokenizer.all_special_ids)
    (ids,) = PlainText(tokenizer)([text])
    tokens, expected = map(tokenizer.convert_ids_to_tokens, (ids, plain))
    assert "".join(tokens) == "".join(expected) and not special & set(ids)


@pytest.mark.parametrize("text", [f"\0{BOS}\0", f"a\0{EOS}", f"{BOS}\0"])
@pytest.mark.case("A7")
def test_zero_characters_around_a_special_token(text: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    (ids,) = PlainText(tokenizer)([text])
    assert tokenizer.decode(ids) == text


def test_the_corpus_has_special_tokens_only_where_it_inserts_them(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(f"{EOS}{text}{BOS}")
    config = data(tmp_path, files=f"{tmp_path}/*.txt")
    rows = corpus.load(config, tokenizer, 40).train
    bos, eos = tokenizer.convert_tokens_to_ids([BOS, EOS])
    assert (rows[:, 0] == bos).all() and not (rows[:, 1:] == bos).any()
    documents = tokenizer.decode(rows[:, 1:].flatten()).split(f"{BOS}{EOS}{EOS}")
    assert set(documents[1:-1]) <= set(TEXTS)
    assert (rows == eos).sum() < rows.size / 20


def data(folder: Path, **values: object) -> DataConfig:
    return dataclasses.replace(
        DataConfig(
            source=TextSource.text_files,
            context_length=16,
            validation_tokens=32,
            cache_dir=str(folder / "cache"),
        ),
        **values,
    )


@pytest.mark.parametrize(
    ("tokens", "bos", "expected"),
    [
        ((BOS, EOS), "auto", BOS),
        ((BOS, EOS), True, BOS),
        ((BOS, EOS), False, None),
        ((None, EOS), "auto", None),
        ((None, EOS), True, EOS),
        ((None, None), "auto", None),
        ((None, None), False, None),
    ],
)
@pytest.mark.case("A6")
def test_bos(tokens: tuple[str | None, str | None], bos: bool | str, expected: str | None) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.bos_token, tokenizer.eos_token = tokens
    assert tokenizer.convert_ids_to_tokens(convention_of(tokenizer, bos).bos or 0) == (expected or BOS)
    assert (convention_of(tokenizer, bos).bos is None) == (expected is None)


def test_bos_needs_a_token() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a BOS nor an EOS") as error:
        convention_of(tokenizer, True)
    assert (error.value.field, error.value.nearest) == ("data.bos", "auto")


def test_bos_of_the_corpus_and_of_the_hash(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    tokenizer = train_tokenizer(TEXTS, 300)
    loaded = {
        bos: corpus.load(data(tmp_path, files=f"{tmp_path}/rows.jsonl", bos=bos), tokenizer, 30)
        for bos in ("auto", True, False)
    }
    assert np.array_equal(loaded["auto"].train, loaded[True].train)
    with_bos, without = (loaded[bos].train for bos in (True, False))
    assert (with_bos[:, 0] == tokenizer.bos_token_id).all()
    assert not (without == tokenizer.bos_token_id).any()
    assert with_bos[:, 1:].flatten()[:300].tolist() == without.flatten()[:300].tolist()
    assert [loaded[bos].description["bos"] for bos in loaded] == [True, True, False]
    assert loaded[True].description["begins_with"] == BOS
    hashes = {identity(with_values(f"data.bos={bos}")) for bos in ("true", "false", "auto")}
    assert len(hashes) == 3 and identity(with_values()) in hashes
    for wrong, nearest in (("yes please", "auto"), ("2", "auto")):
        with pytest.raises(ConfigError) as error:
            with_values(f"data.bos={wrong}")
        assert (error.value.field, error.value.nearest) == ("data.bos", nearest)


@pytest.mark.case("B4")
def test_a_token_that_the_model_lacks(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    config = data(tmp_path, files=f"{tmp_path}/*.txt")
    largest = int(corpus.load(config, tokenizer, 20, vocabulary=300).train.max())
    fits = corpus.load(config, tokenizer, 20, vocabulary=largest + 1)
    assert fits.train.max() == largest
    for again in (False, True):  # while it is packed, and from the cache
        changed = dataclasses.replace(config, cache_dir=str(tmp_path / "other")) if again else config
        with pytest.raises(UserError, match=rf"token {largest} .*vocab_size={largest}"):
            corpus.load(changed, tokenizer, 20, vocabulary=largest)


@pytest.mark.case("B4")
def test_a_dry_run_looks_for_tokens_that_the_model_lacks_in_all_text_that_is_needed(
    tmp_path: Path,
) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_tokens("<|new|>")
    for number, text in enumerate([*TEXTS, "the last <|new|> one"]):
        (tmp_path / f"{number}.txt").write_text(text)
    config = data(tmp_path, files=f"{tmp_path}/*.txt", repeat=True)
    corpus.check(config, tokenizer, 1, 1, 300)
    assert corpus.load(config, tokenizer, 1, vocabulary=300).train.max() < 300
    for refuse in (
        lambda: corpus.check(config, tokenizer, 10_000, 1, 300),
        lambda: corpus.load(config, tokenizer, 10_000, vocabulary=300),
    ):
        with pytest.raises(UserError, match=r"gives token 300 \('<\|new\|>'\)"):
            refuse()


@pytest.mark.parametrize("make", [GPT2Tokenizer, GemmaTokenizer])
def test_a_tokenizer_that_transformers_made_up_without_files(make: type, tmp_path: Path) -> None:
    for refuse in (
        lambda: corpus.load(data(tmp_path, files="x"), make(), 1),
        lambda: corpus.check(data(tmp_path, files="x"), make(), 1, 1, 300),
    ):
        with pytest.raises(UserError, match=r"has no tokenizer: only \d special tokens"):
            refuse()


@pytest.mark.case("B4")
def test_token_ids_beyond_16_bits_of_a_short_tokenizer() -> None:
    packer = Packer(4, Convention(bos=None, separator=None), most=None)
    packer.add([1, 2, 3, 4])
    assert packer.sequences.dtype == np.uint16
    packer.add([70_000, 65_536, 65_535, 0])
    assert packer.sequences.tolist() == [[1, 2, 3, 4], [70_000, 65_536, 65_535, 0]]
    assert packer.largest == 70_000
