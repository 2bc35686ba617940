"""SAEs in training, small enough to train in a moment."""

from typing import Any

import torch
from sae_lens import TrainingSAE

from sae_lora.config.enums import Architecture
from sae_lora.saes.training import training_sae
from sae_lora.saes.training.sae_trainer import SteppedSAETrainer
from tests.support.families import D_MODEL

CPU = torch.device("cpu")
HOOKPOINT = "blocks.1.hook_resid_post"
WIDTH, K = 64, 4
TOKENS = 48


def residuals(seed: int, tokens: int = TOKENS) -> torch.Tensor:
    """Sparse sums of a few directions, off centre, `[token, D_MODEL]`: there is something to learn."""
    directions = torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    amounts = torch.rand(tokens, 24, generator=generator)
    return torch.where(amounts > 0.8, 4 * amounts, 0) @ directions + directions[0]


def request(architecture: str, **changes: Any) -> training_sae.SAERequest:
    """A small one."""
    return training_sae.SAERequest(HOOKPOINT, Architecture[architecture], D_MODEL, WIDTH, K)._replace(
        **changes
    )


def in_training(architecture: str, seed: int = 3, **changes: Any) -> TrainingSAE[Any]:
    """An SAE after a few steps, of which no weight is zero any more, with some latents dead."""
    torch.manual_seed(seed)
    sae = training_sae.new(request(architecture, **changes), CPU, {"model_name": "small"})
    dead = torch.arange(WIDTH) > WIDTH // 2
    optimizer = torch.optim.SGD(sae.parameters(), lr=1e-3)
    for step in range(5):
        found = training_sae.forward(sae, residuals(step), dead, step)
        (found.mse + found.aux).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for weight in sae.parameters():
            weight.add_(0.02 * torch.rand_like(weight))
    return sae


def learner(architecture: str, *, steps: int = 24, **changes: Any) -> SteppedSAETrainer:
    """One whose rate rises over a quarter of the steps and falls over a third; some latents are dead."""
    torch.manual_seed(5)
    sae = training_sae.new(request(architecture, **changes), CPU, {"model_name": "small"})
    with torch.no_grad():
        getattr(sae, "b_gate" if architecture == "gated" else "b_enc")[:6] = -50
    return SteppedSAETrainer(
        sae,
        steps=steps,
        batch_tokens=TOKENS,
        lr=1e-2,
        warm_up_steps=steps // 4,
        decay_steps=steps // 3,
        dead_window_steps=2,
        sampling_window_steps=7,
    )
