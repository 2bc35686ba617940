"""Places that SAEs and transcoders were trained at, checked against those that a run asks for.

Imports no torch.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from sae_lora.common.errors import ConfigError, listed
from sae_lora.config.enums import Hook, Reads
from sae_lora.models.hookpoints import (
    PLACES,
    READINGS,
    Place,
    canonical_hook,
    known_place,
    known_reading,
    output_of_mlp,
)
from sae_lora.saes.formats.configs import SOURCE_OF_HOOK

TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
"""SAELens's architectures of transcoders."""


def is_transcoder(about: Mapping[str, Any]) -> bool:
    """True for what an SAE's metadata states if it is a transcoder."""
    return about.get("architecture") in TRANSCODERS


def hooks_of(block: int, reads: Reads) -> dict[str, str]:
    """The metadata for a transcoder of a block that reads this activation."""
    name = {
        Reads.mlp_in: "mlp.hook_in",
        Reads.mlp_normalized: "ln2.hook_normalized",
        Reads.resid_mid: "hook_resid_mid",
    }[reads]
    return {"hook_name": f"blocks.{block}.{name}", "hook_name_out": str(Place(block, Hook.mlp_out))}


def reading(about: Mapping[str, Any], field: str, name: str, source: str = "metadata") -> Reads | None:
    """The activation that a transcoder was trained on, by its metadata; `None` if it states none.

    SAELens names a module of transformers beside its own hook if it knows one; the module counts,
    because not all libraries mean the same by a hook's name.

    Args:
        about: What its metadata states, after `check`.
        field, name: The key that names the transcoder, and its value, for the message.
        source: The file of its metadata, for the message.

    Raises:
        ConfigError: If no transcoder can read this activation, or it writes to another block.
    """
    hooks = [about[key] for key in ("hf_hook_name", "hook_name") if key in about]
    if not hooks:
        return None
    known = next((known for hook in hooks if (known := known_reading(hook)) is not None), None)
    if known is None:
        allowed = f"a transcoder that reads {READINGS}"
        raise ConfigError(field, name, allowed, because=f"it reads {hooks[-1]}, by its {source}")
    block, reads = known
    place = trained_at(about, field, name, None, source)
    if place is not None and place.block != block:
        allowed = "a transcoder that reads and writes one block"
        because = f"it reads block {block} and writes block {place.block}, by its {source}"
        raise ConfigError(field, name, allowed, because=because)
    return reads


def reads_of(
    about: Mapping[str, Any], asked: Reads | None, field: str, name: str, source: str = "metadata"
) -> Reads | None:
    """The activation that a transcoder reads: `layer.reads`, or else by its metadata. `None`: an SAE.

    Args:
        about: What its metadata states, after `check`.
        asked: `layer.reads`.
        field, name: The key that names the transcoder, and its value, for the message.
        source: The file of its metadata, for the message.

    Raises:
        ConfigError: If an SAE is asked to read another activation than it replaces, or if neither says
            what a transcoder reads.
    """
    if not is_transcoder(about):
        if asked is not None:
            because = f"{name} is an SAE, which reads what it replaces"
            raise ConfigError("layer.reads", asked.name, "null", "null", because)
        return None
    if (reads := asked or reading(about, field, name, source)) is None:
        because = f"the {source} of {name} does not say what this transcoder reads"
        raise ConfigError("layer.reads", None, listed(each.name for each in Reads), "mlp_in", because)
    return reads


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
    hook = about.get("hook_name_out" if is_transcoder(about) else "hook_name")
    if hook is None:
        return None
    if is_transcoder(about):
        place = output_of_mlp(hook)
        if place is None:
            allowed = "a transcoder that writes blocks.{l}.hook_mlp_out"
            raise ConfigError(field, name, allowed, because=f"it writes {hook}, by its {source}")
        return place
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
