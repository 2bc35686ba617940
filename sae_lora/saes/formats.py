"""Formats of SAE folders: their files, and what their configs say, in SAELens's words. No torch."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name
from sae_lora.common.files import sha256


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
_FORMATS = (SAE_LENS, SPARSIFY, DICTIONARY_LEARNING)
_SCALER = "activation_scaler.json"
"""The file in which a training checkpoint of SAELens keeps the factor of its input."""
_UNREAD = {
    "params.npz": "Gemma Scope; use sae=gemma_scope, or sae=registry with its release",
    "hyperparams.json": "Llama Scope; use sae=llama_scope, or sae=registry with its release",
    "conf.yaml": "TemporalSAE, which is no SAE of single tokens",
}
"""Files of formats that are read from a release, not from a folder."""


class SAEFolder(NamedTuple):
    """A folder with an SAE, before its weights are loaded."""

    path: Path
    format: Format
    values: dict[str, Any]
    """Its config, in the words of SAELens."""
    factor: float | None = None
    """The factor of its input that its weights do not include, if the folder states it."""

    @property
    def weights(self) -> Path:
        return self.path / self.format.weights

    def digest(self) -> str:
        """SHA-256 of the weights file, and of the factor if there is one.

        Raises:
            UserError: If the file cannot be read.
        """
        try:
            digest = sha256(self.weights)
        except OSError as error:
            raise UserError(f"sae.path: {self.weights} cannot be read: {error.strerror}") from error
        if self.factor is None:
            return digest
        return hashlib.sha256(f"{digest} {self.factor!r}".encode()).hexdigest()


def read(path: str) -> SAEFolder:
    """Read the config in an SAE's folder.

    Raises:
        ConfigError: If the folder contains no SAE, or an SAE that cannot be used.
        UserError: If its config cannot be read.
    """
    folder = Path(path).expanduser()
    format = _format_of(path, folder)
    values = _json(path, folder / format.config)
    match format.name:
        case SPARSIFY.name:
            values = _of_sparsify(path, folder, values)
        case DICTIONARY_LEARNING.name:
            values = _of_dictionary_learning(path, values)
        case _ if values.get("normalize_activations") in ("expected_average_only_in", True):
            factor = _factor(path, folder)
            if factor is not None:
                return SAEFolder(folder, format, values | {"normalize_activations": "none"}, factor)
    return SAEFolder(folder, format, values)


def _format_of(path: str, folder: Path) -> Format:
    """The format of a folder, by its files.

    Raises:
        ConfigError: If it is the format of no SAE.
    """
    for format in _FORMATS:
        if (folder / format.config).is_file() and (folder / format.weights).is_file():
            return format
    if (folder / SAE_LENS.config).is_file():  # the weights are missing, which `digest` reports
        values = _json(path, folder / SAE_LENS.config)
        is_sparsify = "num_latents" in values or ("expansion_factor" in values and "d_sae" not in values)
        return SPARSIFY if is_sparsify else SAE_LENS
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    because = f"{folder / SAE_LENS.config}: No such file or directory"
    nearest: Path | None = None
    if unread := names & _UNREAD.keys():
        because = f"its format is that of {_UNREAD[unread.pop()]}"
    elif DICTIONARY_LEARNING.weights in names:
        because = f"it has {DICTIONARY_LEARNING.weights} without {DICTIONARY_LEARNING.config}"
    elif inside := sorted(
        entry
        for name in names
        for format in _FORMATS
        if ((entry := folder / name) / format.config).is_file() and (entry / format.weights).is_file()
    ):
        because = f"it is a folder of SAEs: {listed(entry.name for entry in inside)}"
        nearest = inside[0]
    elif folder.is_file():
        because, nearest = "it is a file", folder.parent
    elif not names and not folder.is_dir():
        because = "there is no such folder"
        beside = {entry.name for entry in folder.parent.glob("*") if entry.is_dir()}
        near = nearest_name(folder.name, beside - {folder.name})
        nearest = folder.parent / near if near else None
    files = "; ".join(f"{format.config} and {format.weights} ({format.name})" for format in _FORMATS)
    raise ConfigError("sae.path", path, f"a folder with {files}", nearest=nearest, because=because)


def _json(path: str, file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"sae.path = {path!r}: {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"sae.path = {path!r} cannot be used: {file} is not JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("metadata") or {}, dict):
        raise UserError(f"sae.path = {path!r} cannot be used: {file} is not the config of an SAE")
    return values


def _factor(path: str, folder: Path) -> float | None:
    """The factor of the input in a training checkpoint of SAELens; `None` if the folder states none."""
    file = folder / _SCALER
    factor = _json(path, file).get("scaling_factor") if file.is_file() else None
    return float(factor) if isinstance(factor, int | float) and factor > 0 else None


def _unusable(path: str, config: str, key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError("sae.path", path, allowed, because=f"its {config} says {key}: {value}")


def _of_sparsify(path: str, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
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
    try:
        d_in, k = int(values["d_in"]), int(values["k"])
        d_sae = int(values.get("num_latents") or d_in * int(values["expansion_factor"]))
    except (KeyError, TypeError, ValueError) as error:
        allowed = "a folder of sparsify, whose cfg.json gives d_in, k and expansion_factor as numbers"
        raise ConfigError("sae.path", path, allowed, because=f"cfg.json: {error!r}") from error
    name = re.sub(r"^([a-z]+)_(\d+)$", r"\1.\2", folder.resolve().name)
    has_place = name == "embed_tokens" or re.search(r"\.\d+", name) is not None
    run = folder.resolve().parent / "config.json"
    about = _json(path, run) if run.is_file() else {}
    stated = {
        "hook_name": name if has_place else None,
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


def _of_dictionary_learning(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """The config of an SAE that dictionary_learning wrote.

    Raises:
        ConfigError: If SAELens has no class that computes the same.
    """
    config = DICTIONARY_LEARNING.config
    trainer, buffer = values.get("trainer"), values.get("buffer") or {}
    allowed = f"an SAE of dictionary_learning of class {listed(_DICTIONARIES)}"
    if not isinstance(trainer, dict):
        raise ConfigError("sae.path", path, allowed, because=f"its {config} has no trainer")
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in _DICTIONARIES:
        raise _unusable(path, config, "dict_class", kind, allowed)
    architecture, subtracts = _DICTIONARIES[kind]
    try:
        sizes = {"d_in": int(trainer["activation_dim"]), "d_sae": int(trainer["dict_size"])}
        k = {"k": int(trainer["k"])} if architecture == "topk" else {}
    except (KeyError, TypeError, ValueError) as error:
        because = f"{config}: {error!r}"
        raise ConfigError("sae.path", path, allowed, because=because) from error
    module = trainer.get("submodule_name")
    hook = re.match(r"resid_pre|resid_post|attn_out|mlp_out", str(module))
    stated = {
        # An SAE on the input of a module is not at the place that the module's name suggests.
        "hook_name": None
        if module is None or trainer.get("layer") is None
        else f"blocks.{trainer['layer']}.hook_{hook[0]}"
        if hook and buffer.get("io", "out") == "out"
        else str(module),
        "model_name": trainer.get("lm_name"),
        "context_size": buffer.get("ctx_len"),
        "l0": trainer.get("k"),
    }
    return {
        "architecture": architecture,
        **sizes,
        **k,
        "apply_b_dec_to_input": subtracts,
        "metadata": {key: value for key, value in stated.items() if value is not None},
    }
