"""Folders with SAEs: their format, by their files, and their config in SAELens's words. No torch."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name
from sae_lora.common.files import sha256
from sae_lora.saes.formats.configs import (
    DICTIONARY_LEARNING,
    FORMATS,
    SAE_LENS,
    SPARSIFY,
    Format,
    of_dictionary_learning,
    of_sparsify,
    read_json,
)

SCALER = "activation_scaler.json"
"""The file in which a training checkpoint of SAELens keeps the factor of its input."""
UNUSED_FACTOR = "unused_factor"
"""Key that `read` adds to the metadata: a factor in that file which the config does not ask for."""
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
    values = read_json(path, folder / format.config)
    if format is SAE_LENS:  # null means that nothing is stated, also for metadata
        values = {key: value for key, value in values.items() if value is not None}
    match format.name:
        case SPARSIFY.name:
            values = of_sparsify(path, folder, values)
        case DICTIONARY_LEARNING.name:
            values = of_dictionary_learning(path, values)
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
    for format in FORMATS:
        if (folder / format.config).is_file() and (folder / format.weights).is_file():
            return format
    if (folder / SAE_LENS.config).is_file():  # the weights are missing, which `digest` reports
        values = read_json(path, folder / SAE_LENS.config)
        is_sparsify = "num_latents" in values or ("expansion_factor" in values and "d_sae" not in values)
        return SPARSIFY if is_sparsify else SAE_LENS
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    because = "it has none of these files"
    nearest: Path | None = None
    if unread := names & _UNREAD.keys():
        because = f"its format is that of {_UNREAD[unread.pop()]}"
    elif inside := sorted(filter(_holds_sae, [*folder.glob("*"), *folder.glob("sae/*")])):
        names_inside = [entry.relative_to(folder).as_posix() for entry in inside]
        because = f"it is a folder of SAEs: {listed(names_inside)}"
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
    elif half := [format for format in FORMATS if {format.config, format.weights} & names]:
        files = {half[-1].config, half[-1].weights}
        because = f"it has {listed(files & names)} without {listed(files - names)}"
    elif not names and not folder.is_dir():
        because = "there is no such folder"
        beside = {entry.name for entry in folder.parent.glob("*") if _holds_sae(entry)}
        near = nearest_name(folder.name, beside - {folder.name})
        nearest = folder.parent / near if near else None
    files = "; ".join(f"{format.config} and {format.weights} ({format.name})" for format in FORMATS)
    raise ConfigError("sae.path", path, f"a folder with {files}", nearest=nearest, because=because)


def _checkpoint(path: Path) -> Path | None:
    """A checkpoint of dictionary_learning: this file, or the last in this folder; `None` without one."""
    run = path.parent.parent if path.is_file() else path.parent if path.name == "checkpoints" else path
    checkpoints = sorted(run.glob(_CHECKPOINTS))
    return path if path in checkpoints else checkpoints[-1] if checkpoints and path.is_dir() else None


def _holds_sae(folder: Path) -> bool:
    return any(
        (folder / format.config).is_file() and (folder / format.weights).is_file() for format in FORMATS
    )


def _factor(path: str, folder: Path) -> Any:
    """The factor of the input in a training checkpoint of SAELens; `None` if the folder states none."""
    file = folder / SCALER
    return read_json(path, file).get("scaling_factor") if file.is_file() else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
