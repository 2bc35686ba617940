"""A wrapper around sae-lens's training class, so that an SAE in training can be spliced into a model."""

import math
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sae_lora.common.errors import UserError
from sae_lora.saes.training import training_sae
from sae_lora.saes.training.training_transcoder import TrainingTranscoder
from sae_lora.saes.transcoders import with_skip
from sae_lora.splice.hooks import Coder, decoded

ADAPTED = ("W_enc", "W_dec")
"""The matrices that LoRA adapts in an SAE."""


class SplicedSAE(nn.Module):
    """An SAE in training. In evaluation mode it equals the SAE that sae-lens would load after saving.

    In training mode it uses sae-lens's training class: it reads activations times `scale`, and its
    losses are in these units. Each call then reads one whole batch, because some losses depend on the
    batch as a whole.

    Args:
        sae: The training class, with trainable weights.
        dead_after_steps: A latent that was inactive for more steps than this counts as dead.
        rank: Rank of LoRA on its two matrices, and nothing else is trained; `None` trains all weights.
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
        # In a list, so that torch does not register it as a submodule.
        self._frozen: list[Any] = []
        self.last_forward: training_sae.Forward | None = None
        """Result of the last forward pass in training mode."""
        if rank is not None:
            sae.requires_grad_(False)
            for name in ADAPTED:
                parametrize.register_parametrization(sae, name, _LowRank(getattr(sae, name), rank))
        self.train()

    def encode(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.frozen.encode(x)
        dead = self.since_active > self._dead_after_steps
        scaled = x.flatten(0, -2).float() * self.scale  # as a tensor: a number would wait for the device
        self.last_forward = training_sae.forward(self.sae, scaled, dead, self.step)
        return self.last_forward.latents.reshape(*x.shape[:-1], -1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[..., d_model]` of latents `[..., d_sae]`.

        In training mode the latents must be those of the last `encode`.
        """
        if not self.training:
            return self.frozen.decode(feature_acts)
        assert self.last_forward is not None
        return (self.last_forward.recon / self.scale).reshape(*feature_acts.shape[:-1], -1)

    def decode_with(self, feature_acts: Tensor, x: Tensor) -> Tensor:
        """The reconstruction, with what a skip connection adds."""
        if self.training:
            return self.decode(feature_acts)
        return decoded(self.frozen, feature_acts, x)

    @property
    def frozen(self) -> Coder:
        """The SAE with its present weights, as sae-lens would load it after saving."""
        if not self._frozen:
            sae = training_sae.inference(self._plain(), float(self.scale))
            self._frozen.append(with_skip(sae, sae))
        return self._frozen[0]

    def save(self, folder: Path) -> None:
        """Write the SAE with its present weights in sae-lens's format."""
        training_sae.save(self._plain(), folder, float(self.scale))

    def count_step(self, active: Tensor) -> None:
        """Count a step; `active` `[d_sae]` is true for the latents that were active in it."""
        self.step += 1
        self.since_active += 1
        self.since_active.masked_fill_(active, 0)
        self.drop_frozen()

    def drop_frozen(self) -> None:
        """Drop the frozen copy. To be called after weights have changed."""
        self._frozen.clear()

    def fit_scale(self, resid: Tensor) -> None:
        """Set `scale`, so that residuals `[token, d_model]` times it have the mean norm √d_model.

        For a transcoder they are pairs, as in `TrainingTranscoder`, and the input gets this norm.

        Raises:
            UserError: If there are no residuals, or their norms are not finite or all zero.
        """
        tokens, d_model = len(resid), self.sae.cfg.d_in
        norms = float(resid[:, :d_model].double().norm(dim=-1).sum())
        if not math.isfinite(norms) or norms <= 0:
            raise UserError(
                f"the SAE's input cannot be scaled: the norms of {tokens} residuals sum to {norms:g}"
            )
        self.scale.fill_(math.sqrt(d_model) * tokens / norms)
        if isinstance(self.sae, TrainingTranscoder):
            self.sae.fit_targets(resid)
        self.drop_frozen()

    def _plain(self) -> TrainingSAE[Any]:
        """The training class itself, or with LoRA a copy that has LoRA merged."""
        if not parametrize.is_parametrized(self.sae):
            return self.sae
        weights = {name: weight for name, weight in self.sae.state_dict().items() if "." not in name}
        merged = {name: getattr(self.sae, name) for name in ADAPTED}
        return training_sae.rebuilt(self.sae, weights | merged)


class _LowRank(nn.Module):
    """A matrix plus a low-rank matrix, which starts at zero."""

    def __init__(self, matrix: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = matrix.shape
        self.lora_A = nn.Parameter(torch.empty(rank, columns, device=matrix.device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=matrix.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix + self.lora_B @ self.lora_A
