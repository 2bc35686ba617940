"""When latents are active: sums over tokens of two models, and their most active tokens."""

import torch
from torch import Tensor, nn

from sae_lora.splice.hooks import Coder, decoded

CONTEXTS = 20
"""Number of tokens on which a latent is most active that are compared."""


class Recorder(nn.Module):
    """An SAE that keeps the latents of its last call, at all positions."""

    def __init__(self, sae: Coder) -> None:
        super().__init__()
        self._sae = sae
        self._latents: Tensor | None = None
        self.eval()

    def taken(self) -> Tensor:
        """The latents, `[batch, pos, d_sae]`."""
        assert self._latents is not None  # a pass through the model
        return self._latents

    def encode(self, x: Tensor) -> Tensor:
        self._latents = self._sae.encode(x)
        return self._latents

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self._sae.decode(feature_acts)

    def decode_with(self, feature_acts: Tensor, x: Tensor) -> Tensor:
        return decoded(self._sae, feature_acts, x)


class Activations:
    """Activations of the latents of one SAE on the same tokens in two models, before and after.

    Args:
        d_sae: Number of latents.
        device: Device of the sums.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        zeros = torch.zeros(2, d_sae, dtype=torch.float64, device=device)
        self.d_sae = d_sae
        self.tokens = 0
        """Number of tokens so far."""
        self._active, self._sums, self._squares = zeros, zeros.clone(), zeros.clone()
        self._products = zeros[0].clone()
        self._top = torch.zeros(2, 0, d_sae, device=device)
        self._places = torch.zeros(2, 0, d_sae, dtype=torch.long, device=device)

    def add(self, places: Tensor, before: Tensor, after: Tensor) -> None:
        """Add tokens.

        Args:
            places: Their places in the text, `[token]`.
            before: Their latents in the first model, `[token, d_sae]`.
            after: In the second model.
        """
        self.tokens += len(places)
        self._products += (before.double() * after.double()).sum(0)
        tops = []
        for cell, latents in enumerate((before, after)):
            exact = latents.double()
            self._active[cell] += (latents > 0).sum(0)
            self._sums[cell] += exact.sum(0)
            self._squares[cell] += exact.square().sum(0)
            values = torch.cat([self._top[cell], latents.float()])
            numbers = torch.cat([self._places[cell], places[:, None].expand_as(latents)])
            top, order = values.topk(min(CONTEXTS, len(values)), dim=0)
            tops.append((top, numbers.gather(0, order)))
        self._top, self._places = (torch.stack(each) for each in zip(*tops, strict=True))

    @property
    def top(self) -> Tensor:
        """The largest activations in each model, `[2, CONTEXTS, d_sae]`."""
        return self._top

    @property
    def places(self) -> Tensor:
        """The places of the tokens with these activations; −1 where the latent is not active."""
        return self._places.where(self._top > 0, -1)

    @property
    def highest(self) -> Tensor:
        """The largest activation in either model, `[d_sae]`."""
        return self._top[:, 0].amax(0)

    @property
    def active(self) -> Tensor:
        """Number of tokens on which a latent is active, `[2, d_sae]`."""
        return self._active

    @property
    def density(self) -> Tensor:
        """Share of tokens on which a latent is active, `[2, d_sae]`."""
        return self._active / self.tokens

    @property
    def mean(self) -> Tensor:
        """Mean activation where a latent is active, `[2, d_sae]`; 0 if it never is."""
        return self._sums / self._active.clamp(min=1)

    @property
    def correlation(self) -> Tensor:
        """Correlation of a latent's activations token by token, `[d_sae]`; NaN if they are constant."""
        means = self._sums / self.tokens
        variances = self._squares / self.tokens - means.square()
        covariance = self._products / self.tokens - means[0] * means[1]
        return covariance / variances.clamp(min=0).prod(0).sqrt()

    @property
    def overlap(self) -> Tensor:
        """Jaccard index of the most active tokens before and after, `[d_sae]`; NaN if there are none."""
        before, after = self.places
        shared = ((before[:, None] == after[None]) & (before >= 0)[:, None]).sum((0, 1))
        either = (before >= 0).sum(0) + (after >= 0).sum(0) - shared
        return shared / either.where(either > 0, torch.nan)
