"""Weights of SAEs that other libraries wrote, for SAELens's loader."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from safetensors.torch import load_file
from torch import Tensor

from sae_lora.common.errors import UserError, listed
from sae_lora.saes import formats
from sae_lora.saes.formats import DICTIONARY_LEARNING, SAE_LENS, SPARSIFY, SAEFolder

Loaded = tuple[dict[str, Any], dict[str, Tensor]]
"""A config and the weights, both under SAELens's names."""


def load(path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None) -> Loaded:
    """Config and weights of an SAE in a folder of any known format: a converter for SAELens's loader.

    SAELens's own converters of these formats are not used. That of sparsify transposes `W_dec` and does
    not subtract `b_dec` from the input; that of dictionary_learning reads only repositories of the hub.

    Raises:
        ConfigError: If the folder contains no SAE that can be used.
        UserError: If a file cannot be read.
    """
    folder = formats.read(str(path))
    if folder.format is SAE_LENS:
        return sae_lens_disk_loader(path, device, cfg_overrides)
    values: dict[str, Any] = {"device": device, "sae_lens_version": "6.0.0"} | folder.values
    read, names, other = _NAMES[folder.format.name]
    tensors = read(folder.weights)
    if unread := tensors.keys() - {source for sources in names.values() for source in sources} - other:
        raise _unusable(folder, f"holds {listed(sorted(unread))}, which no SAE of this kind has")
    weights = {
        name: tensors[source].T.contiguous() if is_transposed else tensors[source]
        for name, sources in names.items()
        for source, is_transposed in sources.items()
        if source in tensors
    }
    if values["architecture"] == "jumprelu":
        if "threshold" not in tensors:
            raise _unusable(
                folder, "has no threshold: the latents of a token depend on the other tokens of a batch"
            )
        weights["threshold"] = tensors["threshold"].expand(values["d_sae"]).contiguous()
    k = int(tensors["k"]) if "k" in tensors else None
    if values["architecture"] == "topk" and k not in (None, values["k"]):
        raise _unusable(folder, f"has k={k}, but the config says k: {values['k']}")
    return values | (cfg_overrides or {}), {name: weight.to(device) for name, weight in weights.items()}


def _unusable(folder: SAEFolder, reason: str) -> UserError:
    return UserError(f"sae.path = {str(folder.path)!r} cannot be used: {folder.weights} {reason}")


def _pickled(file: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch. Code in it is never run."""
    return torch.load(file, map_location="cpu", weights_only=True)


_Sources = Mapping[str, bool]
"""Names of a weight in a file; true if the file holds its transpose."""
_NAMES: dict[str, tuple[Callable[[Path], dict[str, Tensor]], dict[str, _Sources], set[str]]] = {
    SPARSIFY.name: (
        load_file,
        {
            "W_enc": {"encoder.weight": True},
            "b_enc": {"encoder.bias": False},
            "W_dec": {"W_dec": False},
            "b_dec": {"b_dec": False},
        },
        set(),
    ),
    DICTIONARY_LEARNING.name: (
        _pickled,
        {
            "W_enc": {"W_enc": False, "encoder.weight": True},
            "b_enc": {"b_enc": False, "encoder.bias": False},
            "W_dec": {"W_dec": False, "decoder.weight": True},
            "b_dec": {"b_dec": False, "bias": False, "decoder_bias": False, "decoder.bias": False},
            "b_gate": {"gate_bias": False},
            "b_mag": {"mag_bias": False},
            "r_mag": {"r_mag": False},
        },
        {"threshold", "k", "group_sizes"},
    ),
}
"""By format: the function that reads its weights file; the names of weights, in SAELens and in the file;
other tensors in the file."""
