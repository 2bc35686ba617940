"""Groups of blocks that share an SAE, by distances that are measured once for a model and its text.

Imports torch only for measuring.

Source: Group-SAE, arXiv 2410.21508.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sae_lora.common.console import progress_bar, say
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.config.schema import Config
from sae_lora.config.serialize import as_dict
from sae_lora.models.dimensions import Dimensions

Groups = list[list[int]]
"""Sorted block indices of each group; the groups by their first block."""
Distances = list[list[float]]
"""Angular distance between the residual streams after two blocks, a share of a half turn."""


@dataclass(frozen=True)
class LayerGroups:
    """Groups of blocks that share an SAE, and how they were found."""

    groups: Groups
    """Every block but the model's last, in one group each."""
    amad: float
    """Mean over groups of the widest angular distance in each."""
    amad_by_count: list[float]
    """AMAD of the tree of blocks cut into 1, 2, … groups."""
    distances: Distances
    evenly: bool
    """True for neighbours, in groups as equal in size as possible: the baseline of distances."""
    sae_flops_saved: float
    """Share of the SAEs' own training FLOPs that is saved over one SAE for each block, where each SAE is
    as wide and sees as many tokens. The model's forward passes cost the same either way."""


def groups(config: Config, model: Dimensions, known: dict[str, Distances]) -> LayerGroups | None:
    """The groups that `layer` asks for; `None` where it asks for none, or `init` gives the SAEs.

    The model is loaded where its distances are not in `known`, to which they are then added.

    Raises:
        ConfigError: For more groups than there are blocks without the last.
        UserError: Where the model or the text cannot be loaded.
    """
    layer, n_blocks = config.layer, model.n_blocks - 1
    if config.init is not None or (layer.amad_max is None and layer.n_groups is None):
        return None
    if layer.n_groups is not None and not 1 <= layer.n_groups <= n_blocks:
        allowed = f"groups from 1 to {n_blocks}, the blocks without the last"
        nearest = max(1, min(layer.n_groups, n_blocks))
        raise ConfigError("layer.n_groups", layer.n_groups, allowed, nearest)
    values = as_dict(config)
    key = json.dumps([values["model"], values["data"], values["train"]["dtype"]], sort_keys=True)
    if key not in known:
        known[key] = _distances(config)
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


def _distances(config: Config) -> Distances:
    """Angular distances between blocks on the held-out text, from the cache or measured."""
    from sae_lora.common import hub
    from sae_lora.data import corpus
    from sae_lora.models import loading
    from sae_lora.saes import block_distances  # bring torch in

    text = corpus.load(config.data, loading.load_tokenizer(config.model), 1)

    def file() -> Path:
        name, revision = config.model.name, config.model.revision
        commit = config.model.commit or hub.cached_commit(name, revision)
        measured_on = [name, revision, commit, text.description["corpus"], config.train.dtype.name]
        key = hashlib.sha256(json.dumps(measured_on).encode()).hexdigest()[:16]
        return Path(config.data.cache_dir).expanduser() / "distances" / f"{key}.json"

    if file().exists():
        return json.loads(file().read_text())
    say(f"measuring distances between the blocks of {config.model.name}")
    model = loading.load_model(config.model, config.train.dtype, loading.device_of(config))
    at_once = max(1, config.train.eval_batch_tokens // config.data.context_length)
    with progress_bar("measuring", "tokens") as count:
        distances = block_distances.angular_distances(
            model,
            text.validation_tokens.split(at_once),
            text.special_ids,
            lambda tokens: count(tokens, text.validation.size),
        ).tolist()
    file().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file(), as_json(distances))  # by now the model's commit is known
    return distances


def group_blocks(
    distances: ArrayLike, *, amad_max: float | None = None, n_groups: int | None = None
) -> tuple[Groups, list[float]]:
    """The groups of blocks that complete linkage makes of their distances, the last block left out.

    Args:
        distances: `[block, block]`, as shares of half a turn, with the last block.
        amad_max: Takes the fewest groups whose AMAD is below this, above 0 and up to 1.
        n_groups: Takes this many, up to the number of blocks. Exactly one of the two is given.

    Returns:
        The groups, and the AMAD of the tree cut into 1, 2, … groups. It may rise where a wide group is
        divided.

    Raises:
        UserError: For a model of one block.
    """
    n = len(np.asarray(distances)) - 1
    if n < 1:
        raise UserError("a model of one block has none to group: the last is left out")
    by_count = _cuts(linkage(distances), n)
    amads = [amad(distances, groups) for groups in by_count]
    if amad_max is not None:
        # Blocks that are all alone have an AMAD of 0, which is always below.
        n_groups = 1 + next(index for index, value in enumerate(amads) if value < amad_max)
    assert n_groups is not None  # exactly one of the two is given
    return by_count[n_groups - 1], amads


def linkage(distances: ArrayLike) -> np.ndarray:
    """The tree of the blocks without the last, by complete linkage, `[n - 1, 4]`, as scipy lays it out.

    The distances, `[block, block]`, are those of all blocks.
    """
    from scipy.cluster import hierarchy  # takes a while, which most plans need not
    from scipy.spatial.distance import squareform

    among = np.asarray(distances, dtype=float)[:-1, :-1]
    if len(among) < 2:
        return np.empty((0, 4))
    return hierarchy.linkage(squareform(among), method="complete")


def amad(distances: ArrayLike, groups: Sequence[Sequence[int]]) -> float:
    """The mean over groups of the largest of the distances `[block, block]` within one.

    It is 0 for a group of one block.

    Source: arXiv 2410.21508, average maximum angular distance.
    """
    values = np.asarray(distances, dtype=float)
    widest = [float(values[np.ix_(group, group)].max()) for group in groups]
    return sum(widest) / len(widest)


def _cuts(merges: np.ndarray, n: int) -> list[Groups]:
    """The tree of n blocks cut into 1, 2, … n groups.

    Merges are counted, not cut at a height: of several at one height, `fcluster` takes all or none.
    """
    clusters = {block: [block] for block in range(n)}
    cuts = [sorted(clusters.values())]
    for number, (first, second) in enumerate(merges[:, :2].astype(int).tolist(), n):
        clusters[number] = sorted(clusters.pop(first) + clusters.pop(second))
        cuts.append(sorted(clusters.values()))
    return cuts[::-1]
