"""The config and metadata of an SAE in sae-lens's format, read without loading its weights."""

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
    """The SAE in a folder of sae-lens's format, checked against its cfg.json.

    `index` and `hook` are those of `layer`; if they are `None`, cfg.json gives the place.

    Raises:
        ConfigError: If the folder contains no SAE, or its SAE does not fit the model or the place.
        UserError: If its files cannot be read.
    """
    folder = Path(path).expanduser()
    file = folder / "cfg.json"
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        near = nearest_name(folder.name, (entry.name for entry in folder.parent.glob("*")))
        raise ConfigError(
            "sae.path",
            path,
            "a folder in sae-lens's format, with cfg.json and sae_weights.safetensors",
            nearest=folder.parent / near if near else None,
            because=f"{file}: {error.strerror}",
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"sae.path = {path!r} cannot be used: {file} is not JSON ({error})") from error
    place = settled(trained_at(values, index), index, hook, path)
    check_width(values.get("d_in"), model, field="sae.path", name=path)
    if place is None:
        raise ConfigError("layer.index", None, f"the index of a block: {file} names no hook point")
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
        UserError: If it cannot be read.
    """
    file = folder / "sae_weights.safetensors"
    try:
        return sha256(file)
    except OSError as error:
        raise UserError(f"sae.path: {file} cannot be read: {error.strerror}") from error


def trained_at(values: dict[str, Any], block: int | None = None) -> Place | None:
    """The place that an SAE was trained at, according to its config; `None` if the config names none.

    Args:
        values: The config in sae-lens's format, of version 6 or before.
        block: The block that the SAE is requested for: an SAE may have been trained at several blocks.

    Raises:
        ConfigError: If no SAE can be spliced in at that place, or the SAE is a transcoder.
    """
    stated = values | (values.get("metadata") or {})
    hook, writes = stated.get("hook_name"), stated.get("hook_name_out")
    if writes not in (None, hook) or "transcoder" in str(stated.get("architecture")):
        raise ConfigError(
            "sae", writes or hook, "an SAE", because=f"it is a transcoder, which reads {hook}"
        )
    place = None if hook is None else known_place(hook)
    if place is not None and block is not None and block in stated.get("group_blocks", ()):
        return Place(block, place.hook)
    return place


def known_place(hookpoint: str) -> Place:
    """The place of an SAE's hookpoint.

    Raises:
        ConfigError: If no SAE can be spliced in there.
    """
    place = Place.named(hookpoint)
    if place is None:
        raise ConfigError("sae", hookpoint, f"an SAE at {PLACES}")
    return place


def settled(trained: Place | None, index: int | None, hook: Hook | None, name: str) -> Place | None:
    """The place that an SAE was trained at, checked against the place that `layer` asks for.

    If the training place is not known, it is the place that `layer` asks for; if `layer.index` is also
    null, it is `None`.

    Args:
        trained: The place that the SAE was trained at; `None` if it is not known.
        index: `layer.index`; `None` accepts any block.
        hook: `layer.hook`; `None` accepts any hook.
        name: The SAE's name, for messages.

    Raises:
        ConfigError: If the two places differ.
    """
    asked = None if index is None else Place.asked(index, hook)
    if trained is None:
        return asked
    if hook is not None and trained.hook is not canonical_hook(hook):
        allowed = f"{trained.hook.name}: {name} was trained at {trained}"
        raise ConfigError("layer.hook", hook.name, allowed, nearest=trained.hook.name)
    if asked is not None and trained.block != asked.block:
        allowed = f"the block that {name} was trained on, or null"
        raise ConfigError("layer.index", index, allowed, nearest=trained.index(hook))
    return trained


def check_width(d_in: int | None, model: Dimensions, *, field: str, name: str) -> None:
    """Check that the SAE's input is as wide as the model's residual stream.

    Raises:
        ConfigError: If the widths differ.
    """
    if d_in is not None and d_in != model.d_model:
        allowed = f"an SAE with d_in={model.d_model}, the width of the model"
        raise ConfigError(field, name, allowed, because=f"its d_in is {d_in}")
