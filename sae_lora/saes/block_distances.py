"""Angular distances between the residual streams after a model's blocks."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sae_lora.common.errors import UserError
from sae_lora.models.language_model import LanguageModel, outputs_of
from sae_lora.splice.hooks import special_positions

_NUMBERS_AT_ONCE = 2**23
"""Residuals and cosines that one step of the measurement holds in float64: 64 MiB."""


@torch.no_grad()
def angular_distances(
    model: LanguageModel,
    batches: Iterable[Tensor],
    special_ids: Tensor,
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> Tensor:
    """The angles between the residual streams after any two blocks, `[block, block]`, float64, on CPU.

    In shares of half a turn: 0 for the same direction, 0.5 for orthogonal ones, 1 for opposite ones; the
    mean over tokens. One forward pass per batch measures all blocks.

    Args:
        model: The model, without SAEs and adapters.
        batches: Token ids `[batch, pos]`. Every token weighs the same, however they are batched.
        special_ids: Ids `[n]` whose positions are left out.
        on_progress: Called with the tokens measured so far, after each batch.

    Raises:
        UserError: Where no token is left to measure.

    Source: Group-SAE, arXiv 2410.21508, angular distance: arccos(cosine) / π.
    """
    n_blocks, count = len(model.blocks), 0
    sums = torch.zeros(n_blocks, n_blocks, dtype=torch.float64, device=model.device)
    with outputs_of(model.blocks) as streams:
        for tokens in batches:
            tokens = tokens.to(model.device)
            streams.clear()
            model.hidden(tokens)
            counted = ~special_positions(tokens, special_ids.to(model.device))
            for angles in _angles(streams, counted.flatten().nonzero()[:, 0]):
                sums += angles.sum(0)
            count += int(counted.sum())
            on_progress(count)
    if count == 0:
        raise UserError("no token to measure distances between blocks on: none given, or all special")
    means = sums.cpu() / count
    # A rounded product need not be symmetric, and arccos makes 1e-8 of a last bit missing from 1.
    return ((means + means.T) / 2).fill_diagonal_(0)


def _angles(streams: Sequence[Tensor], places: Tensor) -> Iterator[Tensor]:
    """The angles between blocks at some tokens, `[token, block, block]`, a few tokens at a time.

    Args:
        streams: The residual stream after each block, `[batch, pos, d_model]`.
        places: Indices of the tokens to measure, `[token]`, in the order of batch and pos.
    """
    flat = [resid.flatten(0, 1) for resid in streams]
    n_blocks, d_model = len(flat), flat[0].shape[-1]
    at_once = max(1, _NUMBERS_AT_ONCE // (n_blocks * (n_blocks + d_model)))
    for part in places.split(at_once):
        # In float32, a cosine near 1 would blur the angle by 1e-4.
        states = torch.stack([resid[part] for resid in flat], dim=1).double()
        directions = F.normalize(states, dim=-1)
        yield (directions @ directions.mT).clamp_(-1, 1).acos_().div_(torch.pi)
