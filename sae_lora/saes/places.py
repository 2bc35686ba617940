"""Places that SAEs were trained at, checked against those that a run asks for. Imports no torch."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Hook
from sae_lora.models.hookpoints import PLACES, Place, canonical_hook, known_place
from sae_lora.saes.formats.configs import SOURCE_OF_HOOK


def trained_at(
    about: Mapping[str, Any], field: str, name: str, block: int | None = None, source: str = "metadata"
) -> Place | None:
    """The place that an SAE was trained at, by its metadata; `None` if the metadata names none.

    Args:
        about: What its metadata states, after `check`.
        field, name: The key that names the SAE, and its value, for the message.
        block: The block that the SAE is requested for: an SAE may have been trained at several blocks.
        source: The file of its metadata, for the message.

    Raises:
        ConfigError: If no SAE can be spliced in at that place.
    """
    hook = about.get("hook_name")
    if hook is None:
        return None
    place = known_place(hook)
    if place is None:
        origin = about.get(SOURCE_OF_HOOK, f"the hook_name in its {source}")
        meant = _meant(hook)
        allowed = f"an SAE at {PLACES}; if {hook} is " + (
            f"meant as {meant}, correct {origin}"
            if meant
            else f"one of these in this model, change {origin} and set layer.index and layer.hook"
        )
        raise ConfigError(field, name, allowed, because=f"its hook point is {hook}, by {origin}")
    if block is not None and block in about.get("group_blocks", ()):
        return Place(block, place.hook)
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


def _meant(hook: str) -> str | None:
    """The name of a place that differs from this unknown name by a slip of spelling only."""
    if known_place(lower := hook.lower()):
        return lower
    block = re.search(r"(?<![-\d])\d+", hook)
    names = [f"blocks.{block[0]}.hook_{hook.name}" for hook in Hook] if block else []
    # Names of other places, such as hook_resid_mid, are less similar.
    close = get_close_matches(lower, filter(known_place, names), n=1, cutoff=0.9)
    return close[0] if close else None
