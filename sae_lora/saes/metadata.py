"""An SAE in a folder of sae-lens's format: what it says of itself, before its weights are loaded."""

import json
from pathlib import Path
from typing import Any

from sae_lora.common.errors import ConfigError, UserError, nearest_name
from sae_lora.common.files import sha256
from sae_lora.config.enums import Hook
from sae_lora.config.schema import SAEChoice
from sae_lora.models.dimensions import Dimensions
from sae_lora.models.hookpoints import PLACES, Place, canonical_hook


def read_folder(path: str, index: int | None, hook: Hook | None, model: Dimensions) -> SAEChoice:
    """The SAE in a folder of sae-lens's format, checked against what its own cfg.json says.

    Args:
        path: The folder.
        index: The block it is wanted at; `None` for where it says.
        hook: What it is to replace there; likewise.
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
    place = settled(trained_at(values, index), index, hook, path)
    check_width(values.get("d_in"), model, field="sae.path", name=path)
    if place is None:
        raise ConfigError("layer.index", None, f"a block's index: {file} names no hook point")
    metadata = values.get("metadata") or {}
    return SAEChoice(
        block=place.block,
        hook=place.hook,
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


def trained_at(values: dict[str, Any], block: int | None = None) -> Place | None:
    """The place that an SAE's own config says it was trained at; `None` where it does not say.

    Args:
        values: The config of sae-lens's format, of version 6 or before.
        block: Where it is wanted: one SAE may have been trained at several blocks.

    Raises:
        ConfigError: For an SAE of a place that is not known here, and for a transcoder.
    """
    said = values | (values.get("metadata") or {})
    hook, writes = said.get("hook_name"), said.get("hook_name_out")
    if writes not in (None, hook) or "transcoder" in str(said.get("architecture")):
        raise ConfigError(
            "sae", writes or hook, "an SAE", because=f"it is a transcoder, and reads {hook}"
        )
    place = None if hook is None else known_place(hook)
    if place is not None and block is not None and block in said.get("group_blocks", ()):
        return Place(block, place.hook)
    return place


def known_place(hookpoint: str) -> Place:
    """The place that a hookpoint of an SAE names.

    Raises:
        ConfigError: Where it is another than an SAE can be spliced in at.
    """
    place = Place.named(hookpoint)
    if place is None:
        raise ConfigError("sae", hookpoint, f"an SAE at {PLACES}")
    return place


def settled(says: Place | None, index: int | None, hook: Hook | None, name: str) -> Place | None:
    """Where an SAE is to sit: where it says, if nothing else is asked for.

    Args:
        says: Where it was trained; `None` where it does not say.
        index: The block that is asked for; `None` for any.
        hook: What of it is asked for; likewise.
        name: Of the SAE, for messages.

    Returns:
        Its place; `None` where nobody says the block.

    Raises:
        ConfigError: Where it was trained elsewhere than is asked for; names both.
    """
    asked = None if index is None else Place.asked(index, hook)
    if says is None:
        return asked
    if hook is not None and says.hook is not canonical_hook(hook):
        raise ConfigError(
            "layer.hook",
            hook.name,
            f"{says.hook.name}: {name} was trained at {says}",
            nearest=says.hook.name,
        )
    if asked is not None and says.block != asked.block:
        raise ConfigError(
            "layer.index",
            index,
            f"the block that {name} was trained on, or null",
            nearest=says.index(hook),
        )
    return says


def check_width(d_in: int | None, model: Dimensions, *, field: str, name: str) -> None:
    """Refuses an SAE of another width than the model's: all places in it are as wide.

    Raises:
        ConfigError: Names both.
    """
    if d_in is not None and d_in != model.d_model:
        raise ConfigError(
            field,
            name,
            f"an SAE of residuals of width {model.d_model}, the model's",
            because=f"it reads residuals of width {d_in}",
        )
