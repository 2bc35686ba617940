"""Layer groups: blocks whose residual streams point the same way, so that one SAE may serve them all.

Source: Group-SAE, arXiv 2410.21508.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor
from torch.nn import functional as F

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import residual_streams, special_positions

PAPERS_AMAD_MAX = 0.2
"""The largest AMAD that the paper takes, as a share of half a turn."""
_NUMBERS_AT_ONCE = 2**23
"""Residuals and cosines that one step of the measurement holds in float64: 64 MiB of them."""

Groups = list[list[int]]
"""Sorted block indices of each group; the groups by their first block."""


class Progress(Protocol):
    """Called with the tokens measured so far, after each batch."""

    def __call__(self, tokens: int, /) -> None: ...


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


@torch.no_grad()
def angular_distances(
    model: LanguageModel,
    batches: Iterable[Tensor],
    special_ids: Tensor | None = None,
    on_progress: Progress = lambda tokens: None,
) -> Tensor:
    """The angles between the residual streams after any two blocks, `[block, block]`, float64, on CPU.

    As shares of half a turn: 0 where they point the same way, 0.5 where they are orthogonal, 1 where
    they are opposite; the mean over tokens. One forward pass per batch measures all blocks.

    Args:
        model: The model, without SAEs and adapters.
        batches: Token ids `[batch, pos]`. Every token weighs the same, however they are batched.
        special_ids: Ids `[n]` whose positions are left out.
        on_progress: Called with the tokens measured so far.

    Raises:
        UserError: Where no token is left to measure.

    Source: arXiv 2410.21508, angular distance: arccos(cosine) / π.
    """
    n_blocks, count = len(model.blocks), 0
    sums = torch.zeros(n_blocks, n_blocks, dtype=torch.float64, device=model.device)
    with residual_streams(model) as streams:
        for tokens in batches:
            tokens = tokens.to(model.device)
            streams.clear()
            model.hidden(tokens)
            counted = torch.ones_like(tokens, dtype=torch.bool)
            if special_ids is not None:
                counted = ~special_positions(tokens, special_ids.to(model.device))
            for angles in _angles(streams, counted.flatten().nonzero().squeeze(1)):
                sums += angles.sum(0)
            count += int(counted.sum())
            on_progress(count)
    if count == 0:
        raise UserError("no token to measure distances between blocks on: none given, or all special")
    means = sums.cpu() / count
    # A rounded product need not be symmetric, and arccos makes 1e-8 of a last bit missing from 1.
    return ((means + means.T) / 2).fill_diagonal_(0)


def group_blocks(
    distances: Tensor, *, amad_max: float | None = None, n_groups: int | None = None
) -> Grouping:
    """The groups of blocks that complete linkage makes of their distances, the last block left out.

    Args:
        distances: `[block, block]`, as `angular_distances` gives them, the last block among them.
        amad_max: Takes the fewest groups whose AMAD is below this, above 0 and up to 1.
        n_groups: Takes this many. Exactly one of the two is given.

    Raises:
        ConfigError: For values that cannot be, or for both or neither.
        UserError: For a model of one block.

    Source: arXiv 2410.21508.
    """
    n = len(distances) - 1
    if n < 1:
        raise UserError("a model of one block has none to group: the last is left out")
    _check(n, amad_max, n_groups)
    among = distances[:n, :n].double().cpu()
    condensed = squareform(among.numpy())
    merges = hierarchy.linkage(condensed, method="complete") if n > 1 else np.empty((0, 4))
    by_count = list(reversed(_levels(merges, n)))
    amads = [amad(among, groups) for groups in by_count]
    if amad_max is not None:
        # Blocks that are all alone have an AMAD of 0: one is always found.
        n_groups = 1 + next(place for place, one in enumerate(amads) if one < amad_max)
    assert n_groups is not None  # exactly one of the two is given
    return Grouping(by_count[n_groups - 1], amads[n_groups - 1], merges, amads)


def amad(distances: Tensor, groups: Sequence[Sequence[int]]) -> float:
    """The mean over groups of the largest distance within one, 0 for a group of one block.

    Args:
        distances: `[block, block]`.
        groups: Block indices of each group.

    Source: arXiv 2410.21508, average maximum angular distance.
    """
    widest = [float(distances[list(group)][:, list(group)].max()) for group in groups]
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


def _angles(streams: Sequence[Tensor], places: Tensor) -> Iterator[Tensor]:
    """The angles between blocks at some tokens, `[token, block, block]`, a few tokens at a time.

    Args:
        streams: The residual stream after each block, `[batch, pos, d_model]`.
        places: Tokens to measure, `[token]`, in the order of batch and pos.
    """
    flat = [resid.flatten(0, 1) for resid in streams]
    n_blocks, d_model = len(flat), flat[0].shape[-1]
    at_once = max(1, _NUMBERS_AT_ONCE // (n_blocks * (n_blocks + d_model)))
    for part in places.split(at_once):
        # In float32, a cosine near 1 would blur the angle by 1e-4.
        states = torch.stack([resid[part] for resid in flat], dim=1).double()
        directions = F.normalize(states, dim=-1)
        yield (directions @ directions.mT).clamp_(-1, 1).acos_().div_(torch.pi)


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


def _check(n: int, amad_max: float | None, n_groups: int | None) -> None:
    allowed = "a distance above 0, up to 1, where layer.n_groups is null"
    if n_groups is not None:
        if amad_max is not None:
            raise ConfigError("layer.amad_max", amad_max, "null where layer.n_groups is given", "null")
        _check_count(n, n_groups)
    elif amad_max is None:
        raise ConfigError("layer.amad_max", amad_max, allowed, nearest=PAPERS_AMAD_MAX)
    elif not 0 < amad_max <= 1:
        raise ConfigError("layer.amad_max", amad_max, allowed, nearest=1 if amad_max > 1 else None)


def _check_count(n: int, n_groups: int) -> None:
    if not 1 <= n_groups <= n:
        allowed = f"groups from 1 to {n}, the blocks without the last"
        raise ConfigError("layer.n_groups", n_groups, allowed, nearest=max(1, min(n_groups, n)))
