"""Formats of SAE folders: their files, and what their configs say, in SAELens's words. No torch."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
from safetensors import SafetensorError, safe_open

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
SCALER = "activation_scaler.json"
"""The file in which a training checkpoint of SAELens keeps the factor of its input."""
UNUSED_FACTOR = "unused_factor"
"""Key that `read` adds to the metadata: a factor in that file which the config does not ask for."""
SOURCE_OF_HOOK = "source_of_hook_name"
"""Key that `read` adds to the metadata if the hook name is not a value of the config: its source."""
_CHECKPOINTS = "checkpoints/ae_*.pt"
"""Files of a run of dictionary_learning, in the folder of its config."""
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
        case _ if (factor := _factor(path, folder)) is None:
            pass
        case _ if values.get("normalize_activations") in ("expected_average_only_in", True):
            if not _is_number(factor) or factor <= 0:
                because = f"its {SCALER} says scaling_factor: {json.dumps(factor)}"
                allowed = f"an SAE whose {SCALER} gives a positive number"
                raise ConfigError("sae.path", path, allowed, because=because)
            return SAEFolder(folder, format, values | {"normalize_activations": "none"}, float(factor))
        case _:
            noted = {**(values.get("metadata") or {}), UNUSED_FACTOR: factor}
            return SAEFolder(folder, format, values | {"metadata": noted})
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
    because = "it has none of these files"
    nearest: Path | None = None
    if unread := names & _UNREAD.keys():
        because = f"its format is that of {_UNREAD[unread.pop()]}"
    elif inside := sorted(entry for name in names if _holds_sae(entry := folder / name)):
        because = f"it is a folder of SAEs: {listed(entry.name for entry in inside)}"
        nearest = inside[0]
    elif checkpoint := _checkpoint(folder):
        because = (
            f"checkpoints of dictionary_learning are not read in their folder; copy {checkpoint}, say, "
            f"to {DICTIONARY_LEARNING.weights} in a new folder, and its "
            f"{DICTIONARY_LEARNING.config} beside it"
        )
    elif folder.is_file():
        because = "it is a file"
        nearest = folder.parent if _holds_sae(folder.parent) else None
    elif half := [format for format in _FORMATS if {format.config, format.weights} & names]:
        files = {half[-1].config, half[-1].weights}
        because = f"it has {listed(files & names)} without {listed(files - names)}"
    elif not names and not folder.is_dir():
        because = "there is no such folder"
        beside = {entry.name for entry in folder.parent.glob("*") if _holds_sae(entry)}
        near = nearest_name(folder.name, beside - {folder.name})
        nearest = folder.parent / near if near else None
    files = "; ".join(f"{format.config} and {format.weights} ({format.name})" for format in _FORMATS)
    raise ConfigError("sae.path", path, f"a folder with {files}", nearest=nearest, because=because)


def _checkpoint(path: Path) -> Path | None:
    """A checkpoint of dictionary_learning: this file, or the last in this folder; `None` without one."""
    run = path.parent.parent if path.is_file() else path.parent if path.name == "checkpoints" else path
    checkpoints = sorted(run.glob(_CHECKPOINTS))
    return path if path in checkpoints else checkpoints[-1] if checkpoints and path.is_dir() else None


def _holds_sae(folder: Path) -> bool:
    return any(
        (folder / format.config).is_file() and (folder / format.weights).is_file() for format in _FORMATS
    )


def _json(path: str, file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"sae.path = {path!r}: {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"sae.path = {path!r} cannot be used: {file} is not JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("metadata") or {}, dict):
        raise UserError(f"sae.path = {path!r} cannot be used: {file} is not a JSON object of an SAE")
    return values


def _factor(path: str, folder: Path) -> Any:
    """The factor of the input in a training checkpoint of SAELens; `None` if the folder states none."""
    file = folder / SCALER
    return _json(path, file).get("scaling_factor") if file.is_file() else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
    d_in, k = (_size(path, SPARSIFY.config, values, key) for key in ("d_in", "k"))
    is_stated = bool(values.get("num_latents"))
    d_sae = _size(path, SPARSIFY.config, values, "num_latents" if is_stated else "expansion_factor")
    if not is_stated:
        d_sae *= d_in
    name = re.sub(r"^([a-z]+)_(\d+)$", r"\1.\2", folder.resolve().name)
    has_place = name == "embed_tokens" or re.search(r"\.\d+", name) is not None
    run = folder.resolve().parent / "config.json"
    about = _json(path, run) if run.is_file() else {}
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


def _of_dictionary_learning(path: str, values: dict[str, Any]) -> dict[str, Any]:
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
    module = trainer.get("submodule_name")
    hook = re.match(r"resid_pre|resid_post|attn_out|mlp_out", str(module))
    stated = {
        # An SAE on the input of a module is not at the place that the module's name suggests.
        "hook_name": None
        if module is None or trainer.get("layer") is None
        else f"blocks.{trainer['layer']}.hook_{hook[0]}"
        if hook and buffer.get("io", "out") == "out"
        else str(module),
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


Sources = Mapping[str, bool]
"""Names of a weight in a file; true if the file holds its transpose."""
NAMES: dict[str, dict[str, Sources]] = {
    SPARSIFY.name: {
        "W_enc": {"encoder.weight": True},
        "b_enc": {"encoder.bias": False},
        "W_dec": {"W_dec": False},
        "b_dec": {"b_dec": False},
    },
    DICTIONARY_LEARNING.name: {
        "W_enc": {"W_enc": False, "encoder.weight": True},
        "b_enc": {"b_enc": False, "encoder.bias": False},
        "W_dec": {"W_dec": False, "decoder.weight": True},
        "b_dec": {"b_dec": False, "bias": False, "decoder_bias": False, "decoder.bias": False},
        "b_gate": {"gate_bias": False},
        "b_mag": {"mag_bias": False},
        "r_mag": {"r_mag": False},
    },
}
"""By format: the names of weights in SAELens and in the file."""
_SHAPES = {
    "W_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "W_dec": ("d_sae", "d_in"),
    "b_dec": ("d_in",),
    "threshold": ("d_sae",),
    "b_gate": ("d_sae",),
    "b_mag": ("d_sae",),
    "r_mag": ("d_sae",),
    "scaling_factor": ("d_sae",),
    "finetuning_scaling_factor": ("d_sae",),
}
"""Shapes of weights in SAELens."""
_LINEAR = ("W_enc", "b_enc", "W_dec", "b_dec")
_WEIGHTS = {
    "standard": _LINEAR,
    "topk": _LINEAR,
    "abstopk": _LINEAR,
    "jumprelu": (*_LINEAR, "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
    "matching_pursuit": ("W_dec", "b_dec"),
}
"""Weights of each architecture in SAELens."""
FACTORS = ("scaling_factor", "finetuning_scaling_factor")
"""Names of the factors of latents, `[d_sae]`, in older versions of SAELens."""
_FACTORS_KEY = "finetuning_scaling_factor"


def check_weights(folder: SAEFolder) -> None:
    """Refuse a folder whose weights do not belong to its config, by the header of a safetensors file.

    The config must be complete and usable. A file of torch has no such header: only a file that was cut
    off is refused here, and `converters.load` checks its weights.

    Raises:
        ConfigError: If a weight is missing, has another shape, or cannot be applied.
        UserError: If the file cannot be read, or is damaged.
    """
    try:
        if folder.format is DICTIONARY_LEARNING:
            if _is_cut_off(folder.weights):
                raise EOFError
            return
        with safe_open(folder.weights, framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            factors = [name for name in FACTORS if name in shapes and not _are_ones(file, name)]
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"sae.path: {folder.weights} cannot be read: {reason}") from error
    except (SafetensorError, EOFError) as error:
        reason = "damaged or incomplete; copy it again, or save it again"
        path = str(folder.path)
        raise UserError(f"sae.path = {path!r} cannot be loaded: {folder.weights} is {reason}") from error
    for name, sources in NAMES.get(folder.format.name, {}).items():
        for source, is_transposed in sources.items():
            if source in shapes:
                shape = shapes.pop(source)
                shapes[name] = shape[::-1] if is_transposed else shape
    check_shapes(folder, shapes)
    if factors:
        check_factors(folder)


def _is_cut_off(file: Path) -> bool:
    """True if a file of torch is empty, or begins as a zip archive without ending as one."""
    with file.open("rb") as stream:
        return stream.read(2) in (b"", b"PK") and not is_zipfile(file)


def _are_ones(file: Any, name: str) -> bool:
    """True if all values of a weight are 1, which the loader drops, or if numpy has no such type."""
    is_readable = file.get_slice(name).get_dtype() in ("F64", "F32", "F16")
    return not is_readable or bool(np.allclose(file.get_tensor(name), 1))


def refused_factors(values: Mapping[str, Any]) -> str | None:
    """The reason to refuse factors of latents in an SAE with this config; `None` to apply them."""
    if values.get(_FACTORS_KEY) is not True:
        stated = json.dumps(values.get(_FACTORS_KEY))
        return f"its config says {_FACTORS_KEY}: {stated}, but its weights have factors that are not 1"
    if values.get("rescale_acts_by_decoder_norm") or values.get("architecture") == "matching_pursuit":
        return "its weights have factors of latents, but its encoder reads the norms of its decoder"
    return None


def check_factors(folder: SAEFolder) -> None:
    """Refuse a folder with factors of latents that are not applied.

    Raises:
        ConfigError: For such factors.
    """
    if because := refused_factors(folder.values):
        allowed = f"an SAE with {_FACTORS_KEY}: true, or without factors of its latents"
        raise ConfigError("sae.path", str(folder.path), allowed, because=because)


def check_shapes(folder: SAEFolder, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse weights of other names or shapes than the config asks for.

    Args:
        folder: The folder.
        shapes: The shapes of its weights, by SAELens's names.

    Raises:
        ConfigError: Names the weight.
    """
    values = folder.values
    factors = shapes.keys() & set(FACTORS) if folder.format is SAE_LENS else ()
    needed = {
        name: [values[size] for size in _SHAPES[name]]
        for name in (*_WEIGHTS[values.get("architecture", "standard")], *factors)
    }
    because = None
    if unread := shapes.keys() - needed.keys():
        because = f"{folder.weights} holds {listed(sorted(unread))}, which no SAE of this kind has"
    elif missing := needed.keys() - shapes.keys():
        because = f"{folder.weights} has no {listed(sorted(missing))}"
    elif wrong := [name for name in needed if list(shapes[name]) != needed[name]]:
        because = f"{wrong[0]} in {folder.weights} has the shape {list(shapes[wrong[0]])}"
    if because is not None:
        weights = listed(f"{name} {shape}" for name, shape in needed.items())
        allowed = f"an SAE with the weights that its {folder.format.config} asks for: {weights}"
        raise ConfigError("sae.path", str(folder.path), allowed, because=because)
