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
    """The SAE in a folder of sae-lens's format, checked against its own cfg.json.

    `index` and `hook` are those of `layer`; where they are `None`, cfg.json says the place.

    Raises:
        ConfigError: Where the folder holds no SAE, or one that does not fit.
        UserError: Where its files cannot be read.
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


def trained_at(values: dict[str, Any], block: int | None = None) -> Place | None:
    """The place that an SAE was trained at, as its own config says; `None` where it does not say.

    Args:
        values: The config in sae-lens's format, of version 6 or before.
        block: The block it is wanted at: one SAE may have been trained at several.

    Raises:
        ConfigError: For a place where no SAE can be spliced in, and for a transcoder.
    """
    stated = values | (values.get("metadata") or {})
    hook, writes = stated.get("hook_name"), stated.get("hook_name_out")
    if writes not in (None, hook) or "transcoder" in str(stated.get("architecture")):
        raise ConfigError(
            "sae", writes or hook, "an SAE", because=f"it is a transcoder, and reads {hook}"
        )
    place = None if hook is None else known_place(hook)
    if place is not None and block is not None and block in stated.get("group_blocks", ()):
        return Place(block, place.hook)
    return place


def known_place(hookpoint: str) -> Place:
    """The place of an SAE's hookpoint.

    Raises:
        ConfigError: For a place where no SAE can be spliced in.
    """
    place = Place.named(hookpoint)
    if place is None:
        raise ConfigError("sae", hookpoint, f"an SAE at {PLACES}")
    return place


def settled(trained: Place | None, index: int | None, hook: Hook | None, name: str) -> Place | None:
    """The place of an SAE: where it was trained, which must be the place that is asked for.

    It is `None` where neither the SAE nor `layer.index` names a block.

    Args:
        trained: Where it was trained; `None` where it does not say.
        index: `layer.index`; `None` for any.
        hook: `layer.hook`; `None` for any.
        name: The SAE's name, for messages.

    Raises:
        ConfigError: Where it was trained at another place; names both.
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
    """Refuse an SAE of another width than the model's, which is the same at all places.

    Raises:
        ConfigError: Names both widths.
    """
    if d_in is not None and d_in != model.d_model:
        allowed = f"an SAE of residuals of width {model.d_model}, the model's"
        raise ConfigError(field, name, allowed, because=f"it reads residuals of width {d_in}")
