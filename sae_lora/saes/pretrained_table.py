"""sae-lens's table of pretrained SAEs, read without importing sae-lens, which takes seconds."""

import ast
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import yaml

from sae_lora.common.errors import ConfigError, nearest_name
from sae_lora.config.enums import Hook, Reads
from sae_lora.config.validate import latents
from sae_lora.models.hookpoints import Place, canonical_hook


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """sae-lens's table of pretrained SAEs: release → repo_id, model, saes."""
    package = importlib.util.find_spec("sae_lens")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "pretrained_saes.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(), Loader=loader)


def repository_of(release: str) -> str:
    """The hub repository of a release; a release that is not in the table is itself a repository."""
    return table()[release]["repo_id"] if release in table() else release


def model_of(release: str) -> str | None:
    """The model that the SAEs of a release were trained on; `None` if the table does not have it."""
    return table()[release]["model"] if release in table() else None


def converter_of(release: str) -> str:
    """SAELens's name of the format of a release; `sae_lens` if the table does not have it."""
    return table().get(release, {}).get("conversion_func") or "sae_lens"


def reading_of(release: str) -> Reads | None:
    """The activation that the transcoders of a release read; `None` if it contains SAEs.

    The input of Gemma Scope's is the norm's output before its weight, because the weight was moved into
    the MLP for them (arXiv 2408.05147, appendix on transcoders).
    """
    match converter_of(release):
        case "gemma_2_transcoder":
            return Reads.mlp_normalized
        case "mwhanna_transcoder":
            return Reads.mlp_in
        case "gemma_3" if "transcoder" in table()[release]["saes"][0]["path"]:
            return Reads.mlp_in
    return None


def gemma_scope_for(model: str, kind: str) -> str | None:
    """The release of Gemma Scope's SAEs for a model; `None` if there is none.

    Args:
        model: `model.name`.
        kind: `res` for SAEs of the residual stream, `mlp` for SAEs of what MLPs add to it.
    """
    name = _bare(model)
    if match := re.fullmatch(r"gemma-2-(2b|9b|27b)(-it)?", name):
        release = f"gemma-scope-{match[1]}-{'it' if match[2] else 'pt'}-{kind}"
    elif match := re.fullmatch(r"gemma-3-(\w+?)(?:-(pt|it))?", name):
        release = f"gemma-scope-2-{match[1]}-{match[2] or 'pt'}-{kind}-all"
    else:
        release = ""
    return release if release in table() else None


def transcoders_for(model: str) -> str | None:
    """The release of transcoders for a model, with one for every block; `None` if there is none."""
    name = _bare(model)
    if match := re.fullmatch(r"gemma-3-(\w+?)(?:-(pt|it))?", name):
        release = f"gemma-scope-2-{match[1]}-{match[2] or 'pt'}-transcoders-all"
    elif match := re.fullmatch(r"qwen3-([\d.]+b)(?:-base)?", name):
        release = f"mwhanna-qwen3-{match[1]}-transcoders"
        release = release if release in table() else f"{release}-lowl0"
    else:
        release = "gemma-scope-2b-pt-transcoders" if name == "gemma-2-2b" else ""
    return release if release in table() else None


def same_model(name: str, other: str) -> bool:
    """True if two names mean the same model, such as `gpt2-small` and `openai-community/gpt2`.

    Organisations and folders are not compared: copies of a model have other owners.
    """
    return _bare(name) == _bare(other) or _bare(_official(name)) == _bare(_official(other))


def _bare(name: str) -> str:
    """The last part of a name, without upper case and without Meta's prefix."""
    return name.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")


def _official(name: str) -> str:
    return _official_names().get(_bare(name), name)


@functools.cache
def _official_names() -> dict[str, str]:
    """Official names of models by TransformerLens's short name, read without importing it."""
    package = importlib.util.find_spec("transformer_lens")
    assert package is not None and package.submodule_search_locations is not None
    folder = Path(package.submodule_search_locations[0])
    # In version 2 the table is in the second file.
    for file in (folder / "supported_models.py", folder / "loading_from_pretrained.py"):
        for node in ast.parse(file.read_text()).body if file.exists() else ():
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if "MODEL_ALIASES" in map(ast.unparse, targets):
                    aliases: dict[str, list[str]] = ast.literal_eval(node.value)
                    return {_bare(alias): name for name, names in aliases.items() for alias in names}
    return {}


def release_named(name: str) -> dict[str, Any]:
    """A release of the table.

    Raises:
        ConfigError: If the name is not in the table; suggests the nearest name.
    """
    if name not in table():
        allowed = f"one of the {len(table())} releases in sae-lens's table"
        raise ConfigError("sae.release", name, allowed, nearest_name(name, table()))
    return table()[name]


SUBLAYERS = {"r": Hook.resid_post, "a": Hook.attn_out, "m": Hook.mlp_out}
"""The hooks in Llama Scope's ids."""


def place_in(sae_id: str, hook: Hook | None) -> Place | None:
    """The place that an id such as `layer_12/…`, `l12m_8x` or `blocks.12.hook_resid_post` names.

    If the id names only a block, the hook is `layer.hook`; loading the SAE checks it.
    """
    hooks = "|".join(hook.name for hook in Hook)
    if match := re.match(rf"blocks\.\d+\.hook_(?:{hooks})(?![a-z])", sae_id):
        return Place.named(match[0])
    if match := re.match(r"l(\d+)([ram])_", sae_id):
        return Place(int(match[1]), SUBLAYERS[match[2]])
    match = re.match(r"(?:resid_post_|transcoder/)?(?:layer_?|l)(\d+)", sae_id)
    return Place(int(match[1]), canonical_hook(hook)) if match else None


def width_in(sae_id: str) -> int | None:
    """The number of latents that an id such as `layer_12/width_16k/…` names."""
    match = re.search(r"width_(\d+[km]?)", sae_id)
    return latents(match[1]) if match else None
