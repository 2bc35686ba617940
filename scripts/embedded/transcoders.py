"""Train transcoders for every block of a model, on the same forward passes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_lora.common.console import console
from sae_lora.config.enums import Architecture, Hook, Reads
from sae_lora.config.schema import SAEChoice, SAEConfig
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes.training import training_sae
from sae_lora.saes.training.activation_buffer import ActivationBuffer, activations
from sae_lora.saes.training.sae_trainer import SteppedSAETrainer
from sae_lora.saes.training.spliced_sae import SplicedSAE
from sae_lora.splice.mlp_input import Stream
from sae_lora.splice.positions import Special
from scripts.embedded.saes import SAEBudget

WIDTH, L0 = 1024, 16


def make_transcoders(
    folder: Path,
    model: LanguageModel,
    batches: Iterator[Tensor],
    budget: SAEBudget,
    *,
    metadata: Mapping[str, Any],
    special: Special,
    seed: int,
) -> None:
    """Train a BatchTopK transcoder per block, and write them in sae-lens's format, in float16.

    Args:
        folder: The folder to write into.
        model: The model.
        batches: Tokens `[batch, pos]`, enough for the budget and one more.
        budget: Length and speed of training.
        metadata: Facts about model and data for the configs.
        special: Positions that they are not trained on.
        seed: Seed of the order of activations.
    """
    config = SAEConfig(architecture=Architecture.batchtopk_transcoder)
    first = next(batches)
    steps = budget.tokens // first.numel()
    spliced: dict[str, SplicedSAE] = {}
    trainers: dict[str, SteppedSAETrainer] = {}
    sources: dict[str, list[Stream]] = {}
    for block in range(len(model.blocks)):
        choice = SAEChoice(block, Hook.mlp_out, Reads.mlp_in, width=WIDTH, l0=L0)
        stream = Stream(str(Place(block, Hook.mlp_out)), Reads.mlp_in)
        name = f"transcoder_{block}-width_{WIDTH}-l0_{L0}"
        made = training_sae.new(config, choice, model.config.hidden_size, model.device, metadata)
        spliced[name] = SplicedSAE(made, dead_after_steps=max(1, steps // 10))
        (pairs,) = next(activations(model, [stream], [first], special)).values()
        spliced[name].fit_scale(pairs)
        sources[name] = [stream]
        trainers[name] = SteppedSAETrainer(
            made,
            steps=steps,
            batch_tokens=first.numel(),
            lr=budget.lr,
            scale=float(spliced[name].scale),
            warm_up_steps=steps // 20,
            decay_steps=steps // 3,
            dead_window_steps=max(1, steps // 10),
            sampling_window_steps=max(2, steps // 4),
        )
    fill = max(1, budget.buffer_tokens // first.numel())
    buffer = ActivationBuffer(model, sources, special, seed, fill)
    for step in range(steps):
        served = buffer.serve(step, batches)
        errors = {name: trainer.step(served[name]) for name, trainer in trainers.items()}
        if step % 100 == 0 or step == steps - 1:
            error = torch.stack([*errors.values()]).mean()
            console.print(f"step {step:,} of {steps:,}  mean squared error {float(error):.3f}")
    for name, transcoder in spliced.items():
        transcoder.drop_frozen()
        frozen: Any = training_sae.inference(transcoder.sae, float(transcoder.scale))
        frozen.to("cpu", torch.float16).save_model(folder / name)
