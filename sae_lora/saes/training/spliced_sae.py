"""An SAE in training as a splice sees it, around sae-lens's training class."""

import math
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sae_lora.common.errors import UserError
from sae_lora.saes.training import training_sae

ADAPTED = ("W_enc", "W_dec")
"""The matrices that LoRA on an SAE changes."""


class SplicedSAE(nn.Module):
    """An SAE in training. In evaluation mode it is as sae-lens would load it once saved.

    In training mode it is sae-lens's training class: it reads activations times `scale`, and its losses
    are about those. Its input is then one batch: some losses are about the batch as a whole.

    Args:
        sae: The training class, with trainable weights.
        dead_after_steps: Steps without being active after which a latent counts as dead.
        rank: Rank of LoRA on its two matrices, which are then trained alone; `None` trains all weights.
    """

    scale: Tensor
    since_active: Tensor

    def __init__(self, sae: TrainingSAE[Any], dead_after_steps: int, rank: int | None = None) -> None:
        super().__init__()
        self.sae = sae
        self._dead_after_steps = dead_after_steps
        self.step = 0
        """Steps taken."""
        self.register_buffer("scale", torch.ones((), dtype=torch.float64, device=sae.device))
        self.register_buffer("since_active", torch.zeros(sae.cfg.d_sae, device=sae.device))
        self._frozen: list[SAE[Any]] = []  # in a list, so that it counts as no part of this module
        self.made: training_sae.Forward | None = None
        """The last pass in training mode."""
        if rank is not None:
            sae.requires_grad_(False)
            for name in ADAPTED:
                parametrize.register_parametrization(sae, name, _LowRank(getattr(sae, name), rank))
        self.train()

    def encode(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.frozen.encode(x)
        dead = self.since_active > self._dead_after_steps
        read = x.flatten(0, -2).float() * float(self.scale)
        self.made = training_sae.forward(self.sae, read, dead, self.step)
        return self.made.latents.reshape(*x.shape[:-1], -1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[..., d_model]` of latents `[..., d_sae]`; in training, of the last ones."""
        if not self.training:
            return self.frozen.decode(feature_acts)
        assert self.made is not None
        return (self.made.recon / float(self.scale)).reshape(*feature_acts.shape[:-1], -1)

    @property
    def frozen(self) -> SAE[Any]:
        """The SAE of now as sae-lens would load it once saved."""
        if not self._frozen:
            self._frozen.append(training_sae.inference(self._plain(), float(self.scale)))
        return self._frozen[0]

    def save(self, folder: Path) -> None:
        """Write the SAE of now in sae-lens's format."""
        training_sae.save(self._plain(), folder, float(self.scale))

    def moved(self, active: Tensor) -> None:
        """Count a step in which these latents `[d_sae]` (true) were active."""
        self.step += 1
        self.since_active += 1
        self.since_active[active] = 0
        self.has_moved()

    def has_moved(self) -> None:
        """Drop the frozen copy; to be called when weights have changed."""
        self._frozen.clear()

    def fit_scale(self, resid: Tensor) -> None:
        """Set `scale`, by which residuals `[token, d_model]` get the mean norm √d_model.

        Raises:
            UserError: Where there are none, or all are zero, or not finite.
        """
        tokens, d_model = resid.shape
        norms = float(resid.double().norm(dim=-1).sum())
        if not math.isfinite(norms) or norms <= 0:
            raise UserError(f"no scale: {tokens} residuals have norms of {norms:g} in all")
        self.scale.fill_(math.sqrt(d_model) * tokens / norms)
        self.has_moved()

    def _plain(self) -> TrainingSAE[Any]:
        """The training class without LoRA, or a copy of it with LoRA merged."""
        if not parametrize.is_parametrized(self.sae):
            return self.sae
        weights = {name: weight for name, weight in self.sae.state_dict().items() if "." not in name}
        merged = {name: getattr(self.sae, name) for name in ADAPTED}
        return training_sae.rebuilt(self.sae, weights | merged)


class _LowRank(nn.Module):
    """A matrix plus a low-rank one, which is zero at first."""

    def __init__(self, matrix: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = matrix.shape
        self.lora_A = nn.Parameter(torch.empty(rank, columns, device=matrix.device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=matrix.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix + self.lora_B @ self.lora_A
