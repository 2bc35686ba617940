"""The size of a model, before its weights are loaded. Imports no torch, so that planning is fast."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from textwrap import shorten
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

from sae_lora.common import hub
from sae_lora.common.errors import UserError, is_out_of_memory
from sae_lora.config.schema import ModelConfig
from sae_lora.embedded import MODEL as EMBEDDED_MODEL
from sae_lora.embedded import NAME as EMBEDDED_NAME

_LONGEST_CAUSE = 300
"""Characters of a library's message that are shown."""
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Dimensions:
    """The size of a model, from its config file."""

    d_model: int
    n_blocks: int
    d_vocab: int
    max_context: int | None
    """Longest sequence that the model supports, in tokens; `None` if its config does not say."""
    model_type: str | None = None
    """Name of the architecture in transformers, such as `llama`."""


def source(config: ModelConfig) -> str:
    """The repository, or the folder of a local or the embedded model."""
    if config.name == EMBEDDED_NAME:
        return str(EMBEDDED_MODEL)
    return str(Path(config.name).expanduser()) if config.name.startswith("~") else config.name


_NAMES = {
    "d_model": ("hidden_size", "n_embd", "d_model", "emb_dim", "n_embed"),
    "n_blocks": (
        # First, because these configs also state the size of an encoder under the usual names.
        *("decoder_layers", "num_decoder_layers"),
        *("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    ),
    "d_vocab": ("vocab_size",),
    "max_context": (
        *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"),
        *("max_target_positions", "context_length"),
    ),
    "model_type": ("model_type",),
}
"""Names of each dimension in configs of transformers."""
_REQUIRED = ("d_model", "n_blocks", "d_vocab")
"""The dimensions that every model has."""
_SIZES = {name: _NAMES[name][0] for name in ("d_model", "d_vocab", "max_context")} | {
    "n_blocks": "num_hidden_layers"
}
"""The dimensions that are sizes, with their usual names."""


def stated(value_of: Callable[[str], Any]) -> dict[str, Any]:
    """The dimensions that a config states, by their names in `Dimensions`; `None` for the others.

    `value_of` returns the value of a key of the config, or `None`.
    """
    return {
        name: next((value for key in keys if (value := value_of(key)) is not None), None)
        for name, keys in _NAMES.items()
    }


def read_dimensions(config: ModelConfig) -> Dimensions:
    """The dimensions of a model, from its config file.

    Raises:
        UserError: If the config cannot be found or fetched, or is not one of a causal model with float
            weights.
    """
    dimensions = _stated_in_file(config)
    with reading(config, "config.json"):
        if None in dimensions.values():  # the file omits a value whose default transformers knows
            dimensions = _through_transformers(config)
    for name, usual in _SIZES.items():
        value = dimensions[name]
        is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not is_size and (value is not None or name in _REQUIRED):
            raise unusable(config, f"{usual} in its config is {value!r}, not a size")
    return Dimensions(**dimensions)


def unstated_sizes(config: ModelConfig) -> list[str]:
    """The sizes that every model has and that its config file does not state, by their usual names."""
    sizes = _stated_in_file(config)
    return [_SIZES[name] for name in _REQUIRED if sizes[name] is None]


def _stated_in_file(config: ModelConfig) -> dict[str, Any]:
    values = config_values(config)
    return stated((values.get("text_config") or values).get)


def unusable(config: ModelConfig, because: str) -> UserError:
    """The error that a model cannot be used."""
    return UserError(f"model.name = {config.name!r} cannot be used: {because}")


@contextmanager
def reading(config: ModelConfig, part: str = "") -> Iterator[None]:
    """Turn errors of transformers and of the hub inside the block into one message about the model.

    `part` names the files that are read.

    Raises:
        UserError: Replaces the library's error, which is its cause.
    """
    is_local = Path(source(config)).is_dir()
    try:
        with nullcontext() if is_local else hub.explained("model.name", config.name):
            yield
    except UserError:
        raise
    except Exception as error:  # transformers raises errors of every kind for files that it cannot read
        if is_out_of_memory(error):
            raise
        cause = short_cause(error)
        raise unusable(config, f"{part}: {cause}" if part else cause) from error


def short_cause(error: Exception) -> str:
    """The kind and the message of a library's error, in one line."""
    return f"{type(error).__name__}: {shorten(str(error), _LONGEST_CAUSE)}"


def config_values(config: ModelConfig) -> dict[str, Any]:
    """The values in `config.json`.

    Raises:
        UserError: As for `read_dimensions`.
    """
    with reading(config):
        path = _config_file(config)
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise unusable(config, f"{path}: {error}") from error
    if not isinstance(values, dict) or not values.get("model_type"):
        raise unusable(config, f"{path} is no config of transformers: it has no model_type")
    for key, kind, words in (("model_type", str, "a name"), ("text_config", dict, "an object")):
        if not isinstance(value := values.get(key) or kind(), kind):
            raise unusable(config, f"{key} in {path} is {value!r}, not {words}")
    for part in (values, values.get("text_config") or {}):
        quantisation = part.get("quantization_config", part.get("compression_config"))
        if quantisation is not None:
            raise unusable(config, _because_quantised(quantisation))
    if values.get("is_encoder_decoder"):
        raise unusable(config, "it is an encoder-decoder, and only causal language models are supported")
    return values


def _config_file(config: ModelConfig) -> Path:
    folder = Path(source(config))
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():
            because = f"{folder} holds an adapter of peft; save the model after merge_and_unload()"
            raise unusable(config, because)
        check_links(config, folder, ("config.json",))
        if not (folder / "config.json").exists():
            raise unusable(config, f"{folder} has no config.json")
        return folder / "config.json"
    revision = config.pinned_revision
    if not try_to_load_from_cache(config.name, "config.json", revision=revision):
        # One request without retries: a download of a wrong name or without network takes 25 s.
        HfApi().model_info(config.name, revision=revision, timeout=_TIMEOUT_S)
    return Path(hf_hub_download(config.name, "config.json", revision=revision))


def check_links(config: ModelConfig, folder: Path, patterns: Sequence[str]) -> None:
    """Check that no file whose name fits a pattern is a link to a file that does not exist.

    Raises:
        UserError: If one is.
    """
    for file in sorted(folder.iterdir()):
        is_read = any(fnmatchcase(file.name, pattern) for pattern in patterns)
        if is_read and file.is_symlink() and not file.exists():
            target = file.readlink()
            raise unusable(config, f"{file} is a link to {target}, which does not exist; copy the file")


UNQUANTISED = (
    "only float weights are supported; name the repository of the model before its quantisation"
)
"""Advice about quantised weights."""


def _because_quantised(quantisation: Any) -> str:
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    kind = f" ({method})" if method else ""
    return f"its weights are quantised{kind}, and {UNQUANTISED}"


def _through_transformers(config: ModelConfig) -> dict[str, Any]:
    from transformers import AutoConfig  # imports torch

    text = AutoConfig.from_pretrained(
        source(config), revision=config.pinned_revision, trust_remote_code=False
    ).get_text_config()
    return stated(lambda key: getattr(text, key, None))
