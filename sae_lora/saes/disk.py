"""An SAE in a folder of sae-lens's format: what it says of itself, before its weights are loaded."""

import json
from pathlib import Path
from typing import Any

from sae_lora.config import SAEChoice
from sae_lora.dimensions import Dimensions, block_of
from sae_lora.errors import ConfigError, UserError, nearest_name
from sae_lora.files import sha256


def read_folder(path: str, block: int | None, model: Dimensions) -> SAEChoice:
    """The SAE in a folder of sae-lens's format, checked against what its own cfg.json says.

    Args:
        path: The folder.
        block: Where it is wanted; `None` for where it says.
        model: The model it is for.

    Raises:
        ConfigError: Where it is none, or does not fit.
        UserError: Where its files cannot be read.
    """
    folder = Path(path).expanduser()
    file = folder / "cfg.json"
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        near = nearest_name(folder.name, (entry.name for entry in _siblings(folder)))
        raise ConfigError(
            "sae.path",
            path,
            "a folder in sae-lens's format, with cfg.json and sae_weights.safetensors",
            nearest=folder.parent / near if near else None,
            because=f"{file}: {error.strerror}",
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"sae.path = {path!r} cannot be used: {file} is no JSON ({error})") from error
    says = metadata_block(values)
    check_fit(says, values.get("d_in"), block, model, field="sae.path", name=path)
    at = says if block is None else block
    if at is None:
        raise ConfigError("layer.index", None, f"a block's index: {file} names no hook point")
    metadata = values.get("metadata") or {}
    return SAEChoice(
        block=at,
        path=str(folder.resolve()),
        sha256=weights_digest(folder),
        width=values.get("d_sae"),
        l0=metadata.get("l0") or values.get("k"),
    )


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights file in a folder of sae-lens's format.

    Raises:
        UserError: Where it cannot be read.
    """
    file = folder / "sae_weights.safetensors"
    try:
        return sha256(file)
    except OSError as error:
        raise UserError(f"sae.path: {file} cannot be read: {error.strerror}") from error


def _siblings(folder: Path) -> list[Path]:
    return list(folder.parent.iterdir()) if folder.parent.is_dir() else []


def metadata_block(values: dict[str, Any]) -> int | None:
    """The block that an SAE's own config says it was trained at; `None` where it does not say.

    Args:
        values: The config of sae-lens's format, of version 6 or before.

    Raises:
        ConfigError: For an SAE of another place than the residual stream.
    """
    hook = (values.get("metadata") or {}).get("hook_name") or values.get("hook_name")
    if hook is None:
        return None
    block = block_of(hook)
    if block is None:
        raise ConfigError(
            "sae", hook, "an SAE of the residual stream (hook_resid_post or hook_resid_pre)"
        )
    return block


def check_fit(
    says: int | None, d_in: int | None, block: int | None, model: Dimensions, *, field: str, name: str
) -> None:
    """Refuses an SAE that was trained at another block or on another width than it would be used.

    Raises:
        ConfigError: Names both.
    """
    if says is not None and block is not None and says != block:
        raise ConfigError(
            "layer.index", block, f"the block that {name} was trained on, or null", nearest=says
        )
    if d_in is not None and d_in != model.d_model:
        raise ConfigError(
            field,
            name,
            f"an SAE of residuals of width {model.d_model}, the model's",
            because=f"it reads residuals of width {d_in}",
        )
