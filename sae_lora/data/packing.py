"""Conversion of documents to full token sequences, with the BOS convention of the model."""

import logging
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sae_lora.data.documents import Document

_MOST_PER_CALL = 64
"""Largest number of documents in one call of the tokenizer."""


class Convention(NamedTuple):
    """The special tokens in text for a model family, as token ids."""

    bos: int | None
    """Token at the start of every sequence; `None` if the model uses no BOS."""
    separator: int | None
    """Token after every document; `None` joins documents without a separator."""


def convention_of(tokenizer: PreTrainedTokenizerBase) -> Convention:
    """The convention of the tokenizer.

    If the tokenizer begins an encoded text with BOS (Gemma, Llama), every sequence starts with BOS; else
    (GPT-2, Pythia) none does. EOS separates documents if it exists.
    """
    bos = cast(int | None, tokenizer.bos_token_id)
    eos = cast(int | None, tokenizer.eos_token_id)
    begins_with_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return Convention(bos if begins_with_bos else None, eos)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of BOS and EOS, sorted, if the tokenizer has them."""
    ids = [cast(int | None, tokenizer.bos_token_id), cast(int | None, tokenizer.eos_token_id)]
    return tuple(sorted({id for id in ids if id is not None}))


def tokenised(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its token ids, without special tokens; a batch of documents at a time."""
    # No warnings about texts longer than the model's context: `Packer` cuts them into sequences.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    documents = iter(documents)
    per_call = 4  # few at first, because a short run needs few documents
    while batch := list(islice(documents, per_call)):
        texts = [document.text for document in batch]
        yield from zip(batch, tokenizer(texts, add_special_tokens=False).input_ids, strict=True)
        per_call = min(2 * per_call, _MOST_PER_CALL)


class Packer:
    """Cut documents into full sequences; tokens at the end that do not fill a sequence are dropped.

    Args:
        context_length: Tokens per sequence, including BOS.
        convention: The special tokens to insert.
        vocabulary: Number of token ids; determines the dtype.
        most: Largest number of sequences; `None` for no limit.
    """

    def __init__(
        self, context_length: int, convention: Convention, vocabulary: int, most: int | None
    ) -> None:
        self._length = context_length
        self._most = most
        self._head = [] if convention.bos is None else [convention.bos]
        self._tail = [] if convention.separator is None else [convention.separator]
        self._dtype = np.uint16 if vocabulary <= 2**16 else np.int32
        self._pending: list[int] = []
        self._sequences: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def full(self) -> bool:
        """True if the largest number of sequences is reached."""
        return self._most is not None and len(self) >= self._most

    def add(self, tokens: list[int]) -> None:
        """Add a document, given its token ids without special tokens."""
        self._pending += tokens + self._tail
        size = self._length - len(self._head)
        start = 0
        while len(self._pending) - start >= size and not self.full:
            sequence = self._head + self._pending[start : start + size]
            self._sequences.append(np.array(sequence, dtype=self._dtype))
            start += size
        del self._pending[:start]

    @property
    def sequences(self) -> np.ndarray:
        """The sequences so far, `[sequence, pos]`."""
        return np.array(self._sequences, dtype=self._dtype).reshape(-1, self._length)


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
