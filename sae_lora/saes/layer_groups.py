"""Which blocks share an SAE, by distances that are measured once for a model and its text.

Imports torch only for measuring.

Source: Group-SAE, arXiv 2410.21508.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from sae_lora.common.console import Display
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.config.schema import Config
from sae_lora.config.serialize import as_dict
from sae_lora.models.dimensions import Dimensions

if TYPE_CHECKING:
    from sae_lora.data.corpus import Corpus


@dataclass(frozen=True)
class LayerGroups:
    """Groups of blocks that share an SAE, and how they were found."""

    groups: list[list[int]]
    """Blocks of each, all but the model's last."""
    amad: float
    """Mean over groups of the widest angular distance in each."""
    amad_by_count: list[float]
    """The same for the best groups of each number, from one on."""
    distances: list[list[float]]
    """Angular distance between residual streams after two blocks, a share of a half turn."""
    evenly: bool
    """Whether they are neighbours in equal numbers, rather than blocks that lie close."""
    sae_flops_saved: float
    """Share of the SAEs' own training FLOPs that is saved over one SAE for each block."""


def are_wanted(config: Config) -> bool:
    """Whether SAEs are asked for by groups of blocks."""
    return config.layer.amad_max is not None or config.layer.n_groups is not None


class Distances:
    """Angular distances between the blocks of models, each read or measured once."""

    def __init__(self) -> None:
        self._known: dict[str, Sequence[Sequence[float]]] = {}

    def of(self, config: Config) -> Sequence[Sequence[float]]:
        """Those of a config's model on its held-out text.

        Raises:
            UserError: Where the model or the text cannot be had.
        """
        values = as_dict(config)
        asked = json.dumps([values["model"], values["data"], values["train"]["dtype"]], sort_keys=True)
        if asked not in self._known:
            self._known[asked] = _distances(config)
        return self._known[asked]


def groups(config: Config, model: Dimensions, known: Distances) -> LayerGroups:
    """The groups that `layer` asks for. The model is loaded where its distances are not known yet.

    Args:
        config: Of a point.
        model: Its model's.
        known: What was measured before.

    Raises:
        ConfigError: For more groups than there are blocks without the last.
        UserError: Where the model or the text cannot be had.
    """
    layer, most = config.layer, model.n_blocks - 1
    if layer.n_groups is not None:  # before a model is loaded
        _check_count(most, layer.n_groups)
    distances = known.of(config)
    found = group_blocks(distances, amad_max=layer.amad_max, n_groups=layer.n_groups)
    blocks = evenly_spaced(most, len(found.groups)) if layer.evenly else found.groups
    return LayerGroups(
        groups=blocks,
        amad=amad(distances, blocks),
        amad_by_count=list(found.amad_by_count),
        distances=[list(row) for row in distances],
        evenly=layer.evenly,
        sae_flops_saved=sae_flops_saved(len(blocks), most),
    )


def _distances(config: Config) -> Sequence[Sequence[float]]:
    """Angular distances between blocks on the held-out text, from the cache where they are there."""
    from sae_lora.common import hub
    from sae_lora.data import corpus
    from sae_lora.models import loading  # bring torch in

    with Display() as show:
        text = corpus.load(config.data, loading.load_tokenizer(config.model), 1)

        def file() -> Path:
            name, revision = config.model.name, config.model.revision
            commit = config.model.commit or hub.cached_commit(name, revision)
            measured_on = [name, revision, commit, text.description["corpus"], config.train.dtype.name]
            key = hashlib.sha256(json.dumps(measured_on).encode()).hexdigest()[:16]
            return Path(config.data.cache_dir).expanduser() / "distances" / f"{key}.json"

        if file().exists():
            return json.loads(file().read_text())
        found = _measure(config, text, show)
        file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file(), as_json(found))  # by now the model's commit is known
        return found


def _measure(config: Config, text: "Corpus", show: Display) -> list[list[float]]:
    from sae_lora.models import loading
    from sae_lora.saes import block_distances  # bring torch in

    show.stage(f"measuring distances between the blocks of {config.model.name}")
    model = loading.load_model(config.model, config.train.dtype, loading.device_of(config))
    at_once = max(1, config.train.eval_batch_tokens // config.data.context_length)
    count, total = show.counter("measuring", "tokens"), text.validation.size
    found = block_distances.angular_distances(
        model,
        text.validation_tokens.split(at_once),
        text.special_ids,
        lambda tokens: count(tokens, total),
    )
    show.end()
    return found.tolist()


PAPERS_AMAD_MAX = 0.2
"""The largest AMAD that the paper takes, as a share of half a turn."""


Groups = list[list[int]]
"""Sorted block indices of each group; the groups by their first block."""


@dataclass(frozen=True, eq=False)
class Grouping:
    """Every block but the last in one of a few groups."""

    groups: Groups
    """Sorted block indices of each group; the groups by their first block."""
    amad: float
    """Mean over the groups of the largest distance within one."""
    linkage: np.ndarray
    """The tree of merges that the groups are cut from, `[n - 1, 4]`, as scipy lays it out."""
    amad_by_count: list[float]
    """The AMAD of that tree cut into 1, 2, … n groups. It may rise where a wide group falls apart."""


def group_blocks(
    distances: ArrayLike, *, amad_max: float | None = None, n_groups: int | None = None
) -> Grouping:
    """The groups of blocks that complete linkage makes of their distances, the last block left out.

    Args:
        distances: `[block, block]`, as shares of half a turn, the last block among them.
        amad_max: Takes the fewest groups whose AMAD is below this, above 0 and up to 1.
        n_groups: Takes this many. Exactly one of the two is given.

    Raises:
        ConfigError: For more groups than blocks, or less than one.
        UserError: For a model of one block.

    Source: arXiv 2410.21508.
    """
    whole = np.asarray(distances, dtype=float)
    n = len(whole) - 1
    if n < 1:
        raise UserError("a model of one block has none to group: the last is left out")
    among, merges = whole[:n, :n], linkage(whole)
    by_count = list(reversed(_levels(merges, n)))
    amads = [amad(among, groups) for groups in by_count]
    if amad_max is not None:
        # Blocks that are all alone have an AMAD of 0: one is always found.
        n_groups = 1 + next(place for place, one in enumerate(amads) if one < amad_max)
    assert n_groups is not None  # exactly one of the two is given
    _check_count(n, n_groups)
    return Grouping(by_count[n_groups - 1], amads[n_groups - 1], merges, amads)


def linkage(distances: ArrayLike) -> np.ndarray:
    """The tree of the blocks without the last, by complete linkage, `[n - 1, 4]`, as scipy lays it out.

    Args:
        distances: `[block, block]`, the last block among them.
    """
    from scipy.cluster import hierarchy  # takes a while, which most plans need not
    from scipy.spatial.distance import squareform

    among = np.asarray(distances, dtype=float)[:-1, :-1]
    if len(among) < 2:
        return np.empty((0, 4))
    return hierarchy.linkage(squareform(among), method="complete")


def amad(distances: ArrayLike, groups: Sequence[Sequence[int]]) -> float:
    """The mean over groups of the largest distance within one, 0 for a group of one block.

    Args:
        distances: `[block, block]`.
        groups: Block indices of each group.

    Source: arXiv 2410.21508, average maximum angular distance.
    """
    values = np.asarray(distances, dtype=float)
    widest = [float(values[np.ix_(group, group)].max()) for group in groups]
    return sum(widest) / len(widest)


def evenly_spaced(n_blocks_without_last: int, n_groups: int) -> Groups:
    """Groups of neighbouring blocks, as equal in size as may be: what distances must improve on.

    Args:
        n_blocks_without_last: Blocks to share out, from the first on.
        n_groups: Groups wanted.

    Raises:
        ConfigError: For more groups than blocks, or less than one.
    """
    _check_count(n_blocks_without_last, n_groups)
    return [part.tolist() for part in np.array_split(np.arange(n_blocks_without_last), n_groups)]


def sae_flops_saved(groups: int, n_blocks: int) -> float:
    """The share of the SAEs' own training FLOPs that one per group saves over one per block.

    It is 1 − groups / n_blocks where each SAE is as wide and sees as many tokens. The model's forward
    passes, which make the activations, cost the same either way: of a whole training, less is saved.

    Args:
        groups: SAEs that are trained.
        n_blocks: Blocks that they serve.
    """
    return 1 - groups / n_blocks


def _levels(merges: np.ndarray, n: int) -> list[Groups]:
    """The groups after no merge, one merge, … and all of them.

    Merges are counted, not cut at a height: of several at one height, `fcluster` takes all or none.
    """
    clusters = {block: [block] for block in range(n)}
    levels = [sorted(clusters.values())]
    for number, (one, other) in enumerate(merges[:, :2].astype(int).tolist(), n):
        clusters[number] = sorted(clusters.pop(one) + clusters.pop(other))
        levels.append(sorted(clusters.values()))
    return levels


def _check_count(n: int, n_groups: int) -> None:
    if not 1 <= n_groups <= n:
        allowed = f"groups from 1 to {n}, the blocks without the last"
        raise ConfigError("layer.n_groups", n_groups, allowed, nearest=max(1, min(n_groups, n)))
