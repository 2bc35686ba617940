"""Models, SAEs and text, fetched once before any run starts, so that runs need no network."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import logging as transformers_logging

from sae_lora.common.console import progress_bar, say
from sae_lora.common.errors import UserError
from sae_lora.common.files import check_can_be_made
from sae_lora.config.enums import TextSource
from sae_lora.config.identity import train_steps
from sae_lora.config.schema import Config, ModelConfig, SAEChoice, SAEConfig
from sae_lora.data import corpus
from sae_lora.data.packing import convention_of
from sae_lora.launcher.plan import pinned
from sae_lora.models.attention.choice import check_attention
from sae_lora.models.dimensions import EMBEDDED_NAME, read_dimensions
from sae_lora.models.loading import fetch_model, load_tokenizer
from sae_lora.models.model_folder import has_local_tokenizer
from sae_lora.saes.metadata import Notices, differences, stated_by
from sae_lora.saes.probe import check_file


def prefetched(configs: Sequence[Config]) -> list[Config]:
    """Fetch models, SAEs and tokenised text; return the configs with their commits and versions.

    Print what the plan could not notice before the files were there.

    Raises:
        UserError: For files that cannot be fetched, SAEs that cannot be used, and text that is too
            short.
    """
    transformers_logging.disable_progress_bar()
    fetcher = _Fetcher()
    fetched = [fetcher.fetched(config) for config in configs]
    for line in fetcher.noticed.lines:
        say(f"note: {line}")
    return fetched


def bos_notes(configs: Sequence[Config]) -> list[str]:
    """Differences in BOS between runs and the metadata of their SAEs, before any text is read.

    Only SAEs whose metadata is on this machine, and tokenizers that can be read, are compared.
    """
    noticed = Notices()
    known: dict[tuple[str, str | None, object], bool | None] = {}
    for config in configs:
        for choice in config.sae.used:
            about = stated_by(choice)
            if "prepend_bos" not in about:
                continue
            key = config.model.name, config.model.pinned_revision, config.data.bos
            if key not in known:
                try:
                    tokenizer = load_tokenizer(config.model)
                    known[key] = convention_of(tokenizer, config.data.bos).bos is not None
                except UserError:  # the launch will say so; a plan needs no tokenizer
                    known[key] = None
            planned = differences(about, config)
            now = differences(about, config, known[key])
            noticed.add(choice.block, [line for line in now if line not in planned])
    return noticed.lines


class _SAE(NamedTuple):
    """A fetched SAE: the commit of its repository, and what its metadata states."""

    commit: str | None
    stated: dict[str, Any]


class _Text(NamedTuple):
    """Fetched text: its version, and true if its sequences begin with BOS."""

    version: str
    begins_with_bos: bool


def check_local(configs: Sequence[Config]) -> None:
    """Refuse text, models, SAEs and folders that a launch would refuse, as far as this is quick.

    Print notes about the text. Nothing is fetched or written. Text, models and SAEs of the hub are not
    checked.

    Raises:
        UserError: For local text, models and SAEs that cannot be used, and folders that cannot be
            written.
    """
    transformers_logging.disable_progress_bar()
    checked: set[str] = set()
    for model in {config.model.name: config.model for config in configs}.values():
        if Path(model.name).expanduser().is_dir():
            fetch_model(model)
    saes = [choice.path for config in configs for choice in config.sae.used]
    for path in dict.fromkeys(path for path in saes if path is not None):
        check_file(path)
    for config in configs:
        check_can_be_made(Path(config.output_dir).expanduser() / config.sweep, "output_dir")
        check_can_be_made(Path(config.data.cache_dir).expanduser(), "data.cache_dir")
        sequences = train_steps(config) * config.train.batch_size
        key = _text_key(config, config.model, sequences)
        if key not in checked:
            checked.add(key)
            tokenizer = load_tokenizer(config.model) if has_local_tokenizer(config.model) else None
            vocabulary = read_dimensions(config.model).d_vocab
            batch_size = config.train.batch_size
            for note in corpus.check(config.data, tokenizer, sequences, batch_size, vocabulary):
                say(f"note: {note}")
    for name in dict.fromkeys(
        config.data.name for config in configs if config.data.source is TextSource.hub
    ):
        say(f"note: a dry run does not read the text of {name}")


def _text_key(config: Config, model: ModelConfig, sequences: int) -> str:
    """A key that is equal for runs with the same sequences."""
    return json.dumps([asdict(config.data), model.name, model.commit, sequences], default=str)


class _Fetcher:
    """A cache, so that everything is fetched once for all runs."""

    def __init__(self) -> None:
        self.noticed = Notices()
        """Differences between runs and the metadata of their SAEs that the plan does not know."""
        self._commits: dict[tuple[str, str | None], str | None] = {}
        self._texts: dict[str, _Text] = {}
        self._saes: dict[tuple[str | None, ...], _SAE] = {}

    def fetched(self, config: Config) -> Config:
        # SAEs first: they are smaller than the model, and some cannot be used.
        saes = [self._sae(config.sae, choice) for choice in config.sae.used]
        model = replace(config.model, commit=self._model(config.model))
        text = self._text(config, model)
        used = []
        for choice, sae in zip(config.sae.used, saes, strict=True):
            planned = differences(stated_by(choice), config)
            now = differences(sae.stated, config, text.begins_with_bos)
            self.noticed.add(choice.block, [line for line in now if line not in planned])
            used.append(replace(choice, commit=choice.commit or sae.commit))
        return pinned(config, model.commit, used, text.version)

    def _sae(self, config: SAEConfig, choice: SAEChoice) -> _SAE:
        if choice.release is None and choice.path is None:  # embedded, new, or the identity
            return _SAE(None, stated_by(choice))
        key = (choice.release, choice.id, choice.path)
        if key not in self._saes:
            from sae_lora.saes import loading  # sae-lens takes seconds to import

            name = choice.path or f"{choice.release} {choice.id}"
            say(f"{'fetching' if choice.release else 'checking'} SAE {name}")
            self._saes[key] = _SAE(*loading.fetch(config, choice))
        return self._saes[key]

    def _model(self, config: ModelConfig) -> str | None:
        check_attention(config.attention)
        if config.name == EMBEDDED_NAME:
            return None
        key = (config.name, config.pinned_revision)
        if key not in self._commits:
            verb = "checking" if Path(config.name).expanduser().is_dir() else "fetching"
            say(f"{verb} model {config.name}")
            self._commits[key] = fetch_model(config)
        return self._commits[key]

    def _text(self, config: Config, model: ModelConfig) -> _Text:
        batch_size = config.train.batch_size
        sequences = train_steps(config) * batch_size
        key = _text_key(config, model, sequences)
        if key not in self._texts:
            with progress_bar("tokenising", "sequences") as count:
                text = corpus.load(
                    *(config.data, load_tokenizer(model), sequences, batch_size, count),
                    vocabulary=read_dimensions(model).d_vocab,
                )
            if config.data.bos is True:  # EOS, if the tokenizer has no BOS
                say(f"every sequence begins with {text.description['begins_with']}")
            description = text.description
            self._texts[key] = _Text(corpus.version_of(description), description["bos"])
        return self._texts[key]
