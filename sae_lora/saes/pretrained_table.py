"""sae-lens's own table of pretrained SAEs, read as data, and what the ids in it say.

Importing sae-lens takes seconds, and a sweep's plan should not.
"""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import yaml

from sae_lora.common.errors import ConfigError, nearest_name
from sae_lora.config.enums import Hook
from sae_lora.config.validate import latents
from sae_lora.models.hookpoints import Place, canonical_hook


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


def release_named(name: str) -> dict[str, Any]:
    """A release of the table.

    Raises:
        ConfigError: For one that is not in it; names the nearest.
    """
    if name not in table():
        raise ConfigError(
            "sae.release",
            name,
            f"a release of sae-lens's table, of {len(table())}",
            nearest=nearest_name(name, table()),
        )
    return table()[name]


SUBLAYERS = {"r": Hook.resid_post, "a": Hook.attn_out, "m": Hook.mlp_out}
"""How Llama Scope's ids name what an SAE replaces."""


def place_in(sae_id: str, hook: Hook | None) -> Place | None:
    """The place that an id such as `layer_12/…`, `l12m_8x` or `blocks.12.hook_resid_post` names.

    Args:
        sae_id: The id.
        hook: What is asked for: it is believed where the id says no more than a block, until the SAE
            is loaded and says so itself.
    """
    if match := re.match(
        r"blocks\.\d+\.hook_(?:resid_pre|resid_post|attn_out|mlp_out)(?![a-z])", sae_id
    ):
        return Place.named(match[0])
    if match := re.match(r"l(\d+)([ram])_", sae_id):
        return Place(int(match[1]), SUBLAYERS[match[2]])
    match = re.match(r"(?:resid_post_)?(?:layer_?|l)(\d+)", sae_id)
    return Place(int(match[1]), canonical_hook(hook)) if match else None


def width_in(sae_id: str) -> int | None:
    """The number of latents that an id such as `layer_12/width_16k/…` names."""
    match = re.search(r"width_(\d+[km]?)", sae_id)
    return latents(match[1]) if match else None
