"""Weights of SAE folders: names, shapes and types, by the header of their file. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
from safetensors import SafetensorError, safe_open

from sae_lora.common.errors import ConfigError, UserError, listed
from sae_lora.saes.formats.configs import DICTIONARY_LEARNING, SAE_LENS, SPARSIFY
from sae_lora.saes.formats.folder import SAEFolder

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
    "W_dec": ("d_sae", "d_out"),
    "b_dec": ("d_out",),
    "W_skip": ("d_out", "d_in"),
    "threshold": ("d_sae",),
    "b_gate": ("d_sae",),
    "b_mag": ("d_sae",),
    "r_mag": ("d_sae",),
    "scaling_factor": ("d_sae",),
    "finetuning_scaling_factor": ("d_sae",),
}
"""Shapes of weights in SAELens. d_out of an SAE is d_in."""
_LINEAR = ("W_enc", "b_enc", "W_dec", "b_dec")
_WEIGHTS = {
    "standard": _LINEAR,
    "topk": _LINEAR,
    "abstopk": _LINEAR,
    "jumprelu": (*_LINEAR, "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
    "matching_pursuit": ("W_dec", "b_dec"),
    "transcoder": _LINEAR,
    "skip_transcoder": (*_LINEAR, "W_skip"),
    "jumprelu_transcoder": (*_LINEAR, "threshold"),
    "jumprelu_skip_transcoder": (*_LINEAR, "threshold", "W_skip"),
}
"""Weights of each architecture in SAELens."""
FACTORS = ("scaling_factor", "finetuning_scaling_factor")
"""Names of the factors of latents, `[d_sae]`, in older versions of SAELens."""
_FACTORS_KEY = "finetuning_scaling_factor"


class Stored(NamedTuple):
    """A weight in a file, by the name that SAELens gives it."""

    shape: list[int]
    """Its shape in SAELens."""
    type: str
    """Its type, as torch names it; another name for a type that is not in `FLOATS`."""


FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of weights that are their values, by their names in safetensors files. Integers and floats of
8 bits are codes of quantised weights, whose scale no format of SAEs has."""


def check_weights(folder: SAEFolder) -> None:
    """Refuse a folder whose weights do not belong to its config, by the header of a safetensors file.

    The config must be complete and usable. A file of torch is not read without torch: only a file that
    was cut off is refused here, and `tensors.weights_of` checks its weights.

    Raises:
        ConfigError: If a weight is missing, has another shape or type, or cannot be applied.
        UserError: If the file cannot be read, or is damaged.
    """
    try:
        if folder.format is DICTIONARY_LEARNING:
            if _is_cut_off(folder.weights):
                raise EOFError
            return
        with safe_open(folder.weights, framework="np") as file:
            stored = {name: _stored(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
            factors = [name for name in FACTORS if name in stored and not _are_ones(file, name)]
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"sae.path: {folder.weights} cannot be read: {reason}") from error
    except (SafetensorError, EOFError) as error:
        raise damaged(folder) from error
    for name, sources in NAMES.get(folder.format.name, {}).items():
        for source, is_transposed in sources.items():
            if source in stored:
                shape, kind = stored.pop(source)
                stored[name] = Stored(shape[::-1] if is_transposed else shape, kind)
    check_stored(folder, stored)
    if factors:
        check_factors(folder)


def damaged(folder: SAEFolder) -> UserError:
    """The refusal of a folder whose file of weights is damaged."""
    reason = "damaged or incomplete; copy it again, or save it again"
    return UserError(f"sae.path = {str(folder.path)!r} cannot be loaded: {folder.weights} is {reason}")


def _stored(header: Any) -> Stored:
    kind: str = header.get_dtype()
    return Stored(header.get_shape(), FLOATS.get(kind, kind))


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
        stated = f"its {SAE_LENS.config} says {_FACTORS_KEY}: {json.dumps(values.get(_FACTORS_KEY))}"
        return f"{stated}, but its weights have factors that are not 1"
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


def refused_type(name: str, stored: Stored) -> str | None:
    """The reason to refuse a weight of this type; `None` for floating-point numbers."""
    if stored.type in FLOATS.values():
        return None
    return f"{name} is stored as {stored.type}, which is no floating-point type or is quantised"


def check_types_of_hub(file: str) -> None:
    """Refuse a file of SAELens's format, downloaded from the hub, whose weights are no floats.

    Raises:
        ValueError: Names the first such weight.
    """
    with safe_open(file, framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118
            if reason := refused_type(name, _stored(opened.get_slice(name))):
                raise ValueError(reason)


def check_stored(folder: SAEFolder, stored: Mapping[str, Stored]) -> None:
    """Refuse weights of other names or shapes than the config asks for, and weights that are no floats.

    Args:
        folder: The folder.
        stored: Its weights, by SAELens's names.

    Raises:
        ConfigError: Names the weight.
    """
    values = {"d_out": folder.values["d_in"]} | folder.values
    factors = stored.keys() & set(FACTORS) if folder.format is SAE_LENS else ()
    needed = {
        name: [values[size] for size in _SHAPES[name]]
        for name in (*_WEIGHTS[values.get("architecture", "standard")], *factors)
    }
    because = None
    if unread := stored.keys() - needed.keys():
        because = f"{folder.weights} holds {listed(sorted(unread))}, which no SAE of this kind has"
    elif missing := needed.keys() - stored.keys():
        because = f"{folder.weights} has no {listed(sorted(missing))}"
    elif wrong := [name for name in needed if stored[name].shape != needed[name]]:
        because = f"{wrong[0]} in {folder.weights} has the shape {stored[wrong[0]].shape}"
    if because is not None:
        weights = listed(f"{name} {shape}" for name, shape in needed.items())
        allowed = f"an SAE with the weights that its {folder.format.config} asks for: {weights}"
        raise ConfigError("sae.path", str(folder.path), allowed, because=because)
    for name in needed:
        if because := refused_type(f"{name} in {folder.weights}", stored[name]):
            allowed = f"an SAE whose weights have the type {listed(FLOATS.values())}"
            raise ConfigError("sae.path", str(folder.path), allowed, because=because)
