"""Special positions: one rule for training of SAEs, splicing, metrics, evaluation and steering."""

from typing import NamedTuple

import torch
from torch import Tensor

OUTLIER = 10.0
"""A position counts as an outlier in metrics if the norm of its activation is more than this multiple of
the median norm in its sequence. Attention sinks have 50 to 1000 times the median norm."""


class Special(NamedTuple):
    """A rule for special positions: an SAE neither replaces their activations nor is trained on them.

    Models use some positions as attention sinks, at which the residual stream is so large that an SAE
    would learn little else, and FVU would measure little else.
    """

    ids: tuple[int, ...] = ()
    """The positions of these tokens are special."""
    first: bool = False
    """True if the first position of each sequence is special, whatever its token."""
    norm_multiple: float | None = None
    """Positions are special if the norm of their activation is more than this multiple of the median
    norm in their sequence; `None`: no position is special for its norm."""

    @property
    def exists(self) -> bool:
        """True if a position may be special."""
        return self != NOT_SPECIAL

    def positions(
        self, tokens: Tensor, resid: Tensor | None = None, begins: Tensor | None = None
    ) -> Tensor:
        """The special positions (true) of tokens `[batch, pos]`.

        Args:
            tokens: Token ids `[batch, pos]`.
            resid: The SAE's input `[batch, pos, d_model]`; `None` leaves out the rule for norms.
            begins: True at the first position of each sequence, `[batch, pos]`; `None`: column 0.
        """
        special = torch.zeros_like(tokens, dtype=torch.bool)
        for number in self.ids:  # a tensor of ids would be copied to the device in every forward pass
            special |= tokens == number
        if self.first:
            if begins is None:
                special[:, :1] = True
            else:
                special |= begins
        if self.norm_multiple is not None and resid is not None:
            special |= exceeds_median(resid, self.norm_multiple)
        return special


NOT_SPECIAL = Special()
"""The rule by which no position is special."""


def exceeds_median(resid: Tensor, multiple: float) -> Tensor:
    """True at positions `[batch, pos]` whose norm is more than a multiple of the sequence's median norm.

    Args:
        resid: Activations `[batch, pos, d_model]`.
        multiple: The multiple.
    """
    norms = resid.detach().float().norm(dim=-1)
    # As torch's median, which has no deterministic algorithm on a GPU.
    median = norms.sort(dim=-1).values[..., (norms.shape[-1] - 1) // 2]
    return norms > multiple * median[..., None]


def variance_by_position(resid: Tensor, counted: Tensor) -> Tensor:
    """Share of the variance of activations that each position of the sequences holds, `[pos]`.

    Args:
        resid: Activations `[batch, pos, d_model]`.
        counted: True at the positions to measure, `[batch, pos]`.
    """
    values = resid.double()
    weights = counted.double()[..., None]
    mean = (values * weights).sum((0, 1)) / weights.sum()
    squares = ((values - mean).square() * weights).sum((0, 2))
    total = squares.sum()
    return squares / total if total > 0 else squares
