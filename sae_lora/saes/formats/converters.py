"""Weights of SAEs that other libraries wrote, for SAELens's loader."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from sae_lens.loading.pretrained_sae_loaders import (
    get_sae_lens_config_from_hf,
    sae_lens_disk_loader,
    sae_lens_huggingface_loader,
)
from torch import Tensor

from sae_lora.saes.formats import folder as folders
from sae_lora.saes.formats.configs import SAE_LENS
from sae_lora.saes.formats.tensors import weights_of
from sae_lora.saes.formats.weights import (
    FACTORS,
    check_factors,
    check_types_of_hub,
    refused_factors,
)

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
    folder = folders.read(str(path))
    if folder.format is SAE_LENS:
        values, weights = sae_lens_disk_loader(path, device, (cfg_overrides or {}) | _WITH_FACTORS)
        if (factors := _factors_in(weights)) is not None:
            check_factors(folder)
            weights["W_dec"] = weights["W_dec"] * factors[:, None]
        return _without_null(values), weights
    values = {"device": device, "sae_lens_version": "6.0.0"} | folder.values | (cfg_overrides or {})
    # A copy: the file may be written anew while it is mapped.
    return values, {
        name: weight.to(device, copy=True, memory_format=torch.contiguous_format)
        for name, weight in weights_of(folder).items()
    }


def load_from_hub(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """Config, weights and sparsity of an SAE of the hub: a converter of SAELens's format.

    Raises:
        ValueError: If its weights are no floats, or it has factors of latents that are not applied.
    """
    overrides = cfg_overrides or {}
    values, weights, sparsity = sae_lens_huggingface_loader(
        repo_id, folder_name, device, force_download, overrides | _WITH_FACTORS
    )
    # SAELens has converted the weights; the file, which is now in the cache, says their types.
    check_types_of_hub(hf_hub_download(repo_id=repo_id, filename=f"{folder_name}/{SAE_LENS.weights}"))
    if (factors := _factors_in(weights)) is not None:
        stated = get_sae_lens_config_from_hf(repo_id, folder_name, cfg_overrides=overrides)
        if reason := refused_factors(stated):
            raise ValueError(reason)
        weights["W_dec"] = weights["W_dec"] * factors[:, None]
    return _without_null(values), weights, sparsity


def _without_null(values: dict[str, Any]) -> dict[str, Any]:
    """The config without values that state nothing, null and `{}`: SAELens fails on some of them."""
    return {key: value for key, value in values.items() if value not in (None, {})}


_WITH_FACTORS = {"finetuning_scaling_factor": True}
"""Override for SAELens's loaders, which refuse factors of latents. None of its classes applies them."""


def _factors_in(weights: dict[str, Tensor]) -> Tensor | None:
    """Take the factors of latents, `[d_sae]`, out of the weights; `None` if all are 1."""
    for name in FACTORS:
        factors = weights.pop(name, None)
        if factors is not None and not factors.allclose(torch.ones_like(factors)):
            return factors
    return None
