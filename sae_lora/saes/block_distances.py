"""Angular distances between the residual streams after a model's blocks."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sae_lora.common.errors import UserError
from sae_lora.models.language_model import LanguageModel, outputs_of
from sae_lora.splice.positions import Special

_NUMBERS_AT_ONCE = 2**23
"""Numbers (residuals and cosines) that one step of the measurement holds in float64: 64 MiB."""


@torch.no_grad()
def angular_distances(
    model: LanguageModel,
    batches: Iterable[Tensor],
    special: Special,
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> Tensor:
    """The angles between the residual streams after any two blocks, `[block, block]`, float64, on CPU.

    Mean over tokens, in units of π: 0 for the same direction, 0.5 for orthogonal directions, 1 for
    opposite directions. One forward pass per batch measures all blocks.

    Args:
        model: The model, without SAEs and adapters.
        batches: Token ids `[batch, pos]`. Every token has the same weight, however they are batched.
        special: The positions to leave out; the rule for norms does not apply.
        on_progress: Called after each batch with the number of tokens measured so far.

    Raises:
        UserError: If there is no token, or all tokens are special.

    Source: Group-SAE, arXiv 2410.21508, angular distance: arccos(cosine) / π.
    """
    n_blocks, count = len(model.blocks), 0
    sums = torch.zeros(n_blocks, n_blocks, dtype=torch.float64, device=model.device)
    with outputs_of(model.blocks) as streams:
        for tokens in batches:
            tokens = tokens.to(model.device)
            streams.clear()
            model.hidden(tokens)
            counted = ~special.positions(tokens)
            for angles in _angles(streams, counted.flatten().nonzero()[:, 0]):
                sums += angles.sum(0)
            count += int(counted.sum())
            on_progress(count)
    if count == 0:
        raise UserError("distances between blocks need tokens that are not special; the text has none")
    means = sums.cpu() / count
    # A rounded product need not be symmetric, and if a cosine of 1 is rounded down in its last bit,
    # arccos turns that into 1e-8.
    return ((means + means.T) / 2).fill_diagonal_(0)


def _angles(streams: Sequence[Tensor], positions: Tensor) -> Iterator[Tensor]:
    """Yield the angles between blocks, `[token, block, block]`, for a few tokens at a time.

    Args:
        streams: The residual stream after each block, `[batch, pos, d_model]`.
        positions: Indices of the tokens to measure, `[token]`, into the flattened batch and pos.
    """
    flat = [resid.flatten(0, 1) for resid in streams]
    n_blocks, d_model = len(flat), flat[0].shape[-1]
    at_once = max(1, _NUMBERS_AT_ONCE // (n_blocks * (n_blocks + d_model)))
    for part in positions.split(at_once):
        # In float32, the rounding of a cosine near 1 would change the angle by 1e-4.
        states = torch.stack([resid[part] for resid in flat], dim=1).double()
        directions = F.normalize(states, dim=-1)
        yield (directions @ directions.mT).clamp_(-1, 1).acos_().div_(torch.pi)
