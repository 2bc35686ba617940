"""Configs of SAE folders: those of sparsify and dictionary_learning in SAELens's words. No torch."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sae_lora.common.errors import ConfigError, UserError, listed


class Format(NamedTuple):
    """A format of SAE folders."""

    name: str
    config: str
    """Name of the config file."""
    weights: str
    """Name of the weights file."""


SAE_LENS = Format("SAELens", "cfg.json", "sae_weights.safetensors")
SPARSIFY = Format("sparsify", "cfg.json", "sae.safetensors")
DICTIONARY_LEARNING = Format("dictionary_learning", "config.json", "ae.pt")
FORMATS = (SAE_LENS, SPARSIFY, DICTIONARY_LEARNING)
SOURCE_OF_HOOK = "source_of_hook_name"
"""Key that `read` adds to the metadata if the hook name is not a value of the config: its source."""


def read_json(path: str, file: Path) -> dict[str, Any]:
    """The values in a JSON file of the SAE folder `path`.

    Raises:
        UserError: If it cannot be read, or is no JSON object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"sae.path = {path!r}: {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"sae.path = {path!r} cannot be used: {file} is not JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("metadata"), dict | None):
        raise UserError(f"sae.path = {path!r} cannot be used: {file} is not a JSON object of an SAE")
    return values


def _size(path: str, config: str, values: Mapping[str, Any], key: str) -> int:
    """A positive whole number in a config.

    Raises:
        ConfigError: If the value is anything else.
    """
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _unusable(
            path, config, key, json.dumps(value), f"an SAE whose {key} is a positive integer"
        )
    return value


def _unusable(path: str, config: str, key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError("sae.path", path, allowed, because=f"its {config} says {key}: {value}")


def of_sparsify(path: str, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The config of a TopK SAE that sparsify wrote. The name of the folder is its hook point.

    Raises:
        ConfigError: If it is no TopK SAE.
    """
    for key in ("transcode", "skip_connection", "signed", "embed_skip", "gram_lookup"):
        if values.get(key):
            allowed = "a TopK SAE of sparsify, which reads and writes one activation"
            raise _unusable(path, SPARSIFY.config, key, "true", allowed)
    if values.get("activation", "topk") != "topk":
        allowed = "an SAE of sparsify with activation: topk"
        raise _unusable(path, SPARSIFY.config, "activation", values["activation"], allowed)
    d_in, k = (_size(path, SPARSIFY.config, values, key) for key in ("d_in", "k"))
    is_stated = bool(values.get("num_latents"))
    d_sae = _size(path, SPARSIFY.config, values, "num_latents" if is_stated else "expansion_factor")
    if not is_stated:
        d_sae *= d_in
    name = re.sub(r"^([a-z]+)_(\d+)$", r"\1.\2", folder.resolve().name)
    has_place = name == "embed_tokens" or re.search(r"\.\d+", name) is not None
    run = folder.resolve().parent / "config.json"
    about = read_json(path, run) if run.is_file() else {}
    stated = {
        "hook_name": name if has_place else None,
        SOURCE_OF_HOOK: "the name of its folder" if has_place else None,
        "model_name": about.get("model"),
        "context_size": about.get("ctx_len"),
    }
    return {
        "architecture": "topk",
        "d_in": d_in,
        "d_sae": d_sae,
        "k": k,
        "apply_b_dec_to_input": True,
        "metadata": {key: value for key, value in stated.items() if value is not None},
    }


_DICTIONARIES = {
    "AutoEncoder": ("standard", True),
    "AutoEncoderNew": ("standard", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "GatedAutoEncoder": ("gated", True),
}
"""Classes of dictionary_learning: the architecture in SAELens that computes the same, and true if the
decoder's bias is subtracted from the input."""


def of_dictionary_learning(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """The config of an SAE that dictionary_learning wrote.

    Raises:
        ConfigError: If SAELens has no class that computes the same.
    """
    config = DICTIONARY_LEARNING.config
    trainer, buffer = values.get("trainer"), values.get("buffer")
    if buffer is None:
        buffer = {}
    allowed = f"an SAE of dictionary_learning of class {listed(_DICTIONARIES)}"
    if not isinstance(trainer, dict):
        raise ConfigError("sae.path", path, allowed, because=f"its {config} has no trainer")
    if not isinstance(buffer, dict):
        raise _unusable(
            path, config, "buffer", json.dumps(buffer), "an SAE whose buffer is a table or null"
        )
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in _DICTIONARIES:
        raise _unusable(path, config, "dict_class", kind, allowed)
    architecture, subtracts = _DICTIONARIES[kind]
    sizes = {
        name: _size(path, config, trainer, key)
        for name, key in {"d_in": "activation_dim", "d_sae": "dict_size", "k": "k"}.items()
        if key != "k" or architecture == "topk"
    }
    module, layer = trainer.get("submodule_name"), trainer.get("layer")
    if not isinstance(module, str | None):
        allowed = "an SAE whose submodule_name is a name or null"
        raise _unusable(path, config, "submodule_name", json.dumps(module), allowed)
    if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool) or layer < 0):
        allowed = "an SAE whose layer is the index of a block or null"
        raise _unusable(path, config, "layer", json.dumps(layer), allowed)
    numbers = [int(number) for number in re.findall(r"\d+", module or "")]
    if layer is not None and numbers and layer not in numbers:
        allowed = "an SAE whose layer and submodule_name name the same block"
        raise _unusable(path, config, "layer", f"{layer}, submodule_name: {module}", allowed)
    hook = re.match(r"resid_pre|resid_post|attn_out|mlp_out", module or "")
    stated = {
        # An SAE on the input of a module is not at the place that the module's name suggests.
        "hook_name": None
        if module is None or layer is None
        else f"blocks.{layer}.hook_{hook[0]}"
        if hook and buffer.get("io", "out") == "out"
        else module,
        SOURCE_OF_HOOK: f"the submodule_name in its {config}",
        "model_name": trainer.get("lm_name"),
        "context_size": buffer.get("ctx_len"),
        "l0": trainer.get("k"),
    }
    return {
        "architecture": architecture,
        **sizes,
        "apply_b_dec_to_input": subtracts,
        "metadata": {key: value for key, value in stated.items() if value is not None},
    }
