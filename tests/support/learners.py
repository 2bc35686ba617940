"""Small SAEs in training, which train in a moment."""

from typing import Any

import torch
from sae_lens import TrainingSAE

from sae_lora.config.enums import TRANSCODING, Architecture
from sae_lora.config.schema import SAEChoice, SAEConfig
from sae_lora.saes.training import training_sae
from sae_lora.saes.training.sae_trainer import SteppedSAETrainer
from tests.support.families import D_MODEL

CPU = torch.device("cpu")
HOOKPOINT = "blocks.1.hook_resid_post"
OF_SAES = [each.name for each in Architecture if each not in TRANSCODING]
"""Architectures of SAEs."""
WIDTH, K = 64, 4
TOKENS = 48


def residuals(seed: int, tokens: int = TOKENS) -> torch.Tensor:
    """Learnable residuals: sparse sums of a few directions, with a mean, `[token, D_MODEL]`."""
    directions = torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    amounts = torch.rand(tokens, 24, generator=generator)
    return torch.where(amounts > 0.8, 4 * amounts, 0) @ directions + directions[0]


def new(
    architecture: str, *, k: float | None = K, sparsity_coefficient: float | None = None, **metadata: Any
) -> TrainingSAE[Any]:
    """A small SAE before its first step."""
    kind = Architecture[architecture]
    config = SAEConfig(architecture=kind, sparsity_coefficient=sparsity_coefficient)
    choice = SAEChoice(block=1, width=WIDTH, l0=k)
    return training_sae.new(config, choice, D_MODEL, CPU, {"model_name": "small"} | metadata)


def in_training(architecture: str, seed: int = 3, **changes: Any) -> TrainingSAE[Any]:
    """An SAE after a few steps with some latents dead; none of its weights is zero."""
    torch.manual_seed(seed)
    sae = new(architecture, **changes)
    dead = torch.arange(WIDTH) > WIDTH // 2
    optimizer = torch.optim.SGD(sae.parameters(), lr=1e-3)
    for step in range(5):
        forward = training_sae.forward(sae, residuals(step), dead, step)
        (forward.mse + forward.aux).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for weight in sae.parameters():
            weight.add_(0.02 * torch.rand_like(weight))
    return sae


def learner(
    architecture: str, *, steps: int = 24, scale: float = 1.0, **changes: Any
) -> SteppedSAETrainer:
    """A trainer whose rate rises for a quarter of the steps and falls for a third; some latents die."""
    torch.manual_seed(5)
    sae = new(architecture, **changes)
    with torch.no_grad():
        getattr(sae, "b_gate" if architecture == "gated" else "b_enc")[:6] = -50
    return trainer(
        sae,
        steps=steps,
        scale=scale,
        warm_up_steps=steps // 4,
        decay_steps=steps // 3,
        dead_window_steps=2,
        sampling_window_steps=7,
    )


def trainer(sae: TrainingSAE[Any], **changes: Any) -> SteppedSAETrainer:
    """A trainer of this SAE, with a constant rate by default."""
    values: dict[str, Any] = {
        "batch_tokens": TOKENS,
        "lr": 1e-2,
        "scale": 1.0,
        "warm_up_steps": 0,
        "decay_steps": 0,
        "dead_window_steps": 5,
        "sampling_window_steps": 5,
    }
    return SteppedSAETrainer(sae, **values | changes)
