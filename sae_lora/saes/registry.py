"""Which SAE a request means, settled from tables and small config files before anything is loaded.

Reads sae-lens's own table of pretrained SAEs as data: importing sae-lens takes seconds, and a sweep's
plan should not.
"""

import functools
import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sae_lora.checks import latents
from sae_lora.choices import Architecture, SAEFamily
from sae_lora.config import Config, ModelConfig, SAEChoice, SAEConfig, as_list
from sae_lora.dimensions import EMBEDDED_NAME, Dimensions, block_of
from sae_lora.embedded import SAES as EMBEDDED_SAES
from sae_lora.errors import ConfigError, NoSuchCellError, listed, nearest_name
from sae_lora.saes.disk import read_folder


class Resolution(NamedTuple):
    """What a request means.

    Args:
        choices: One SAE per block.
        notes: A line for each point where what exists is not what was asked for.
    """

    choices: list[SAEChoice]
    notes: list[str]


def resolve(config: Config, model: Dimensions) -> Resolution:
    """The SAEs that the config asks for, the nearest that exist.

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
            resolution = Resolution([SAEChoice(block=at) for at in _wanted_blocks(config)], [])
        case SAEFamily.new:
            resolution = _new(config)
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
            release = _gemma_scope_release(config.model)
            resolution = _nearest_at_each_block(config, _release_candidates(release))
        case SAEFamily.llama_scope:
            resolution = _nearest_at_each_block(config, _llama_scope_candidates(config.model))
        case SAEFamily.registry:
            assert sae.release is not None
            resolution = _nearest_at_each_block(config, _release_candidates(sae.release))
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


def _wanted_blocks(config: Config) -> list[int]:
    index = config.layer.index
    if index is None:
        return [config.model.middle_block]
    return sorted(as_list(index))


def _new(config: Config) -> Resolution:
    """SAEs that the run makes itself."""
    sae = config.sae
    assert sae.width is not None
    l0, notes = sae.l0, []
    if sae.architecture in (Architecture.standard, Architecture.gated) and l0 is not None:
        name = sae.architecture.name
        notes.append(f"sae.l0={l0:g} is not used: sae.sparsity_coefficient is what a {name} SAE has")
        l0 = None
    width = latents(sae.width)
    choices = [SAEChoice(block=at, width=width, l0=l0) for at in _wanted_blocks(config)]
    return Resolution(choices, notes)


class _Candidate(NamedTuple):
    """One SAE that exists, as far as its table tells."""

    choice: SAEChoice
    width: int
    l0: float


def _nearest_at_each_block(config: Config, candidates: Sequence[_Candidate]) -> Resolution:
    choices, notes = [], []
    for block in _wanted_blocks(config):
        there = [candidate for candidate in candidates if candidate.choice.block == block]
        if not there:
            blocks = sorted({candidate.choice.block for candidate in candidates})
            raise NoSuchCellError(
                "layer.index",
                block,
                f"a block that has such an SAE: {listed(blocks, 50)}",
                nearest=min(blocks, key=lambda at: abs(at - block)) if blocks else None,
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


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """sae-lens's table of pretrained SAEs: release → repo_id, model, saes."""
    found = importlib.util.find_spec("sae_lens")
    assert found is not None and found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "pretrained_saes.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(), Loader=loader)


def repository_of(release: str) -> str:
    """The hub's repository that holds a release; an unlisted release is itself a repository."""
    return table()[release]["repo_id"] if release in table() else release


def _release(name: str) -> dict[str, Any]:
    if name not in table():
        raise ConfigError(
            "sae.release",
            name,
            f"a release of sae-lens's table, of {len(table())}",
            nearest=nearest_name(name, table()),
        )
    return table()[name]


def _release_candidates(release: str) -> list[_Candidate]:
    found = []
    for entry in _release(release)["saes"]:
        block, width = _block_in(entry["id"]), _width_in(entry["id"])
        l0 = float(entry.get("l0") or 0)
        if block is not None:
            choice = SAEChoice(block=block, release=release, id=entry["id"], width=width, l0=l0 or None)
            found.append(_Candidate(choice, width or 0, l0))
    return found


def _block_in(sae_id: str) -> int | None:
    """The block that an id such as `layer_12/…`, `l12r_8x` or `blocks.12.hook_resid_post` names."""
    hookpoint = re.match(r"blocks\.\d+\.hook_\w+?(?=__|$)", sae_id)
    if hookpoint:
        return block_of(hookpoint[0])
    match = re.match(r"(?:resid_post_)?(?:layer_?|l)(\d+)", sae_id)
    return int(match[1]) if match else None


def _width_in(sae_id: str) -> int | None:
    match = re.search(r"width_(\d+[km]?)", sae_id)
    return latents(match[1]) if match else None


def _gemma_scope_release(model: ModelConfig) -> str:
    name = model.name.rstrip("/").split("/")[-1]
    if match := re.fullmatch(r"gemma-2-(2b|9b|27b)(-it)?", name):
        release = f"gemma-scope-{match[1]}-{'it' if match[2] else 'pt'}-res"
    elif match := re.fullmatch(r"gemma-3-(\w+?)(?:-(pt|it))?", name):
        release = f"gemma-scope-2-{match[1]}-{match[2] or 'pt'}-res-all"
    else:
        release = ""
    if release not in table():
        raise ConfigError(
            "sae.family",
            "gemma_scope",
            "with a model that it was made for: gemma-2-2b, gemma-2-9b, gemma-2-27b, gemma-2-9b-it, "
            "gemma-3-270m, gemma-3-1b-pt, gemma-3-4b-pt, gemma-3-12b-pt, gemma-3-27b-pt (or their -it)",
            because=f"model.name is {model.name!r}",
        )
    return release


_LLAMA_SCOPE = {"llama_scope_lxr_8x": 32_768, "llama_scope_lxr_32x": 131_072}


def _llama_scope_candidates(model: ModelConfig) -> list[_Candidate]:
    expected = _release("llama_scope_lxr_8x")["model"].split("/")[-1]
    if model.name.rstrip("/").split("/")[-1] != expected:
        raise ConfigError(
            "sae.family",
            "llama_scope",
            f"with the model it was made for, {expected}",
            because=f"model.name is {model.name!r}",
        )
    found = []
    for release, width in _LLAMA_SCOPE.items():
        for candidate in _release_candidates(release):
            candidate.choice.width = width
            found.append(candidate._replace(width=width))
    return found


def _by_id(config: Config) -> SAEChoice:
    """The one SAE that release and id name; its block is the id's, or the user's where it has none."""
    sae, index = config.sae, config.layer.index
    assert sae.release is not None and sae.id is not None
    block = _block_in(sae.id)
    width, l0 = _width_in(sae.id), None
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
        _release(sae.release)
    if isinstance(index, list):
        raise ConfigError("layer.index", index, "one block, where sae.id names one SAE", nearest=block)
    if block is not None and index is not None and index != block:
        raise ConfigError(
            "layer.index", index, "the block that the SAE was trained on, or null", nearest=block
        )
    at = index if block is None else block
    if at is None:
        raise ConfigError(
            "layer.index", None, f"the block of {sae.id!r}, whose id does not say it (loading checks it)"
        )
    return SAEChoice(block=at, release=sae.release, id=sae.id, width=width, l0=l0)


def _on_disk(config: Config, model: Dimensions) -> list[SAEChoice]:
    path = config.sae.path
    assert path is not None
    if config.layer.index is None and "{block}" not in path:
        return [read_folder(path, None, model)]
    blocks = _wanted_blocks(config)
    if len(blocks) > 1 and "{block}" not in path:
        raise ConfigError(
            "sae.path", path, "a path with {block} in it, where layer.index names several blocks"
        )
    return [read_folder(path.replace("{block}", str(block)), block, model) for block in blocks]
