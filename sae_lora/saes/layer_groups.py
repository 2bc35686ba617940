"""Groups of blocks that share an SAE, from distances that are measured once per model and text.

Imports torch only for the measurement.

Source: Group-SAE, arXiv 2410.21508.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sae_lora.common.console import progress_bar, say
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.files import as_json, check_writable, write_atomically
from sae_lora.config.schema import Config
from sae_lora.config.serialize import as_dict
from sae_lora.models.dimensions import Dimensions

Groups = list[list[int]]
"""Sorted block indices of each group; the groups by their first block."""
Distances = list[list[float]]
"""Angular distance between the residual streams after any two blocks, in units of π, from 0 to 1."""


@dataclass(frozen=True)
class LayerGroups:
    """Groups of blocks that share an SAE, and the distances they come from."""

    groups: Groups
    """Each block except the model's last is in exactly one group."""
    amad: float
    """Mean over groups of the largest angular distance within the group."""
    amad_by_count: list[float]
    """AMAD if the tree of blocks is cut into 1, 2, … groups."""
    distances: Distances
    evenly: bool
    """True if the groups are consecutive blocks in groups of nearly equal size: the baseline."""
    sae_flops_saved: float
    """Share of the SAEs' training FLOPs that is saved, compared to one SAE per block, if every SAE has
    the same width and sees the same number of tokens. The model's forward passes are not counted: they
    cost the same in both cases."""


def groups(config: Config, model: Dimensions, known: dict[str, Distances]) -> LayerGroups | None:
    """The groups that `layer` asks for; `None` if it asks for none, or `init` gives the SAEs.

    Args:
        config: The config.
        model: The size of the model.
        known: Distances that were measured already; new distances are added to it.

    Raises:
        ConfigError: If there are fewer blocks than groups; the last block does not count.
        UserError: If the model or the text cannot be loaded.
    """
    layer, n_blocks = config.layer, model.n_blocks - 1
    if config.init is not None or (layer.amad_max is None and layer.n_groups is None):
        return None
    if layer.n_groups is not None and not 1 <= layer.n_groups <= n_blocks:
        allowed = f"1 to {n_blocks}, the number of blocks without the last"
        nearest = max(1, min(layer.n_groups, n_blocks))
        raise ConfigError("layer.n_groups", layer.n_groups, allowed, nearest)
    values = as_dict(config)
    key = json.dumps([values["model"], values["data"], values["train"]["dtype"]], sort_keys=True)
    if key not in known:
        known[key] = _distances(config, model.d_vocab)
    distances = known[key]
    chosen, amads = group_blocks(distances, amad_max=layer.amad_max, n_groups=layer.n_groups)
    if layer.evenly:
        chosen = [part.tolist() for part in np.array_split(np.arange(n_blocks), len(chosen))]
    return LayerGroups(
        groups=chosen,
        amad=amad(distances, chosen),
        amad_by_count=amads,
        distances=distances,
        evenly=layer.evenly,
        sae_flops_saved=1 - len(chosen) / n_blocks,
    )


def _distances(config: Config, vocabulary: int) -> Distances:
    """Angular distances between blocks on the held-out text, from the cache or measured."""
    from sae_lora.common import hub
    from sae_lora.data import corpus
    from sae_lora.models import loading
    from sae_lora.saes import block_distances  # imports torch
    from sae_lora.splice.positions import Special

    tokenizer = loading.load_tokenizer(config.model)
    text = corpus.load(config.data, tokenizer, 1, vocabulary=vocabulary)
    special = Special(text.special_ids, first=config.sae.keep_first is not False)

    def file() -> Path:
        name, revision = config.model.name, config.model.revision
        commit = config.model.commit or hub.cached_commit(name, revision)
        measured_on = [name, revision, commit, text.description["corpus"], config.train.dtype.name]
        if special.first and not text.description["bos"]:
            measured_on.append("without the first position")
        key = hashlib.sha256(json.dumps(measured_on).encode()).hexdigest()[:16]
        return Path(config.data.cache_dir).expanduser() / "distances" / f"{key}.json"

    with suppress(OSError, ValueError):  # not measured yet, or damaged: measured again
        return json.loads(file().read_text())
    say(f"measuring distances between the blocks of {config.model.name}")
    model = loading.load_model(config.model, config.train.dtype, loading.device_of(config))
    at_once = max(1, config.train.eval_batch_tokens // config.data.context_length)
    with progress_bar("measuring distances", "tokens") as count:
        distances = block_distances.angular_distances(
            model,
            text.validation_tokens.split(at_once),
            special,
            lambda tokens: count(tokens, text.validation.size),
        ).tolist()
    check_writable(file().parent, "data.cache_dir")
    # `file()` is called again: only after loading is the model's commit known.
    write_atomically(file(), as_json(distances))
    return distances


def group_blocks(
    distances: ArrayLike, *, amad_max: float | None = None, n_groups: int | None = None
) -> tuple[Groups, list[float]]:
    """Group all blocks except the last, by complete linkage of their distances.

    Exactly one of `amad_max` and `n_groups` is given.

    Args:
        distances: `[block, block]` in units of π, including the last block.
        amad_max: Take the smallest number of groups whose AMAD is below this; above 0 and up to 1.
        n_groups: Take this number of groups, up to the number of blocks without the last.

    Returns:
        The groups, and the AMAD of the tree cut into 1, 2, … groups. The AMAD may rise with the number
        of groups, when a wide group is divided.

    Raises:
        UserError: If the model has only one block.
    """
    n = len(np.asarray(distances)) - 1
    if n < 1:
        raise UserError("blocks cannot be grouped: the model has one block, and the last is left out")
    by_count = _cuts(linkage(distances), n)
    amads = [amad(distances, groups) for groups in by_count]
    if amad_max is not None:
        # n groups of one block each have an AMAD of 0, so that a number of groups always exists.
        n_groups = 1 + next(index for index, value in enumerate(amads) if value < amad_max)
    assert n_groups is not None
    return by_count[n_groups - 1], amads


def linkage(distances: ArrayLike) -> np.ndarray:
    """The tree of the n blocks without the last, by complete linkage, `[n - 1, 4]`, in scipy's format.

    The distances, `[block, block]`, are those of all blocks.
    """
    from scipy.cluster import hierarchy  # slow to import, and most plans do not need it
    from scipy.spatial.distance import squareform

    among = np.asarray(distances, dtype=float)[:-1, :-1]
    if len(among) < 2:
        return np.empty((0, 4))
    return hierarchy.linkage(squareform(among), method="complete")


def amad(distances: ArrayLike, groups: Sequence[Sequence[int]]) -> float:
    """The mean over groups of the largest distance within a group; a group of one block counts as 0.

    The distances are `[block, block]`.

    Source: arXiv 2410.21508, average maximum angular distance.
    """
    values = np.asarray(distances, dtype=float)
    widest = [float(values[np.ix_(group, group)].max()) for group in groups]
    return sum(widest) / len(widest)


def _cuts(merges: np.ndarray, n: int) -> list[Groups]:
    """The tree of n blocks cut into 1, 2, … n groups.

    The cuts follow the order of merges, not a height: if several merges have the same height, scipy's
    `fcluster` takes all of them or none.
    """
    clusters = {block: [block] for block in range(n)}
    cuts = [sorted(clusters.values())]
    for number, (first, second) in enumerate(merges[:, :2].astype(int).tolist(), n):
        clusters[number] = sorted(clusters.pop(first) + clusters.pop(second))
        cuts.append(sorted(clusters.values()))
    return cuts[::-1]
