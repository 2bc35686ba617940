"""Activations around the tokens on which latents are most active, and histograms of all of them."""

import torch
from torch import Tensor

from sae_lora.evaluation.latents.activations import Activations

TOKENS_BEFORE, TOKENS_AFTER = 14, 6
"""Tokens of a context before and after the token on which the latent is most active."""
WIDTH = TOKENS_BEFORE + 1 + TOKENS_AFTER
"""Tokens of a context."""
BINS = 30
"""Bars of the histogram of a latent's activations."""
FULL = 255
"""The number that stands for a latent's largest activation in either model."""


class Contexts:
    """Contexts and histograms of the latents of an SAE in two models, before and after.

    Args:
        seen: The latents' activations on the whole text.
    """

    def __init__(self, seen: Activations) -> None:
        self._places = seen.places
        self._highest = seen.highest
        device, d_sae = self._highest.device, seen.d_sae
        self._offsets = torch.arange(-TOKENS_BEFORE, TOKENS_AFTER + 1, device=device)
        self.activations = torch.zeros(*self._places.shape, WIDTH, dtype=torch.uint8, device=device)
        """Activations in each context, in units of the largest / `FULL`: `[2, context, d_sae, WIDTH]`;
        0 outside the sequence and at positions without an SAE."""
        self.histogram = torch.zeros(2, d_sae, BINS, dtype=torch.long, device=device)
        """Number of tokens in each of `BINS` equal bins of the activation, from 0 to the largest."""

    def add(self, cell: int, first: int, latents: Tensor, counted: Tensor) -> None:
        """Add sequences.

        Args:
            cell: 0 for the first model, 1 for the second.
            first: The place in the text of the first token.
            latents: `[batch, pos, d_sae]`.
            counted: True at positions that the SAE replaces, `[batch, pos]`.
        """
        length = latents.shape[1]
        inside = (self._places[cell] >= first) & (self._places[cell] < first + counted.numel())
        order, latent = inside.nonzero(as_tuple=True)
        place = self._places[cell, order, latent] - first
        position = (place % length)[:, None] + self._offsets
        exists = (position >= 0) & (position < length)
        at = (place // length)[:, None], position.clamp(0, length - 1)
        values = latents[*at, latent[:, None]].where(exists & counted[at], 0.0)
        self.activations[cell, order, latent] = (
            self._scaled(values, latent[:, None], FULL).round().byte()
        )
        active = latents[counted]
        token, latent = (active > 0).nonzero(as_tuple=True)
        bins = self._scaled(active[token, latent], latent, BINS).long().clamp(max=BINS - 1)
        counts = torch.bincount(latent * BINS + bins, minlength=self.histogram[cell].numel())
        self.histogram[cell] += counts.view_as(self.histogram[cell])

    def _scaled(self, values: Tensor, latent: Tensor, top: int) -> Tensor:
        """Activations of these latents as numbers from 0 to `top`."""
        return (values.float() / self._highest[latent] * top).clamp(0, top)
