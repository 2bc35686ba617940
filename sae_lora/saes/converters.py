"""Weights of SAEs that other libraries wrote, for SAELens's loader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens.loading.pretrained_sae_loaders import (
    get_sae_lens_config_from_hf,
    sae_lens_disk_loader,
    sae_lens_huggingface_loader,
)
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
        values, weights = sae_lens_disk_loader(path, device, (cfg_overrides or {}) | _WITH_FACTORS)
        if (factors := _factors_in(weights)) is not None:
            formats.check_factors(folder)
            weights["W_dec"] = weights["W_dec"] * factors[:, None]
        return values, weights
    values: dict[str, Any] = {"device": device, "sae_lens_version": "6.0.0"} | folder.values
    names = formats.NAMES[folder.format.name]
    tensors = _READERS[folder.format.name](folder.weights)
    if not isinstance(tensors, dict):
        raise _unusable(folder, f"holds no weights by name but a {type(tensors).__name__}")
    sources = {source for sources in names.values() for source in sources}
    other = _OTHER if folder.format is DICTIONARY_LEARNING else set()
    if unread := tensors.keys() - sources - other:
        raise _unusable(
            folder, f"holds {listed(sorted(map(str, unread)))}, which no SAE of this kind has"
        )
    if others := [name for name in sources & tensors.keys() if not isinstance(tensors[name], Tensor)]:
        raise _unusable(folder, f"holds values that are no tensors: {listed(sorted(others))}")
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
        threshold = torch.as_tensor(tensors["threshold"])
        weights["threshold"] = threshold.expand(values["d_sae"]).contiguous()
    k = int(tensors["k"]) if "k" in tensors else None
    if values["architecture"] == "topk" and k not in (None, values["k"]):
        raise _unusable(folder, f"has k={k}, but the config says k: {values['k']}")
    formats.check_shapes(folder, {name: weight.shape for name, weight in weights.items()})
    return values | (cfg_overrides or {}), {name: weight.to(device) for name, weight in weights.items()}


def load_from_hub(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """Config, weights and sparsity of an SAE of the hub: a converter of SAELens's format.

    Raises:
        ValueError: If it has factors of latents that are not applied.
    """
    overrides = cfg_overrides or {}
    values, weights, sparsity = sae_lens_huggingface_loader(
        repo_id, folder_name, device, force_download, overrides | _WITH_FACTORS
    )
    if (factors := _factors_in(weights)) is not None:
        stated = get_sae_lens_config_from_hf(repo_id, folder_name, cfg_overrides=overrides)
        if reason := formats.refused_factors(stated):
            raise ValueError(reason)
        weights["W_dec"] = weights["W_dec"] * factors[:, None]
    return values, weights, sparsity


_WITH_FACTORS = {"finetuning_scaling_factor": True}
"""Override for SAELens's loaders, which refuse factors of latents. None of its classes applies them."""


def _factors_in(weights: dict[str, Tensor]) -> Tensor | None:
    """Take the factors of latents, `[d_sae]`, out of the weights; `None` if all are 1."""
    for name in formats.FACTORS:
        factors = weights.pop(name, None)
        if factors is not None and not factors.allclose(torch.ones_like(factors)):
            return factors
    return None


def _unusable(folder: SAEFolder, reason: str) -> UserError:
    return UserError(f"sae.path = {str(folder.path)!r} cannot be used: {folder.weights} {reason}")


def _pickled(file: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch. Code in it is never run."""
    return torch.load(file, map_location="cpu", weights_only=True)


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    SPARSIFY.name: load_file,
    DICTIONARY_LEARNING.name: _pickled,
}
_OTHER = {"threshold", "k", "group_sizes"}
"""Tensors of dictionary_learning that are no weights in SAELens, or not in this shape."""
