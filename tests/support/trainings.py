"""Trainings of small models, alone and in packs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import cross_entropy

from sae_lora.common.isolation import Isolation
from sae_lora.common.signals import Interrupted
from sae_lora.config.enums import KLComputation
from sae_lora.config.schema import LoRAConfig, TrainConfig
from sae_lora.models.language_model import LanguageModel
from sae_lora.records.schema import CurvePoint
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Coder, Reading, Splice, spliced
from sae_lora.splice.kl import KL, Comparison, kl_of
from sae_lora.splice.student import LoRAStudent, Student
from sae_lora.train.distill import DistillTrainer
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.optim import GradientState
from sae_lora.train.passes import Passing
from sae_lora.train.train_state import TrainState
from tests.support.families import random_tokens

HELD_OUT = random_tokens(batch=10, length=16, seed=11)
CONFIG = TrainConfig(batch_size=2, lr=3e-3, eval_every_tokens=96, warmup_share=0.1)


def batches(steps: int) -> list[torch.Tensor]:
    """One batch per step."""
    return [random_tokens(batch=2, length=16, seed=seed) for seed in range(steps)]


def student(
    model: LanguageModel, sae: Coder, adapters: LoRAConfig | None = None, block: int = 1
) -> Student:
    """A student with one SAE, initialised from torch's present random state."""
    splices = (Splice(block, sae),)
    return LoRAStudent(model, splices, adapters or LoRAConfig(rank=2))


def training(
    model: LanguageModel,
    sae: Coder,
    config: TrainConfig = CONFIG,
    steps: int = 6,
    adapters: LoRAConfig | None = None,
    block: int = 1,
) -> TrainState:
    """A training as a run builds it: adapters and dropout from the config's seed."""
    torch.manual_seed(config.seed)
    adapters = adapters or LoRAConfig(rank=2, dropout=0.2)
    return GradientState(student(model, sae, adapters, block), config, steps)


def fill(weights: Mapping[str, torch.nn.Parameter], seed: int = 5) -> None:
    """Give adapters values that change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights.values():
            weight.normal_(std=0.3, generator=generator)


def evaluator(
    model: LanguageModel, batch_size: int = 4, chunk_tokens: int = 30, cache_bytes: float = 0
) -> Evaluator:
    """An evaluator on the held-out tokens."""
    comparison = Comparison(Head.of(model), chunk_tokens)
    return Evaluator(model, HELD_OUT, batch_size, comparison, cache_bytes)


class WholePass(NamedTuple):
    """Results of one plain pass over the held-out tokens, with all logits in memory."""

    logits: torch.Tensor
    ce: float
    fvu: dict[str, float]
    """By hookpoint."""
    l0: dict[str, float]
    """By hookpoint."""


@torch.no_grad()
def whole_pass(model: LanguageModel, splices: Sequence[Splice]) -> WholePass:
    """One pass of the model with these SAEs."""
    readings: list[Reading] = []
    with spliced(model, splices, HELD_OUT, readings.append):
        logits = model.model(HELD_OUT, use_cache=False).logits
    ce = cross_entropy(logits[:, :-1].double().flatten(0, 1), HELD_OUT[:, 1:].flatten())
    fvu, l0 = {}, {}
    for reading in readings:
        resid, recon = reading.resid.double(), reading.recon.double()
        variance = (resid - resid.mean(0)).square().sum()
        fvu[reading.hookpoint] = float((resid - recon).square().sum() / variance)
        l0[reading.hookpoint] = float((reading.latents != 0).sum() / len(resid))
    return WholePass(logits, float(ce), fvu, l0)


def kl(model: LanguageModel, how: KLComputation = KLComputation.fused) -> KL:
    """The KL of a few tokens at a time."""
    return kl_of(Comparison(Head.of(model), chunk_tokens=20), how)


def pack(
    model: LanguageModel,
    *trainings: TrainState,
    micro_batch: int | None = None,
    **how: Any,
) -> DistillTrainer:
    """A trainer of these trainings; `how` has the fields of `Passing`."""
    isolation = Isolation(trainings)
    return DistillTrainer(model, isolation, evaluator(model), kl(model), micro_batch, Passing(**how))


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """True if two states have the same tensors, to the last bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def comparable(point: CurvePoint) -> CurvePoint:
    """The point without times and memory, which differ between equal runs."""
    return dataclasses.replace(point, train_seconds=0.0, tokens_per_second=None, peak_memory_gb=None)


def stopped(together: DistillTrainer, step: int, steps: int) -> list[CurvePoint]:
    """Train one run and stop it right after a step; return its points, without times."""
    (training,) = together.active
    points: list[CurvePoint] = []

    def stop(trained: object) -> None:
        if training.step == step:
            raise Interrupted

    if step > 0:
        with pytest.raises(Interrupted):
            for _, point in together.points(batches(steps), stop):
                points.append(comparable(point))
    return points


def curves(together: DistillTrainer, steps: int) -> dict[TrainState, list[CurvePoint]]:
    """Train to the end; return the curve of each training, without times."""
    result: dict[TrainState, list[CurvePoint]] = {run: [] for run in together.active}
    for run, point in together.points(batches(steps)[together.step :]):
        result[run].append(comparable(point))
    return result
