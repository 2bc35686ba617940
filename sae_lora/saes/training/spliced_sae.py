"""An SAE in training as a splice sees it, whatever its loss: sae-lens's training class inside."""

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sae_lora.saes.sparse import SparseSAE
from sae_lora.saes.training import training_sae
from sae_lora.saes.training.sae_trainer import mean_norm_scale
from sae_lora.splice.hooks import Coder

ADAPTED = ("W_enc", "W_dec")
"""The matrices that LoRA on an SAE changes."""


class SplicedSAE(nn.Module):
    """An SAE in training. Evaluated, it is what it would be once saved and loaded by sae-lens.

    In training mode it is sae-lens's training class, which reads activations times `scale`, and whose
    losses are about those. What it reads then is one batch: some losses are about that as a whole.

    Args:
        sae: The training class, its weights free to move.
        dead_after_steps: Steps without being active after which a latent counts as dead.
        rank: Of LoRA on its two matrices, which then move alone; `None` where all weights move.
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
        """What the last pass in training mode made."""
        if rank is not None:
            sae.requires_grad_(False)
            for name in ADAPTED:
                parametrize.register_parametrization(sae, name, _LowRank(getattr(sae, name), rank))
        self.train()

    def encode(self, x: Tensor) -> Tensor:
        """Latents `[..., d_sae]` of residuals `[..., d_model]`."""
        if not self.training:
            return self.frozen.encode(x)
        dead = self.since_active > self._dead_after_steps
        read = x.flatten(0, -2).float() * float(self.scale)
        self.made = training_sae.forward(self.sae, read, dead, self.step)
        return self.made.latents.reshape(*x.shape[:-1], -1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[..., d_model]` of latents `[..., d_sae]`, in training of those just made."""
        if not self.training:
            return self.frozen.decode(feature_acts)
        assert self.made is not None
        return (self.made.recon / float(self.scale)).reshape(*feature_acts.shape[:-1], -1)

    @property
    def frozen(self) -> SAE[Any]:
        """What it would be now once saved and loaded by sae-lens."""
        if not self._frozen:
            self._frozen.append(training_sae.inference(self._plain(), float(self.scale)))
        return self._frozen[0]

    def save(self, folder: Path) -> None:
        """Writes what it is now in sae-lens's format."""
        training_sae.save(self._plain(), folder, float(self.scale))

    def moved(self, active: Tensor) -> None:
        """Takes note of a step.

        Args:
            active: Latents `[d_sae]` (true) that were active in it.
        """
        self.step += 1
        self.since_active += 1
        self.since_active[active] = 0
        self.has_moved()

    def has_moved(self) -> None:
        """Its weights are others than before."""
        self._frozen.clear()

    def fit_scale(self, resid: Tensor) -> None:
        """Has it read residuals at the length that sae-lens trains on, √d_model on average.

        Args:
            resid: Some of those that it will read, `[token, d_model]`.
        """
        norms = resid.double().norm(dim=-1)
        self.scale.fill_(mean_norm_scale(float(norms.sum()), len(norms), resid.shape[-1]))
        self.has_moved()

    def _plain(self) -> TrainingSAE[Any]:
        """The training class with the weights as they are, LoRA merged; a copy where that was there."""
        if not parametrize.is_parametrized(self.sae):
            return self.sae
        weights = {name: one for name, one in self.sae.state_dict().items() if "." not in name}
        return training_sae.rebuilt(
            self.sae, weights | {name: getattr(self.sae, name) for name in ADAPTED}
        )


def trainable(sae: Coder, sparsity_coefficient: float | None) -> TrainingSAE[Any]:
    """A copy of a loaded SAE that can be trained on; see `new.trainable`.

    Raises:
        ConfigError: For one that cannot.
    """
    plain = sae.sae if isinstance(sae, SparseSAE) else sae
    return training_sae.trainable(plain, sparsity_coefficient)  # pyright: ignore[reportArgumentType]


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
