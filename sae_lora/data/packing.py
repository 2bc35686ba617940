"""Conversion of documents to full token sequences, with the BOS convention of the model."""

import json
import logging
import re
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, wait
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.data.documents import Document

_CHARACTERS = 2**8
"""Characters in the first call of the tokenizer: few, because a short run needs little text."""
_MOST_CHARACTERS = 2**20
"""Largest number of characters in one call of the tokenizer, about a second; a longer document has its
own call."""
_WAITING_S = 1.0
_Result = TypeVar("_Result")


class Convention(NamedTuple):
    """The special tokens in text for a model family, as token ids."""

    bos: int | None
    """Token at the start of every sequence; `None` if the model uses no BOS."""
    separator: int | None
    """Token after every document; `None` joins documents without a separator."""


def convention_of(tokenizer: PreTrainedTokenizerBase, bos: bool | str = "auto") -> Convention:
    """The convention of a run.

    Args:
        tokenizer: The model's. EOS separates documents if it has one.
        bos: `data.bos`. auto: sequences start with BOS if the tokenizer begins an encoded text with it
            (Gemma, Llama), and without it otherwise (GPT-2, Pythia). True: they start with BOS, or with
            EOS if the tokenizer has no BOS (Qwen).

    Raises:
        ConfigError: If sequences are to start with BOS, and the tokenizer has neither BOS nor EOS.
    """
    begin = cast(int | None, tokenizer.bos_token_id)
    eos = cast(int | None, tokenizer.eos_token_id)
    if bos == "auto":
        begins_with_bos = begin is not None and tokenizer("a").input_ids[:1] == [begin]
        return Convention(begin if begins_with_bos else None, eos)
    if not bos:
        return Convention(None, eos)
    begin = eos if begin is None else begin
    if begin is None:
        allowed = "auto or false with this tokenizer, which has neither a BOS nor an EOS token"
        raise ConfigError("data.bos", "true", allowed, nearest="auto")
    return Convention(begin, eos)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a vocabulary.

    transformers makes up such a tokenizer for some kinds of models (GPT-2, GPT-NeoX, Gemma) if the
    repository has no tokenizer files. It reads every text as empty or unknown.

    Raises:
        UserError: If all tokens are special.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        name = tokenizer.name_or_path or "the model"
        raise UserError(
            f"{name} has no tokenizer: only {len(tokenizer)} special tokens were found. Add "
            "the tokenizer that the model was trained with: tokenizer.save_pretrained(…)"
        )


def check_tokens(largest: int, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> None:
    """Refuse a token that the model lacks.

    Args:
        largest: The largest token id.
        tokenizer: The tokenizer that gave it.
        vocabulary: Number of token ids that the model has; `None` checks nothing.

    Raises:
        UserError: If the model lacks it.
    """
    if vocabulary is not None and largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} does not fit the model: it gives token {largest} "
            f"({token!r}), and the model has tokens 0 to {vocabulary - 1} (vocab_size={vocabulary}). "
            "Use the tokenizer that the model was trained with, or a model with a larger embedding "
            "(resize_token_embeddings of transformers)"
        )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of BOS and EOS, sorted, if the tokenizer has them."""
    ids = [cast(int | None, tokenizer.bos_token_id), cast(int | None, tokenizer.eos_token_id)]
    return tuple(sorted({id for id in ids if id is not None}))


class PlainText:
    """A tokenizer that reads every text as text.

    A text that spells a special token, such as `<|endoftext|>` or `<bos>`, gets the tokens of these
    characters, not the special token. Added tokens that are not special (runs of spaces in Pythia, line
    breaks in Gemma) belong to the vocabulary of texts and are kept. So is a special token that is also a
    word or a single character of the vocabulary, such as ` the` as padding: texts have it where they
    have it without its special role.

    Args:
        tokenizer: The model's. It is not changed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        special = {id for id, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self._special = special - {None}
        roles = {cast(int | None, tokenizer.bos_token_id), cast(int | None, tokenizer.eos_token_id)}
        self._unknown = {cast(int | None, tokenizer.unk_token_id)} - roles
        """The token for characters that the tokenizer does not know, which any text may have."""

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens.

        Raises:
            UserError: If the tokenizer has no other tokens for a special token that a text spells.
        """
        # No warnings about texts longer than the model's context: `Packer` cuts them into sequences.
        logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
        encoded = self._tokenizer(texts, add_special_tokens=False).input_ids
        return [
            self._without_special(text) if self._finds_special(text, ids) else ids
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _finds_special(self, text: str, ids: list[int]) -> bool:
        """True if the tokenizer has found a special token in the text, which gave it these ids."""
        inside = self._special.intersection(ids)
        return bool(inside - self._unknown) or bool(inside and str(self._tokenizer.unk_token) in text)

    def _without_special(self, text: str) -> list[int]:
        """Token ids of a text in which the tokenizer finds special tokens."""
        if self._backend is None:
            ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        else:
            # `encode` would keep the interpreter for itself, so that no signal is heard.
            ids = self._backend.encode_batch([text], add_special_tokens=False)[0].ids
        for id in self._special.intersection(ids) - self._unknown:
            token = str(self._tokenizer.convert_ids_to_tokens(id))
            if _MARKUP.fullmatch(token):
                raise UserError(
                    f"the tokenizer of the model reads a part of a text as its special token {token!r}, "
                    f"and has no other tokens for it; remove it from the text: …{_around(text, token)}…"
                )
        return ids

    @cached_property
    def _backend(self) -> Tokenizer | None:
        """A copy of a fast tokenizer that finds no special token in a text; `None` for one in Python."""
        backend: Tokenizer | None = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        content = _without(self._special, json.loads(backend.to_str()))
        return Tokenizer.from_str(json.dumps(content))


def _without(special: Collection[int], tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a tokenizer, changed so that no text contains its special tokens. All ids stay.

    The tokens get names that no text contains. A token of the vocabulary that is a word or a single
    character keeps its name, because texts need it, and is no added token, which would be found inside
    other words too.
    """
    model = tokenizer["model"]
    vocabulary = model["vocab"]  # ids by token, or pairs of token and score in the order of ids
    is_mapping = isinstance(vocabulary, dict)
    ids = vocabulary if is_mapping else {token: id for id, (token, _) in enumerate(vocabulary)}
    inside = {token for token, id in ids.items() if id in special}
    words = {token for token in inside if len(token) == 1} | inside & _words(model)
    hidden = {token: f"{token}{_NOWHERE}" for token in inside - words}

    def name(token: str) -> str:
        return hidden.get(token, token)

    model["vocab"] = (
        {name(token): id for token, id in vocabulary.items()}
        if is_mapping
        else [[name(token), score] for token, score in vocabulary]
    )
    if model.get("unk_token") is not None:
        model["unk_token"] = name(model["unk_token"])
    if "merges" in model:
        model["merges"] = [
            merge for merge in model["merges"] if hidden.keys().isdisjoint(_tokens_of(merge, model))
        ]
    added = [
        token | {"content": f"{token['content']}{_NOWHERE}", "normalized": False}
        if token["id"] in special
        else token
        for token in tokenizer["added_tokens"]
        if token["content"] not in words
    ]
    unused = dict.fromkeys(("post_processor", "truncation", "padding"))
    return tokenizer | {"added_tokens": added} | unused


_NOWHERE = f"\0{uuid.uuid4()}"
"""End of the names that no text contains: a random one, since a text may contain any fixed one."""
_MARKUP = re.compile(r"[<\[{|].*\w.*[>\]}|]", re.DOTALL)
"""Special tokens that are made to stand outside of text, such as `<s>` and `[PAD]`."""


def _words(model: dict[str, Any]) -> set[str]:
    """The words of the vocabulary: what the model of a tokenizer makes of text, without markup."""
    vocabulary = model["vocab"]
    if "merges" in model:
        learned = {_tokens_of(merge, model)[-1] for merge in model["merges"]}
    elif isinstance(vocabulary, dict):
        learned = set(vocabulary)
    else:  # pieces with scores: control symbols have the score 0, and others a log probability
        learned = {token for token, score in vocabulary if score < 0}
    return {token for token in learned if not _MARKUP.fullmatch(token)}


def _tokens_of(merge: str | list[str], model: dict[str, Any]) -> tuple[str, str, str]:
    """The two tokens of a merge, which old files write as one text, and the token that it makes."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    prefix = model.get("continuing_subword_prefix") or ""
    return first, second, first + second.removeprefix(prefix)


def _around(text: str, part: str, characters: int = 20) -> str:
    """The first occurrence of a part of a text, with the characters around it."""
    place = max(0, text.find(part))
    return text[max(0, place - characters) : place + len(part) + characters]


def tokenised(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    on_wait: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its token ids, without special tokens; a batch of documents at a time.

    A document is never cut before it is tokenised, since its tokens may depend on all of its text: one
    of 50 MB takes most of a minute. Signals are handled meanwhile.

    Args:
        documents: The text.
        tokenizer: The model's.
        on_wait: Called about once a second while the tokenizer works.

    Raises:
        UserError: If the tokenizer cannot read a special token that a document spells as text.
    """
    plain_text = PlainText(tokenizer)
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        yield from zip(batch, _in_thread(lambda: plain_text(texts), on_wait), strict=True)  # noqa: B023 called at once


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Batches of documents, each with a limited number of characters or a single document."""
    batch: list[Document] = []
    characters, most = 0, _CHARACTERS
    for document in documents:
        if batch and characters + len(document.text) > most:
            yield batch
            batch, characters, most = [], 0, min(2 * most, _MOST_CHARACTERS)
        batch.append(document)
        characters += len(document.text)
    if batch:
        yield batch


def _in_thread(call: Callable[[], _Result], on_wait: Callable[[], object]) -> _Result:
    """The result of a call in another thread, while this thread handles signals.

    An exception that a signal raises here does not stop the other thread, but the end of the process
    does.
    """
    result: Future[_Result] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:  # raised again in the thread that waits
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # a pool would wait for it at the end
    while wait([result], _WAITING_S).not_done:
        on_wait()
    return result.result()


class Packer:
    """Cut documents into full sequences; tokens at the end that do not fill a sequence are dropped.

    Args:
        context_length: Tokens per sequence, including BOS.
        convention: The special tokens to insert.
        most: Largest number of sequences; `None` for no limit.
    """

    def __init__(self, context_length: int, convention: Convention, most: int | None) -> None:
        self._length = context_length
        self._most = most
        self._head = [] if convention.bos is None else [convention.bos]
        self._tail = [] if convention.separator is None else [convention.separator]
        self._pending: list[int] = []
        self._sequences: list[np.ndarray] = []
        self.largest = max(self._head + self._tail, default=0)
        """The largest token id of BOS, the separator and all sequences so far."""
        self.documents = 0
        """Number of documents that were added before it was full."""

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def full(self) -> bool:
        """True if the largest number of sequences is reached."""
        return self._most is not None and len(self) >= self._most

    def add(self, tokens: list[int]) -> None:
        """Add a document, given its token ids without special tokens."""
        self.documents += not self.full
        self._pending += tokens + self._tail
        size = self._length - len(self._head)
        start = 0
        while len(self._pending) - start >= size and not self.full:
            sequence = self._head + self._pending[start : start + size]
            largest = max(sequence)
            self.largest = max(self.largest, largest)
            # The smaller type if it holds the tokens; `np.array` of several sequences widens it.
            dtype = np.uint16 if largest < 2**16 else np.int32
            self._sequences.append(np.array(sequence, dtype=dtype))
            start += size
        del self._pending[:start]

    @property
    def sequences(self) -> np.ndarray:
        """The sequences so far, `[sequence, pos]`."""
        if not self._sequences:
            return np.empty((0, self._length), dtype=np.uint16)
        return np.array(self._sequences)


def shuffled_batches(
    sequences: np.ndarray, batch_size: int, seed: int, first: int = 0
) -> Iterator[Tensor]:
    """Endless batches `[batch, pos]` of the sequences; each pass over them has a different order.

    Args:
        sequences: Token ids `[sequence, pos]`.
        batch_size: Sequences per batch; a batch may begin in one pass and end in the next.
        seed: Seed of the orders.
        first: Index of the first batch to yield; earlier batches are skipped without reading them.
    """
    rng = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    for number in count():
        while len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(len(sequences))])
        rows, order = order[:batch_size], order[batch_size:]
        if number >= first:
            yield torch.from_numpy(sequences[rows].astype(np.int64))
