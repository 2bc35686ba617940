"""The SAEs that a config asks for, looked up in tables and small config files without loading them."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sae_lora.common.errors import ConfigError, NoSuchCellError, listed, nearest_name
from sae_lora.config.enums import TRANSCODING, Architecture, Hook, Reads, SAEFamily
from sae_lora.config.schema import Config, ModelConfig, SAEChoice, as_list
from sae_lora.config.validate import latents
from sae_lora.embedded import BLOCK as EMBEDDED_BLOCK
from sae_lora.embedded import SAES as EMBEDDED_SAES
from sae_lora.models.dimensions import EMBEDDED_NAME, Dimensions
from sae_lora.models.hookpoints import PLACES, Place, canonical_hook, known_place
from sae_lora.saes.metadata import check, read_folder, read_folders, stated_by
from sae_lora.saes.places import settled
from sae_lora.saes.pretrained_table import (
    SUBLAYERS,
    gemma_scope_for,
    place_in,
    reading_of,
    release_named,
    table,
    transcoders_for,
    width_in,
)


class Resolution(NamedTuple):
    """The SAEs that a config asks for.

    Args:
        choices: One SAE per block, in the order of their places.
        notes: One line for each difference between an SAE and the request.
    """

    choices: list[SAEChoice]
    notes: list[str]


def resolve(config: Config, model: Dimensions, groups: Sequence[list[int]] | None = None) -> Resolution:
    """Resolve the request of a config: the nearest existing SAEs, or new SAEs.

    Args:
        config: The config.
        model: The size of the model.
        groups: The blocks that share each new SAE, if `layer` asks for groups.

    Raises:
        NoSuchCellError: If no SAE exists for that block and width, or with `launcher.strict` for exactly
            that width and L0.
        ConfigError: If the request does not fit the model.
        UserError: If an SAE's files cannot be read.
    """
    sae = config.sae
    for block in as_list(config.layer.index):
        if block is not None:
            _check_block(block, config.model, model)
    notes = []
    if config.model.middle_block is None and _takes_middle_block(config, groups):
        middle = EMBEDDED_BLOCK if config.model.name == EMBEDDED_NAME else model.n_blocks // 2
        config = replace(config, model=replace(config.model, middle_block=middle))
        if config.model.name != EMBEDDED_NAME:
            notes.append(
                f"layer.index={middle} of {model.n_blocks} blocks, because nothing names a block"
            )
    match sae.family:
        case SAEFamily.identity:
            resolution = Resolution(_anywhere(config, model), [])
        case SAEFamily.new:
            resolution = _new(config, model, groups)
        case SAEFamily.disk:
            resolution = Resolution(_on_disk(config, model), [])
        case SAEFamily.registry if sae.id is not None:
            resolution = Resolution([_by_id(config)], [])
        case SAEFamily.tiny:
            if config.model.name != EMBEDDED_NAME:
                raise ConfigError(
                    "sae.family",
                    "tiny",
                    "gemma_scope, llama_scope, registry or disk; method=sae sae=new trains one",
                    because=f"the tiny SAEs belong to model=tiny, not to {config.model.name!r}",
                )
            resolution = _nearest_at_each_block(config, _embedded_candidates())
        case SAEFamily.gemma_scope:
            release = _gemma_scope_release(config)
            resolution = _nearest_at_each_block(config, _release_candidates(release, config))
        case SAEFamily.llama_scope:
            resolution = _nearest_at_each_block(config, _llama_scope_candidates(config))
        case SAEFamily.transcoder:
            resolution = _nearest_at_each_block(config, _transcoder_candidates(config))
        case SAEFamily.registry:
            assert sae.release is not None
            resolution = _nearest_at_each_block(config, _release_candidates(sae.release, config))
        case _:
            raise NotImplementedError(sae.family)
    for choice in resolution.choices:
        _check_block(choice.block, config.model, model)
        if choice.release is not None:
            check(stated_by(choice), "sae.release", choice.release)
    return Resolution(resolution.choices, [*notes, *resolution.notes])


def _takes_middle_block(config: Config, groups: Sequence[list[int]] | None) -> bool:
    """True if `model.middle_block` gives the place: neither `layer`, nor an id, nor a folder does."""
    sae, layer = config.sae, config.layer
    names_place = sae.id is not None or (sae.path is not None and "{block}" not in sae.path)  # or a list
    return layer.index is None and layer.every is None and groups is None and not names_place


def _check_block(block: int, config: ModelConfig, model: Dimensions) -> None:
    if not 0 <= block < model.n_blocks:
        last = model.n_blocks - 1
        allowed = f"a block from 0 to {last} ({config.name} has {model.n_blocks})"
        raise ConfigError("layer.index", block, allowed, nearest=max(0, min(block, last)))


def _requested_blocks(config: Config, blocks: Collection[int]) -> list[int]:
    """The blocks that `layer` asks for. With `resid_pre`, the SAE replaces the input of its block.

    `layer.every` takes every n-th block from `layer.first`, or the first of `blocks`, to the last of
    `blocks`.

    Args:
        config: The config.
        blocks: The blocks that have an SAE at this hook.

    Raises:
        NoSuchCellError: If `layer.first` or `layer.every` takes a block that has no SAE at this hook.
    """
    layer = config.layer
    if layer.every is None:
        return sorted(as_list(config.model.middle_block if layer.index is None else layer.index))
    first = min(blocks) if layer.first is None else layer.first
    if first not in blocks:
        nearest = min(blocks, key=lambda block: abs(block - first), default=None)
        allowed = f"a block that has an SAE at this hook: {listed(blocks, 50)}"
        raise NoSuchCellError("layer.first", first, allowed, nearest)
    requested = list(range(first, max(blocks) + 1, layer.every))
    if missing := [block for block in requested if block not in blocks]:
        raise NoSuchCellError(
            "layer.every",
            layer.every,
            f"a step that takes only blocks that have an SAE at this hook: {listed(blocks, 50)}",
            because=f"from block {first} on it also takes {listed(missing)}",
        )
    return requested


def _anywhere(config: Config, model: Dimensions) -> list[SAEChoice]:
    """SAEs at the requested places, for families that have an SAE at every place."""
    hook = config.layer.hook
    blocks = range(hook is Hook.resid_pre, model.n_blocks)  # block 0 does not read the output of a block
    places = [Place.asked(index, hook) for index in _requested_blocks(config, blocks)]
    return [SAEChoice(block=place.block, hook=place.hook) for place in places]


def _new(config: Config, model: Dimensions, groups: Sequence[list[int]] | None) -> Resolution:
    """New SAEs, which the run trains."""
    sae = config.sae
    assert sae.width is not None
    l0, notes = sae.l0, []
    penalised = Architecture.standard, Architecture.gated, Architecture.transcoder
    if sae.architecture in penalised and l0 is not None:
        name = sae.architecture.name
        notes.append(f"sae.l0={l0:g} is not used: a {name} SAE has sae.sparsity_coefficient instead")
        l0 = None
    if groups is None and sae.architecture in TRANSCODING:
        reads = config.layer.reads or Reads.mlp_in
        blocks = _requested_blocks(config, range(model.n_blocks))
        choices = [SAEChoice(block=block, hook=Hook.mlp_out, reads=reads) for block in blocks]
    elif groups is None:
        choices = _anywhere(config, model)
    else:
        choices = [SAEChoice(block=block, group=group) for group in groups for block in group]
    choices = [replace(choice, width=latents(sae.width), l0=l0) for choice in choices]
    return Resolution(sorted(choices, key=lambda choice: choice.block), notes)


def _width(choice: SAEChoice) -> int:
    """The width that the table states; 0 if it states none."""
    return choice.width or 0


def _l0(choice: SAEChoice) -> float:
    """The L0 that the table states; 0 if it states none."""
    return choice.l0 or 0.0


def _nearest_at_each_block(config: Config, everywhere: Sequence[SAEChoice]) -> Resolution:
    """The SAE nearest to `sae.width` and `sae.l0` at each requested block.

    `everywhere` are all SAEs of the family, at all places.
    """
    sae, hook, strict = config.sae, config.layer.hook, config.launcher.strict
    choices, blocks_by_note = [], defaultdict[str, list[int]](list)
    candidates = _at_hook(hook, everywhere)
    blocks = sorted({Place.of(choice).index(hook) for choice in candidates})
    for index in _requested_blocks(config, blocks):
        block = Place.asked(index, hook).block
        at_block = [choice for choice in candidates if choice.block == block]
        if not at_block:
            allowed = f"a block that has an SAE at this hook: {listed(blocks, 50)}"
            nearest = min(blocks, key=lambda at: abs(at - index))
            raise NoSuchCellError("layer.index", index, allowed, nearest)
        if sae.width is not None and any(map(_width, at_block)):
            at_block = _of_width(sae.width, at_block, candidates, strict)
        if sae.l0 is not None and any(map(_l0, at_block)):
            sparsities = sorted(set(map(_l0, at_block)))
            at_block = _nearest(at_block, _l0, sae.l0)
            if strict and _l0(at_block[0]) != sae.l0:
                allowed = (
                    f"with launcher.strict, an L0 that exists at block {block}: {listed(sparsities)}"
                )
                raise NoSuchCellError("sae.l0", sae.l0, allowed, f"{_l0(at_block[0]):g}")
        widths, sparsities = sorted(set(map(_width, at_block))), sorted(set(map(_l0, at_block)))
        if len(widths) > 1:
            raise ConfigError("sae.width", None, f"one of {listed(widths)}", nearest=widths[0])
        if len(at_block) > 1:
            raise ConfigError("sae.l0", None, f"one of {listed(sparsities)}", nearest=sparsities[0])
        (choice,) = at_block
        choices.append(choice)
        values: list[tuple[str, float | None, float]] = [
            ("sae.width", None if sae.width is None else latents(sae.width), _width(choice)),
            ("sae.l0", sae.l0, _l0(choice)),
        ]
        for name, requested, actual in values:
            if requested is not None and requested != actual:
                nearest = f"{name} {requested:g} does not exist; the nearest is {actual:g}"
                unknown = f"{requested:g} is not used: the table does not state {name} of {choice.id}"
                blocks_by_note[nearest if actual else unknown].append(block)
    notes = [
        f"block{'s' * (len(blocks) > 1)} {listed(blocks, 50)}: {note}"
        for note, blocks in blocks_by_note.items()
    ]
    return Resolution(choices, notes)


def _at_hook(hook: Hook | None, candidates: Sequence[SAEChoice]) -> Sequence[SAEChoice]:
    """The candidates at `layer.hook`; all candidates if it is null."""
    if hook is None:
        return candidates
    at_hook = [choice for choice in candidates if choice.hook is canonical_hook(hook)]
    if not at_hook:
        hooks = sorted({choice.hook.name for choice in candidates})
        allowed = f"a place with matching SAEs: {listed(hooks)}"
        raise NoSuchCellError("layer.hook", hook.name, allowed, nearest=hooks[0])
    return at_hook


def _of_width(
    requested: str, at_block: Sequence[SAEChoice], everywhere: Sequence[SAEChoice], strict: bool
) -> list[SAEChoice]:
    """The SAEs at this block that have the width nearest to the request.

    That width is chosen among the SAEs of all blocks, so that every block gets the same width.

    Raises:
        NoSuchCellError: If this block has no SAE of that width: no other width replaces it.
    """
    width = latents(requested)
    column = width if strict else _width(_nearest(everywhere, _width, width)[0])
    of_width = [choice for choice in at_block if _width(choice) == column]
    if not of_width:
        widths = sorted(set(map(_width, at_block)))
        allowed = f"a width that exists at block {at_block[0].block}: {listed(widths)}"
        nearest = _width(_nearest(at_block, _width, width)[0])
        raise NoSuchCellError("sae.width", requested, allowed, nearest)
    return of_width


def _nearest(
    candidates: Sequence[SAEChoice], measure: Callable[[SAEChoice], float], target: float
) -> list[SAEChoice]:
    """The candidates whose measure is closest to the target, by ratio."""

    def distance(choice: SAEChoice) -> float:
        value = measure(choice)
        return abs(math.log(value / target)) if value > 0 else math.inf

    least = min(map(distance, candidates))
    return [choice for choice in candidates if distance(choice) == least]


def _embedded_candidates() -> list[SAEChoice]:
    return _embedded("block", Hook.resid_post, None)


def _embedded(kind: str, hook: Hook, reads: Reads | None) -> list[SAEChoice]:
    """The embedded SAEs or transcoders, whose folders begin with this word."""
    candidates = []
    for folder in sorted(EMBEDDED_SAES.glob(f"{kind}_*-width_*-l0_*")):
        block, width, l0 = map(int, re.findall(r"\d+", folder.name.replace("l0_", "")))
        size = {"width": width, "l0": float(l0)}
        candidates.append(SAEChoice(block, hook, reads, id=folder.name, **size))
    return candidates


def _release_candidates(release: str, config: Config) -> list[SAEChoice]:
    candidates = []
    entries = release_named(release)["saes"]
    reads = _reads_in(release, config)
    hook = config.layer.hook if reads is None else Hook.mlp_out
    for entry in entries:
        name, l0 = entry["id"], float(entry.get("l0") or 0) or None
        place = place_in(name, hook)
        if place is not None:
            size = {"width": width_in(name), "l0": l0}
            candidates.append(SAEChoice(place.block, place.hook, reads, release, name, **size))
    if not candidates:
        allowed = f"a release of SAEs at {PLACES}"
        raise ConfigError("sae.release", release, allowed, because=f"it contains {entries[0]['id']}")
    return candidates


def _reads_in(release: str, config: Config) -> Reads | None:
    """The activation that a release's transcoders read, or `layer.reads`; `None` for SAEs.

    Raises:
        ConfigError: If `layer.reads` is given for SAEs.
    """
    asked, stated = config.layer.reads, reading_of(release)
    if stated is None and asked is not None and release in table():
        because = f"{release} contains SAEs, which read what they replace"
        raise ConfigError("layer.reads", asked.name, "null", "null", because)
    return asked or stated


def _transcoder_candidates(config: Config) -> list[SAEChoice]:
    """The transcoders for a model, with a skip connection or without."""
    release = None
    if config.model.name == EMBEDDED_NAME:
        everything = _embedded("transcoder", Hook.mlp_out, config.layer.reads or Reads.mlp_in)
    elif (release := transcoders_for(config.model.name)) is not None:
        everything = _release_candidates(release, config)
    else:
        raise _made_for("gemma-2-2b, gemma-3 (270m to 27b, pt or it) or qwen3 (0.6b to 14b)", config)
    # "affine" is Gemma Scope 2's word for a skip connection.
    of_kind = [each for each in everything if str(each.id).endswith("_affine") == config.sae.skip]
    if not of_kind:
        because = f"{release or config.model.name} has no transcoders with a skip connection"
        raise ConfigError("sae.skip", "true", "false", "false", because)
    return of_kind


def _made_for(models: str, config: Config) -> ConfigError:
    allowed = f"used with a model that it was trained on: {models}"
    because = f"model.name is {config.model.name!r}"
    return ConfigError("sae.family", config.sae.family.name, allowed, because=because)


def _gemma_scope_release(config: Config) -> str:
    model, hook = config.model, config.layer.hook
    if hook is Hook.attn_out:
        raise ConfigError(
            "layer.hook",
            hook.name,
            "mlp_out, resid_pre or resid_post with sae=gemma_scope",
            because="its attention SAEs read hook_z, the output of the heads before W_O",
        )
    if gemma_scope_for(model.name, "res") is None:
        raise _made_for(
            "gemma-2-2b, gemma-2-9b, gemma-2-27b, gemma-2-9b-it, gemma-3-270m, gemma-3-1b-pt, "
            "gemma-3-4b-pt, gemma-3-12b-pt, gemma-3-27b-pt (or their -it)",
            config,
        )
    release = gemma_scope_for(model.name, "mlp" if hook is Hook.mlp_out else "res")
    if release is None:
        allowed = f"resid_pre or resid_post with {model.name.rstrip('/').split('/')[-1]}"
        raise ConfigError("layer.hook", "mlp_out", allowed, nearest="resid_post")
    return release


_LLAMA_SCOPE = {"8x": 32_768, "32x": 131_072}


def _llama_scope_candidates(config: Config) -> list[SAEChoice]:
    expected = release_named("llama_scope_lxr_8x")["model"].split("/")[-1]
    if config.model.name.rstrip("/").split("/")[-1] != expected:
        raise _made_for(expected, config)
    asked = canonical_hook(config.layer.hook)
    sublayer = next(letter for letter, hook in SUBLAYERS.items() if hook is asked)
    return [
        replace(choice, width=width)
        for times, width in _LLAMA_SCOPE.items()
        for choice in _release_candidates(f"llama_scope_lx{sublayer}_{times}", config)
    ]


def _by_id(config: Config) -> SAEChoice:
    """The SAE that release and id name, at the place in its id, or at `layer` if the id has none."""
    sae, layer = config.sae, config.layer
    assert sae.release is not None and sae.id is not None
    width, l0 = width_in(sae.id), None
    if sae.release in table():
        entries = {entry["id"]: entry for entry in table()[sae.release]["saes"]}
        if sae.id not in entries:
            allowed = f"an id of {sae.release}: {listed(entries, 6)}"
            raise ConfigError("sae.id", sae.id, allowed, nearest_name(sae.id, entries))
        l0 = entries[sae.id].get("l0")
    elif "/" not in sae.release:
        release_named(sae.release)
    reads = _reads_in(sae.release, config)
    stated = place_in(sae.id, layer.hook if reads is None else Hook.mlp_out)
    if stated is None and sae.id.startswith("blocks.") and known_place(sae.id) is None:
        raise ConfigError("sae.id", sae.id, f"an SAE at {PLACES}")
    if layer.every is not None:
        raise ConfigError("layer.every", layer.every, "null with sae.id, which names one SAE", "null")
    if isinstance(layer.index, list):
        nearest = None if stated is None else stated.index(layer.hook)
        raise ConfigError(
            "layer.index", layer.index, "one block with sae.id, which names one SAE", nearest
        )
    place = settled(stated, layer.index, layer.hook, sae.id)
    if place is None:
        allowed = f"the block of {sae.id!r}: the id does not name it"
        raise ConfigError("layer.index", None, allowed)
    return SAEChoice(place.block, place.hook, reads, sae.release, sae.id, width=width, l0=l0)


def _on_disk(config: Config, model: Dimensions) -> list[SAEChoice]:
    path, layer = config.sae.path, config.layer
    if isinstance(path, list):
        return read_folders(path, model)
    if "{block}" not in path:
        for key, several in {"every": layer.every, "index": as_list(layer.index)[1:]}.items():
            if several:
                allowed = f"a path that contains {{block}}: layer.{key} asks for several blocks"
                raise ConfigError("sae.path", path, allowed)
        (index,) = as_list(layer.index)
        return [read_folder(path, index, layer.hook, model, layer.reads)]
    paths = {index: path.replace("{block}", str(index)) for index in range(model.n_blocks)}
    blocks = [index for index in paths if Path(paths[index]).expanduser().is_dir()]
    if layer.every is not None and not blocks:
        allowed = f"a path with a folder for at least one of the {len(paths)} blocks"
        raise ConfigError("sae.path", path, allowed)
    requested = _requested_blocks(config, blocks)
    return [read_folder(paths[index], index, layer.hook, model, layer.reads) for index in requested]
