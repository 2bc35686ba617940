"""Tensors in an SAE's folder, under SAELens's names. Needs torch, but not SAELens."""

import struct
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any, TypeGuard
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_lora.common.errors import UserError, is_out_of_memory, listed
from sae_lora.saes.formats.configs import DICTIONARY_LEARNING, SAE_LENS
from sae_lora.saes.formats.folder import SAEFolder
from sae_lora.saes.formats.weights import NAMES, Stored, check_stored, damaged

_OTHER = {"threshold", "k", "group_sizes"}
"""Tensors of dictionary_learning that are no weights in SAELens, or not in this shape."""
_DAMAGED = (
    BadZipFile,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ImportError,
    OverflowError,
    struct.error,
)
"""Errors of torch for a file that is not what torch has written: it interprets the file's bytes."""


def weights_of(folder: SAEFolder) -> dict[str, Tensor]:
    """The weights of an SAE, checked against its config and mapped from their file.

    The header of a safetensors file must have been checked (`weights.check_weights`).

    Raises:
        ConfigError: If a weight is missing, or has another shape or type.
        UserError: If the file is damaged, or holds something else.
    """
    if folder.format is SAE_LENS:
        return load_file(folder.weights)
    is_pickled = folder.format is DICTIONARY_LEARNING
    tensors: Any = _unpickled(folder) if is_pickled else load_file(folder.weights)
    if not isinstance(tensors, dict):
        raise _unusable(folder, f"holds no weights by name but a {type(tensors).__name__}")
    names = NAMES[folder.format.name]
    sources = {source for sources in names.values() for source in sources}
    other = _OTHER if is_pickled else set()
    if unread := tensors.keys() - sources - other:
        raise _unusable(
            folder, f"holds {listed(sorted(map(str, unread)))}, which no SAE of this kind has"
        )
    if others := [name for name in sources & tensors.keys() if not _is_tensor(tensors[name])]:
        raise _unusable(folder, f"holds values that are no tensors: {listed(sorted(others))}")
    weights = {
        name: tensors[source].T if is_transposed else tensors[source]
        for name, sources in names.items()
        for source, is_transposed in sources.items()
        if source in tensors
    }
    values = folder.values
    if values["architecture"] == "jumprelu":
        weights["threshold"] = _threshold(folder, tensors)
    if is_pickled and values["architecture"] == "topk" and "k" in tensors:
        k = tensors["k"]
        k = k.tolist() if _is_tensor(k) else k
        if k != values["k"]:
            raise _unusable(folder, f"has k={k}, but {folder.format.config} says k: {values['k']}")
    stored = {
        name: Stored(list(weight.shape), str(weight.dtype).removeprefix("torch."))
        for name, weight in weights.items()
    }
    check_stored(folder, stored)
    return weights


def _threshold(folder: SAEFolder, tensors: Mapping[str, Any]) -> Tensor:
    """The threshold of each latent, `[d_sae]`; dictionary_learning also stores it as one number.

    Raises:
        UserError: If there is none.
    """
    if "threshold" not in tensors:
        raise _unusable(
            folder, "has no threshold: the latents of a token depend on the other tokens of a batch"
        )
    threshold = tensors["threshold"]
    if isinstance(threshold, int | float) and not isinstance(threshold, bool):
        threshold = torch.tensor(float(threshold))
    if not _is_tensor(threshold):
        raise _unusable(folder, f"has a threshold that is no number: {threshold!r}")
    return threshold.reshape(()).expand(folder.values["d_sae"]) if threshold.numel() == 1 else threshold


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    """True for a tensor with values."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def _unusable(folder: SAEFolder, reason: str) -> UserError:
    return UserError(f"sae.path = {str(folder.path)!r} cannot be used: {folder.weights} {reason}")


def _unpickled(folder: SAEFolder) -> Any:
    """The content of a file of torch. Code in it is never run.

    Raises:
        UserError: If it is damaged, or holds more than tensors.
    """
    file = folder.weights
    try:
        if is_zip := is_zipfile(file):  # torch does not compare its checksums
            with ZipFile(file) as archive:
                if archive.testzip() is not None:
                    raise damaged(folder)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise UserError(f"sae.path: {file} cannot be read: {error.strerror or error}") from error
    except UnpicklingError as error:
        reason = "is damaged, or holds more than tensors; code in a file is never run"
        raise _unusable(folder, reason) from error
    except _DAMAGED as error:
        if is_out_of_memory(error):
            raise
        raise damaged(folder) from error
