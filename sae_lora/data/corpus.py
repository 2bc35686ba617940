"""Training and validation sequences of a run, tokenised once and cached by content."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sae_lora.common import hub
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.files import as_json, new_folder, sha256, write_atomically
from sae_lora.config.enums import TextSource
from sae_lora.config.schema import DataConfig, as_list
from sae_lora.data.documents import (
    Document,
    file_documents,
    files_matching,
    hub_documents,
    in_validation,
    shuffled,
    stdlib_documents,
)
from sae_lora.data.packing import (
    Packer,
    convention_of,
    shuffled_batches,
    special_ids,
    tokenised,
)

Progress = Callable[[int, int], object]
"""Called with the number of sequences so far and in total while a corpus is tokenised."""
_FORMAT = 1


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
) -> Corpus:
    """The corpus that the config describes, from the cache if possible.

    Args:
        config: The text, and how it is cut.
        tokenizer: The model's.
        train_sequences: Training sequences that the run needs.
        batch_size: Sequences per step; error messages suggest numbers of tokens in whole steps.
        on_progress: Called with the number of sequences so far and in total.

    Raises:
        ConfigError: If the text is too short for the config.
        UserError: If the text cannot be read, or has changed since the run was planned.
    """
    convention = convention_of(tokenizer)
    source, documents = _source(config)
    if config.version not in (None, version_of(source)):
        raise UserError(
            f"the text ({config.source.name}) has changed since this run was planned (files, or for "
            "stdlib the Python version); use another sweep=… to start again with the present text"
        )
    recipe = {
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
    key = _digest(json.dumps(recipe, sort_keys=True))
    folder = _cache(config, "corpora") / key
    if not (folder / "recipe.json").exists():
        _make(config, tokenizer, documents, recipe, folder, on_progress)
    train = np.load(folder / "train.npy", mmap_mode="r")
    validation = np.load(folder / "validation.npy", mmap_mode="r")
    _check_length(config, len(train), len(validation), train_sequences, batch_size)
    return Corpus(
        train=train,
        validation=validation,
        special_ids=special_ids(tokenizer),
        description=source
        | {
            "corpus": key,
            "context_length": config.context_length,
            "bos": convention.bos is not None,
            "training_sequences": len(train),
            "validation_sequences": len(validation),
            "passes": round(train_sequences / len(train), 3),
        },
    )


def version_of(description: dict[str, Any]) -> str:
    """The part of a corpus description that changes if the text changes: a commit or a hash."""
    return description["revision"] if "revision" in description else description["content"]


def _cache(config: DataConfig, kind: str) -> Path:
    """The cache folder for this kind of entry; created if it does not exist."""
    folder = Path(config.cache_dir).expanduser() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.cache_dir = {config.cache_dir!r} cannot be written: {error.strerror}"
        ) from error
    return folder


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
                "content": _digest("\n".join(map(sha256, files))),
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
    write_atomically(cached, commit)
    return commit


def _make(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterator[Document],
    recipe: dict[str, Any],
    folder: Path,
    on_progress: Progress,
) -> None:
    """Read documents until both splits are full or the text ends, then write the folder atomically."""
    convention = convention_of(tokenizer)
    train, validation = (
        Packer(config.context_length, convention, len(tokenizer), recipe[f"{split}_sequences"])
        for split in ("train", "validation")
    )

    def packer_of(document: Document) -> Packer:
        held_out = in_validation(document.key, config.validation_share)
        return validation if held_out else train

    total = recipe["train_sequences"] + recipe["validation_sequences"]
    needed = (document for document in documents if not packer_of(document).full)
    for document, tokens in tokenised(needed, tokenizer):
        packer_of(document).add(tokens)
        on_progress(len(train) + len(validation), total)
        if train.full and validation.full:
            break
    try:
        with new_folder(folder) as temporary:
            np.save(temporary / "train.npy", train.sequences)
            np.save(temporary / "validation.npy", validation.sequences)
            write_atomically(temporary / "recipe.json", as_json(recipe))
    except OSError:
        if not (
            folder / "recipe.json"
        ).exists():  # else another run has written the same corpus in the meantime
            raise


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
