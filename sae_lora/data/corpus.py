"""Training and validation sequences of a run, tokenised once and cached by content."""

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sae_lora.common import hub
from sae_lora.common.console import count
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.files import check_readable, check_writable, write_atomically
from sae_lora.config.enums import TextSource
from sae_lora.config.schema import DataConfig, as_list
from sae_lora.data import corpus_cache
from sae_lora.data.documents import (
    Document,
    hub_documents,
    in_validation,
    shuffled,
    stdlib_documents,
)
from sae_lora.data.packing import (
    Convention,
    Packer,
    check_tokens,
    check_vocabulary,
    convention_of,
    shuffled_batches,
    special_ids,
    tokenised,
)
from sae_lora.data.text_files import content_digests, file_documents, files_matching

Progress = Callable[[int, int], object]
"""Called with the number of sequences so far and in total while a corpus is tokenised."""
_MANY = 16
"""Held-out documents that are enough, whatever their length."""
_LONG = 8192
"""Tokens of a document that is long."""
_FORMAT = 3
"""Version of the cached sequences: a new one where a text gives other sequences than before."""


@dataclass(frozen=True)
class Corpus:
    """Packed training and validation sequences; no document is in both splits."""

    train: np.ndarray
    """Token ids `[sequence, pos]`."""
    validation: np.ndarray
    """Token ids `[sequence, pos]`."""
    special_ids: tuple[int, ...]
    """Ids of BOS and EOS."""
    description: dict[str, Any]
    """Source and version of the text, for `summary.json`."""

    @property
    def notes(self) -> list[str]:
        """A note if the held-out tokens are of few and long documents, such as chapters.

        Not for the included text, which a user does not change.
        """
        documents = self.description["validation_documents"]
        if documents is None or self.description["source"] == TextSource.stdlib.name:
            return []
        return _few_documents(documents, self.validation.size)

    def batches(self, batch_size: int, seed: int, first: int = 0) -> Iterator[Tensor]:
        """Endless training batches `[batch, pos]`; the arguments are those of `shuffled_batches`."""
        return shuffled_batches(self.train, batch_size, seed, first)

    @property
    def validation_tokens(self) -> Tensor:
        """The held-out sequences `[sequence, pos]` as a tensor."""
        return torch.from_numpy(self.validation.astype(np.int64))


def load(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    train_sequences: int,
    batch_size: int = 1,
    on_progress: Progress = lambda done, total: None,
    vocabulary: int | None = None,
) -> Corpus:
    """The corpus that the config describes, from the cache if possible.

    Args:
        config: The text, and how it is cut.
        tokenizer: The model's.
        train_sequences: Training sequences that the run needs.
        batch_size: Sequences per step; error messages suggest numbers of tokens in whole steps.
        on_progress: Called with the number of sequences so far and in total.
        vocabulary: Number of token ids that the model has; `None` does not check the tokens.

    Raises:
        ConfigError: If the text is too short for the config, or the tokenizer has no token for
            `data.bos=true`.
        UserError: If the text cannot be read, has changed since the run was planned, or has a token that
            the model lacks.
    """
    check_vocabulary(tokenizer)
    convention = convention_of(tokenizer, config.bos)
    source, documents = _source(config)
    if config.version not in (None, version_of(source)):
        raise UserError(
            f"the text ({config.source.name}) has changed since this run was planned (files, or for "
            "stdlib the Python version); use another sweep=… to start again with the present text"
        )
    recipe = _recipe(config, source, tokenizer, convention, train_sequences)
    key = _digest(json.dumps(recipe, sort_keys=True))
    folder = _cache(config, "corpora") / key
    sequences = corpus_cache.read(folder)
    if sequences is None:
        check_writable(folder.parent, "data.cache_dir")  # before the work, which may take an hour
        most = recipe["train_sequences"], recipe["validation_sequences"]
        train, validation = _packed(
            config, tokenizer, documents, convention, most, on_progress, vocabulary
        )
        sequences = corpus_cache.write(folder, recipe, train, validation)
    check_tokens(sequences.largest_token, tokenizer, vocabulary)
    train, validation = sequences.train, sequences.validation
    _check_length(config, len(train), len(validation), train_sequences, batch_size)
    begin = None if convention.bos is None else tokenizer.convert_ids_to_tokens(convention.bos)
    return Corpus(
        train=train,
        validation=validation,
        special_ids=special_ids(tokenizer),
        description=source
        | {
            "corpus": key,
            "context_length": config.context_length,
            "bos": convention.bos is not None,
            "begins_with": begin,
            "training_sequences": len(train),
            "validation_sequences": len(validation),
            "validation_documents": sequences.validation_documents,
            "passes": round(train_sequences / len(train), 3),
        },
    )


_CHECKED_TOKENS = 2**19
"""Largest number of tokens of each split that `check` makes."""
_CHECKED_BYTES = 2**26
"""Largest size of all files together that `check` reads to the end."""


def check(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    train_sequences: int,
    batch_size: int,
    vocabulary: int,
) -> list[str]:
    """Refuse local text that `load` would refuse, in seconds and without writing anything.

    What this does not find: faults of text on the hub; tokens that the model lacks after the first 512k
    tokens of each split; too little text if more than 512k tokens are needed. Files of more than 64 MB
    together are read in another order, and not to their end.

    Args:
        config: The text, and how it is cut.
        tokenizer: The model's; `None` only reads the text.
        train_sequences: Training sequences that the run needs.
        batch_size: Sequences per step.
        vocabulary: Number of token ids that the model has.

    Returns:
        The notes that the corpus will have.

    Raises:
        UserError: As `load` does.
    """
    convention = None
    if tokenizer is not None:
        check_vocabulary(tokenizer)
        convention = convention_of(tokenizer, config.bos)
    if config.source is TextSource.hub:
        return []
    files = files_matching(as_list(config.files)) if config.source is TextSource.text_files else []
    for file in files:
        check_readable(file, "data.files")
    documents = file_documents(files, config.column) if files else iter(stdlib_documents())
    is_small = sum(file.stat().st_size for file in files) <= _CHECKED_BYTES
    if is_small:
        documents = shuffled(documents, config.seed)  # in the order of `load`; this reads all
    if tokenizer is not None and convention is not None:
        most = _CHECKED_TOKENS // config.context_length
        needed = train_sequences, config.validation_tokens // config.context_length
        train, validation = _packed(
            config,
            tokenizer,
            documents,
            convention,
            (min(needed[0], most), min(needed[1], most)),
            vocabulary=vocabulary,
        )
        lengths = (
            needed[0] if train.full else len(train),
            needed[1] if validation.full else len(validation),
        )
        _check_length(config, *lengths, train_sequences, batch_size)
        if files and is_small:
            return _few_documents(validation.documents, validation.sequences.size)
    elif is_small:
        deque(documents, maxlen=0)
    return []


def _recipe(
    config: DataConfig,
    source: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    convention: Convention,
    train_sequences: int,
) -> dict[str, Any]:
    """Everything that the sequences depend on."""
    return {
        "format": _FORMAT,
        "source": source,
        "tokenizer": _fingerprint(tokenizer),
        "convention": convention._asdict(),
        "context_length": config.context_length,
        "validation_share": config.validation_share,
        "seed": config.seed,
        "train_sequences": train_sequences,
        "validation_sequences": config.validation_tokens // config.context_length,
    }


def first_held_out(config: DataConfig, corpus: str) -> list[int]:
    """Tokens of the first held-out sequence; empty if the corpus is no longer in the cache.

    Args:
        config: The text.
        corpus: Name of the corpus in the cache: `corpus` of its description.
    """
    file = Path(config.cache_dir).expanduser() / "corpora" / corpus / "validation.npy"
    return np.load(file, mmap_mode="r")[0].tolist() if file.is_file() else []


def _few_documents(documents: int, tokens: int) -> list[str]:
    """A note if so many held-out tokens are of so few documents that these are long."""
    if documents >= min(_MANY, tokens / _LONG):
        return []
    return [
        f"the {tokens:,} held-out tokens are of {count(documents, 'document')}, and say little "
        "about other text; cut long documents into smaller files or rows"
    ]


def version_of(description: dict[str, Any]) -> str:
    """The part of a corpus description that changes if the text changes: a commit or a hash."""
    return description["revision"] if "revision" in description else description["content"]


def _cache(config: DataConfig, kind: str) -> Path:
    """The cache folder for this kind of entry."""
    return Path(config.cache_dir).expanduser() / kind


def _source(config: DataConfig) -> tuple[dict[str, Any], Iterator[Document]]:
    """The description of the text, and an iterator over its documents in order."""
    match config.source:
        case TextSource.stdlib:
            library = stdlib_documents()
            texts = [f"{document.key}\n{_digest(document.text)}" for document in library]
            description = {"source": "stdlib", "content": _digest("\n".join(texts))}
            return description, shuffled(library, config.seed)
        case TextSource.text_files:
            files = files_matching(as_list(config.files))
            description = {
                "source": "text_files",
                "files": len(files),
                "column": config.column,
                "content": _digest("\n".join(content_digests(files))),
            }
            return description, shuffled(file_documents(files, config.column), config.seed)
        case TextSource.hub:
            description = {
                "source": "hub",
                "name": config.name,
                "subset": config.subset,
                "split": config.split,
                "column": config.column,
                "revision": config.version or _dataset_commit(config),
                "shuffle_buffer": config.shuffle_buffer if config.streaming else None,
            }
            at_commit = dataclasses.replace(config, revision=description["revision"])
            return description, hub_documents(at_commit)


def _dataset_commit(config: DataConfig) -> str:
    """The current commit of the data set; without a network, the commit of the last run."""
    assert config.name is not None
    cached = _cache(config, "revisions") / _digest(f"{config.name}@{config.revision}")
    try:
        commit = hub.dataset_commit(config.name, config.revision)
    except hub.UnreachableError:
        if not cached.exists():
            raise
        return cached.read_text()
    if not cached.exists() or cached.read_text() != commit:
        check_writable(cached.parent, "data.cache_dir")
        write_atomically(cached, commit)
    return commit


def _packed(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterator[Document],
    convention: Convention,
    most: tuple[int, int],
    on_progress: Progress = lambda done, total: None,
    vocabulary: int | None = None,
) -> tuple[Packer, Packer]:
    """Training and held-out sequences: documents are read until both are full or the text ends.

    `most` are the largest numbers of sequences.
    """
    check_tokens(max((id for id in convention if id is not None), default=0), tokenizer, vocabulary)
    train, validation = (Packer(config.context_length, convention, number) for number in most)

    def packer_of(document: Document) -> Packer:
        held_out = in_validation(document.key, config.validation_share)
        return validation if held_out else train

    def report() -> None:
        on_progress(len(train) + len(validation), sum(most))

    report()  # before the text is read, which may take long
    needed = (document for document in documents if not packer_of(document).full)
    for document, tokens in tokenised(needed, tokenizer, report):
        packer = packer_of(document)
        packer.add(tokens)
        check_tokens(packer.largest, tokenizer, vocabulary)
        report()
        if train.full and validation.full:
            break
    return train, validation


def _check_length(
    config: DataConfig, train: int, validation: int, train_sequences: int, batch_size: int
) -> None:
    length = config.context_length
    if validation == 0 or train == 0:
        raise UserError(
            "the text has too few documents: training documents and held-out documents must each fill a "
            "sequence. A document is a file, or a row of a table such as .jsonl. Provide more or "
            f"smaller documents, or change data.validation_share={config.validation_share:g}"
        )
    if validation < config.validation_tokens // length:
        raise ConfigError(
            "data.validation_tokens",
            config.validation_tokens,
            f"at most {validation * length}, all available held-out text "
            "(a larger data.validation_share holds out more)",
            nearest=validation * length,
        )
    if train < train_sequences and not config.repeat:
        raise ConfigError(
            "train.train_tokens",
            train_sequences * length,
            f"at most {train * length}, all available training text; "
            "or set data.repeat=true to repeat the text",
            nearest=train // batch_size * batch_size * length or None,
        )


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokenizer's content, independent of its name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _digest(backend.to_str())
    return _digest(json.dumps(tokenizer.get_vocab(), sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
