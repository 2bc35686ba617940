"""The size of a model, before its weights are loaded. Imports no torch, so that planning is fast."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from sae_lora.common import hub
from sae_lora.common.errors import UserError
from sae_lora.config.schema import ModelConfig
from sae_lora.embedded import MODEL as EMBEDDED_MODEL
from sae_lora.embedded import NAME as EMBEDDED_NAME


@dataclass(frozen=True)
class Dimensions:
    """The size of a model, from its config file."""

    d_model: int
    n_blocks: int
    d_vocab: int
    max_context: int | None
    """Longest sequence that the model supports, in tokens; `None` if its config does not say."""


def source(config: ModelConfig) -> str:
    """The repository, or the folder of a local or the embedded model."""
    return str(EMBEDDED_MODEL) if config.name == EMBEDDED_NAME else config.name


_NAMES = {
    "d_model": ("hidden_size", "n_embd"),
    "n_blocks": ("num_hidden_layers", "n_layer"),
    "d_vocab": ("vocab_size",),
    "max_context": ("max_position_embeddings", "n_positions"),
}
"""Names of each dimension in config files: the usual name, and GPT-2's."""


def read_dimensions(config: ModelConfig) -> Dimensions:
    """The dimensions of a model, from its config file.

    Raises:
        UserError: If the config cannot be found or fetched.
    """
    with hub.explained("model.name", config.name):
        values = _config_file(config)
        dimensions: dict[str, Any] = {
            name: next((values[key] for key in keys if key in values), None)
            for name, keys in _NAMES.items()
        }
        if None in dimensions.values():  # the file omits a value whose default transformers knows
            dimensions = _through_transformers(config)
    return Dimensions(**dimensions)


def _config_file(config: ModelConfig) -> dict[str, Any]:
    folder = Path(source(config))
    if folder.is_dir():
        path = folder / "config.json"
        if not path.exists():
            raise UserError(f"model.name = {config.name!r} cannot be used: {folder} has no config.json")
    else:
        path = Path(hf_hub_download(config.name, "config.json", revision=config.pinned_revision))
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"model.name = {config.name!r} cannot be used: {path}: {error}") from error
    return values.get("text_config", values)


def _through_transformers(config: ModelConfig) -> dict[str, Any]:
    from transformers import AutoConfig  # imports torch

    text = AutoConfig.from_pretrained(
        source(config), revision=config.pinned_revision, trust_remote_code=False
    ).get_text_config()
    return {
        "d_model": text.hidden_size,
        "n_blocks": text.num_hidden_layers,
        "d_vocab": text.vocab_size,
        "max_context": getattr(text, "max_position_embeddings", None),
    }
