"""Models, SAEs and text, fetched once before any run starts, so that runs need no network."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from transformers import logging as transformers_logging

from sae_lora.common.console import progress_bar, say
from sae_lora.config.identity import train_steps
from sae_lora.config.schema import Config, ModelConfig, SAEChoice, SAEConfig
from sae_lora.data import corpus
from sae_lora.launcher.plan import pinned
from sae_lora.models.dimensions import EMBEDDED_NAME
from sae_lora.models.loading import fetch_model, load_tokenizer


def prefetched(configs: Sequence[Config]) -> list[Config]:
    """Fetch models, SAEs and tokenised text; return the configs with their commits and versions.

    Raises:
        UserError: For files that cannot be fetched, and text that is too short.
    """
    transformers_logging.disable_progress_bar()
    fetcher = _Fetcher()
    return [fetcher.fetched(config) for config in configs]


class _Fetcher:
    """A cache, so that everything is fetched once for all runs."""

    def __init__(self) -> None:
        self._commits: dict[tuple[str, str | None], str | None] = {}
        self._versions: dict[str, str] = {}
        self._saes: dict[tuple[str, str | None], str | None] = {}

    def fetched(self, config: Config) -> Config:
        model = replace(config.model, commit=self._model(config.model))
        used = [replace(choice, commit=self._sae(config.sae, choice)) for choice in config.sae.used]
        return pinned(config, model.commit, used, self._text(config, model))

    def _sae(self, config: SAEConfig, choice: SAEChoice) -> str | None:
        if choice.release is None:
            return None
        key = (choice.release, choice.id)
        if key not in self._saes:
            from sae_lora.saes import loading  # sae-lens takes seconds to import

            say(f"fetching SAE {choice.release} {choice.id}")
            self._saes[key] = loading.fetch(config, choice)
        return choice.commit or self._saes[key]

    def _model(self, config: ModelConfig) -> str | None:
        if config.name == EMBEDDED_NAME:
            return None
        key = (config.name, config.pinned_revision)
        if key not in self._commits:
            say(f"fetching model {config.name}")
            self._commits[key] = fetch_model(config)
        return self._commits[key]

    def _text(self, config: Config, model: ModelConfig) -> str:
        batch_size = config.train.batch_size
        sequences = train_steps(config) * batch_size
        key = json.dumps([asdict(config.data), model.name, model.commit, sequences], default=str)
        if key not in self._versions:
            with progress_bar("tokenising", "sequences") as count:
                text = corpus.load(config.data, load_tokenizer(model), sequences, batch_size, count)
            self._versions[key] = corpus.version_of(text.description)
        return self._versions[key]
