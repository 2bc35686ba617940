"""Which SAE a request means, settled from tables and small config files before anything is loaded."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sae_lora.common.errors import ConfigError, NoSuchCellError, listed, nearest_name
from sae_lora.config.enums import Architecture, Hook, SAEFamily
from sae_lora.config.schema import Config, ModelConfig, SAEChoice, SAEConfig, as_list
from sae_lora.config.validate import latents
from sae_lora.embedded import SAES as EMBEDDED_SAES
from sae_lora.models.dimensions import EMBEDDED_NAME, Dimensions
from sae_lora.models.hookpoints import PLACES, Place, canonical_hook
from sae_lora.saes.metadata import known_place, read_folder, settled
from sae_lora.saes.pretrained_table import SUBLAYERS, place_in, release_named, table, width_in


class Resolution(NamedTuple):
    """What a request means.

    Args:
        choices: One SAE per block, in the order of their places.
        notes: A line for each point where what exists is not what was asked for.
    """

    choices: list[SAEChoice]
    notes: list[str]


def resolve(config: Config, model: Dimensions, groups: Sequence[list[int]] | None = None) -> Resolution:
    """The SAEs that the config asks for, the nearest that exist.

    Args:
        config: Of the run.
        model: What they are for.
        groups: The blocks that share one, where new ones are asked for by groups.

    Raises:
        NoSuchCellError: Where no SAE was made for that block and width, or with `launcher.strict` none
            of just that width and L0.
        ConfigError: Where what is asked for does not fit the model.
        UserError: Where an SAE's files cannot be read.
    """
    sae = config.sae
    for block in as_list(config.layer.index):
        if block is not None:
            _check_block(block, config.model, model)
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
                    "an SAE of that model: gemma_scope, llama_scope, registry or disk",
                    because=f"the tiny SAEs belong to model=tiny, not {config.model.name!r}",
                )
            resolution = _nearest_at_each_block(config, _embedded_candidates())
        case SAEFamily.gemma_scope:
            release = _gemma_scope_release(config)
            resolution = _nearest_at_each_block(config, _release_candidates(release, config))
        case SAEFamily.llama_scope:
            resolution = _nearest_at_each_block(config, _llama_scope_candidates(config))
        case SAEFamily.registry:
            assert sae.release is not None
            resolution = _nearest_at_each_block(config, _release_candidates(sae.release, config))
        case _:
            raise NotImplementedError(sae.family)
    for choice in resolution.choices:
        _check_block(choice.block, config.model, model)
    return resolution


def _check_block(block: int, config: ModelConfig, model: Dimensions) -> None:
    if not 0 <= block < model.n_blocks:
        last = model.n_blocks - 1
        raise ConfigError(
            "layer.index",
            block,
            f"a block from 0 to {last} ({config.name} has {model.n_blocks})",
            nearest=max(0, min(block, last)),
        )


def _wanted(config: Config, there: Iterable[int]) -> list[int]:
    """The blocks that `layer` asks for, in its own terms.

    Args:
        config: Of the run.
        there: Those at which there are such SAEs, for `layer.every`.

    Raises:
        NoSuchCellError: Where every n-th block is asked for, and one of them has no such SAE.
    """
    layer = config.layer
    if layer.every is not None:
        return _every_nth(layer.every, layer.first, there)
    return sorted(as_list(config.model.middle_block if layer.index is None else layer.index))


def _every_nth(every: int, first: int | None, there: Iterable[int]) -> list[int]:
    """Every n-th block, from the first to the last that has such an SAE."""
    blocks = sorted(set(there))
    if first is not None and first not in blocks:
        nearest = min(blocks, key=lambda at: abs(at - first), default=None)
        allowed = f"a block that has such an SAE: {listed(blocks, 50)}"
        raise NoSuchCellError("layer.first", first, allowed, nearest)
    wanted = list(range(blocks[0] if first is None else first, blocks[-1] + 1, every))
    if missing := [block for block in wanted if block not in blocks]:
        raise NoSuchCellError(
            "layer.every",
            every,
            f"a step that meets no other blocks than {listed(blocks, 50)}, which have such an SAE",
            because=f"from block {wanted[0]} on it meets {listed(missing)} too",
        )
    return wanted


def _anywhere(config: Config, model: Dimensions) -> list[SAEChoice]:
    """Where SAEs are wanted that can be anywhere."""
    hook = config.layer.hook
    there = range(hook is Hook.resid_pre, model.n_blocks)  # what block 0 reads, no block puts out
    places = [Place.asked(index, hook) for index in _wanted(config, there)]
    return [SAEChoice(block=place.block, hook=place.hook) for place in places]


def _new(config: Config, model: Dimensions, groups: Sequence[list[int]] | None) -> Resolution:
    """SAEs that the run makes itself."""
    sae = config.sae
    assert sae.width is not None
    l0, notes = sae.l0, []
    if sae.architecture in (Architecture.standard, Architecture.gated) and l0 is not None:
        name = sae.architecture.name
        notes.append(f"sae.l0={l0:g} is not used: sae.sparsity_coefficient is what a {name} SAE has")
        l0 = None
    width = latents(sae.width)
    if groups is None:
        places = _anywhere(config, model)
    else:
        places = [SAEChoice(block=block, group=group) for group in groups for block in group]
    choices = [replace(one, width=width, l0=l0) for one in places]
    return Resolution(sorted(choices, key=lambda one: one.block), notes)


class _Candidate(NamedTuple):
    """One SAE that exists, as far as its table tells."""

    choice: SAEChoice
    width: int
    l0: float


def _nearest_at_each_block(config: Config, everywhere: Sequence[_Candidate]) -> Resolution:
    choices, notes = [], []
    hook = config.layer.hook
    candidates = _at_hook(hook, everywhere)
    blocks = sorted({Place.of(candidate.choice).index(hook) for candidate in candidates})
    for index in _wanted(config, blocks):
        block = Place.asked(index, hook).block
        there = [candidate for candidate in candidates if candidate.choice.block == block]
        if not there:
            raise NoSuchCellError(
                "layer.index",
                index,
                f"a block that has such an SAE: {listed(blocks, 50)}",
                nearest=min(blocks, key=lambda at: abs(at - index)),
            )
        if config.sae.width is not None and any(candidate.width for candidate in there):
            there = _of_width(config.sae.width, there, candidates, config.launcher.strict)
        if config.sae.l0 is not None and any(candidate.l0 for candidate in there):
            sparsities = sorted({candidate.l0 for candidate in there})
            there = _nearest(there, lambda candidate: candidate.l0, config.sae.l0)
            if config.launcher.strict and there[0].l0 != config.sae.l0:
                raise NoSuchCellError(
                    "sae.l0",
                    config.sae.l0,
                    f"with launcher.strict one that exists at block {block}: {listed(sparsities)}",
                    nearest=f"{there[0].l0:g}",
                )
        widths = sorted({candidate.width for candidate in there})
        if len(widths) > 1:
            raise ConfigError("sae.width", None, f"one of {listed(widths)}", nearest=widths[0])
        if len(there) > 1:
            sparsities = sorted({candidate.l0 for candidate in there})
            raise ConfigError("sae.l0", None, f"one of {listed(sparsities)}", nearest=sparsities[0])
        found = there[0]
        choices.append(found.choice)
        asked = [(name, want, got) for name, want, got in _asked(config.sae, found) if want != got]
        for name, want, got in asked:
            nearest = f"{name} {want:g} does not exist; the nearest is {got:g}"
            unknown = f"the table does not state {name} of {found.choice.id}; {want:g} was not used"
            notes.append(f"block {block}: {nearest if got else unknown}")
    return Resolution(choices, notes)


def _at_hook(hook: Hook | None, candidates: Sequence[_Candidate]) -> Sequence[_Candidate]:
    """Those that replace what is asked for; all of them where nothing is."""
    if hook is None:
        return candidates
    found = [one for one in candidates if one.choice.hook is canonical_hook(hook)]
    if not found:
        hooks = sorted({one.choice.hook.name for one in candidates})
        allowed = f"{listed(hooks)}: such SAEs were trained there"
        raise NoSuchCellError("layer.hook", hook.name, allowed, nearest=hooks[0])
    return found


def _of_width(
    asked: str, there: Sequence[_Candidate], everywhere: Sequence[_Candidate], strict: bool
) -> list[_Candidate]:
    """Those at a block whose width is the one that is asked for, or the nearest that is made at all.

    A width that was made for other blocks alone is not replaced: it is another column of the grid.
    """
    wanted = latents(asked)
    column = wanted if strict else _nearest(everywhere, _width, wanted)[0].width
    found = [candidate for candidate in there if candidate.width == column]
    if not found:
        widths = sorted({candidate.width for candidate in there})
        block = there[0].choice.block
        raise NoSuchCellError(
            "sae.width",
            asked,
            f"a width that there is at block {block}: {listed(widths)}",
            nearest=_nearest(there, _width, wanted)[0].width,
        )
    return found


def _width(candidate: _Candidate) -> float:
    return candidate.width


def _asked(sae: SAEConfig, found: _Candidate) -> Iterable[tuple[str, float, float]]:
    if sae.width is not None:
        yield "sae.width", latents(sae.width), found.width
    if sae.l0 is not None:
        yield "sae.l0", sae.l0, found.l0


def _nearest(
    candidates: Sequence[_Candidate], measure: Callable[[_Candidate], float], wanted: float
) -> list[_Candidate]:
    """Those whose measure is closest to what is wanted, by ratio."""

    def distance(candidate: _Candidate) -> float:
        value = measure(candidate)
        return abs(math.log(value / wanted)) if value > 0 else math.inf

    least = min(map(distance, candidates))
    return [candidate for candidate in candidates if distance(candidate) == least]


def _embedded_candidates() -> list[_Candidate]:
    found = []
    for folder in sorted(EMBEDDED_SAES.glob("block_*-width_*-l0_*")):
        block, width, l0 = map(int, re.findall(r"\d+", folder.name.replace("l0_", "")))
        choice = SAEChoice(block=block, id=folder.name, width=width, l0=float(l0))
        found.append(_Candidate(choice, width, float(l0)))
    return found


def _release_candidates(release: str, config: Config) -> list[_Candidate]:
    found = []
    entries = release_named(release)["saes"]
    for entry in entries:
        place, width = place_in(entry["id"], config.layer.hook), width_in(entry["id"])
        l0 = float(entry.get("l0") or 0)
        if place is not None:
            choice = SAEChoice(
                block=place.block,
                hook=place.hook,
                release=release,
                id=entry["id"],
                width=width,
                l0=l0 or None,
            )
            found.append(_Candidate(choice, width or 0, l0))
    if not found:
        allowed = f"a release of SAEs at {PLACES}"
        raise ConfigError("sae.release", release, allowed, because=f"it holds {entries[0]['id']}")
    return found


def _gemma_scope_release(config: Config) -> str:
    model, hook = config.model, config.layer.hook
    if hook is Hook.attn_out:
        raise ConfigError(
            "layer.hook",
            hook.name,
            "mlp_out, resid_pre or resid_post with sae=gemma_scope",
            because="its SAEs of attention read hook_z, what the heads put out before it is mixed and "
            "added to the residual stream",
        )
    kind = "mlp" if hook is Hook.mlp_out else "res"
    name = model.name.rstrip("/").split("/")[-1]
    if match := re.fullmatch(r"gemma-2-(2b|9b|27b)(-it)?", name):
        release = f"gemma-scope-{match[1]}-{'it' if match[2] else 'pt'}-{{}}"
    elif match := re.fullmatch(r"gemma-3-(\w+?)(?:-(pt|it))?", name):
        release = f"gemma-scope-2-{match[1]}-{match[2] or 'pt'}-{{}}-all"
    else:
        release = ""
    if release.format("res") not in table():
        raise ConfigError(
            "sae.family",
            "gemma_scope",
            "with a model that it was made for: gemma-2-2b, gemma-2-9b, gemma-2-27b, gemma-2-9b-it, "
            "gemma-3-270m, gemma-3-1b-pt, gemma-3-4b-pt, gemma-3-12b-pt, gemma-3-27b-pt (or their -it)",
            because=f"model.name is {model.name!r}",
        )
    if release.format(kind) not in table():
        raise ConfigError(
            "layer.hook", "mlp_out", f"resid_pre or resid_post with {name}", nearest="resid_post"
        )
    return release.format(kind)


_LLAMA_SCOPE = {"8x": 32_768, "32x": 131_072}


def _llama_scope_candidates(config: Config) -> list[_Candidate]:
    expected = release_named("llama_scope_lxr_8x")["model"].split("/")[-1]
    if config.model.name.rstrip("/").split("/")[-1] != expected:
        raise ConfigError(
            "sae.family",
            "llama_scope",
            f"with the model it was made for, {expected}",
            because=f"model.name is {config.model.name!r}",
        )
    asked = canonical_hook(config.layer.hook)
    sublayer = next(letter for letter, hook in SUBLAYERS.items() if hook is asked)
    found = []
    for times, width in _LLAMA_SCOPE.items():
        for candidate in _release_candidates(f"llama_scope_lx{sublayer}_{times}", config):
            candidate.choice.width = width
            found.append(candidate._replace(width=width))
    return found


def _by_id(config: Config) -> SAEChoice:
    """The one SAE that release and id name; its place is the id's, or the user's where it has none."""
    sae, layer = config.sae, config.layer
    assert sae.release is not None and sae.id is not None
    width, l0 = width_in(sae.id), None
    if sae.release in table():
        entries = {entry["id"]: entry for entry in table()[sae.release]["saes"]}
        if sae.id not in entries:
            raise ConfigError(
                "sae.id",
                sae.id,
                f"an id of {sae.release}: {listed(entries, 6)}",
                nearest=nearest_name(sae.id, entries),
            )
        l0 = entries[sae.id].get("l0")
    elif "/" not in sae.release:
        release_named(sae.release)
    says = place_in(sae.id, layer.hook)
    if says is None and sae.id.startswith("blocks."):
        known_place(sae.id)
    if layer.every is not None:
        raise ConfigError("layer.every", layer.every, "null, where sae.id names one SAE", "null")
    if isinstance(layer.index, list):
        nearest = None if says is None else says.index(layer.hook)
        raise ConfigError("layer.index", layer.index, "one block, where sae.id names one SAE", nearest)
    place = settled(says, layer.index, layer.hook, sae.id)
    if place is None:
        raise ConfigError(
            "layer.index", None, f"the block of {sae.id!r}, whose id does not say it (loading checks it)"
        )
    return SAEChoice(
        block=place.block, hook=place.hook, release=sae.release, id=sae.id, width=width, l0=l0
    )


def _on_disk(config: Config, model: Dimensions) -> list[SAEChoice]:
    path, layer = config.sae.path, config.layer
    assert path is not None
    if "{block}" not in path:
        for key, several in {"every": layer.every, "index": as_list(layer.index)[1:]}.items():
            if several:
                allowed = f"a path with {{block}} in it, where layer.{key} names several blocks"
                raise ConfigError("sae.path", path, allowed)
        (index,) = as_list(layer.index)
        return [read_folder(path, index, layer.hook, model)]
    paths = {index: path.replace("{block}", str(index)) for index in range(model.n_blocks)}
    there = [index for index in paths if Path(paths[index]).expanduser().is_dir()]
    if layer.every is not None and not there:
        raise ConfigError("sae.path", path, f"a path that names a folder for one of {len(paths)} blocks")
    return [read_folder(paths[at], at, layer.hook, model) for at in _wanted(config, there)]
