"""A pack computes what the published loop does: to the last bit, or fused, up to rounding."""

import dataclasses

import pytest
import torch

from sae_lora.common.isolation import Isolation
from sae_lora.config.enums import KLComputation, Reduction, Schedule
from sae_lora.config.schema import LoRAConfig
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.lora import Dropout
from sae_lora.splice.hooks import Splice
from sae_lora.splice.student import LoRAStudent
from sae_lora.train.distill import DistillTrainer
from sae_lora.train.optim import GradientState
from scripts.benchmark.reference import Reference, evaluate
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import random_tokens, small_model
from tests.support.trainings import CONFIG, HELD_OUT, NO_IDS, evaluator, fill, kl

SAES = [topk_sae(), jumprelu_sae()]
STEPS = 4
RATE = dataclasses.replace(CONFIG, schedule=Schedule.constant, warmup_share=0.0)
SUMMED = dataclasses.replace(RATE, kl_reduction=Reduction.sequence_sum)
RUNS = [
    (LoRAConfig(rank=1, dropout=0.1), (Splice(1, SAES[0], False),), RATE),
    (LoRAConfig(rank=4, dropout=0.1, targets="mlp"), (Splice(1, SAES[0], False),), RATE),
    (LoRAConfig(rank=16, dropout=0.1), (Splice(1, SAES[1], False),), SUMMED),
    (LoRAConfig(rank=64, dropout=0.1, targets="attn"), (Splice(2, SAES[0], False),), RATE),
    (LoRAConfig(rank=256, dropout=0.1, blocks="all"), (Splice(2, SAES[1], False),), RATE),
    (
        LoRAConfig(rank=8, dropout=0.1, blocks=[1, 3]),
        (Splice(0, SAES[0], False), Splice(2, SAES[1], False)),
        RATE,
    ),
]
BATCHES = [random_tokens(batch=1, length=24, seed=seed) for seed in range(STEPS)]


@pytest.fixture(scope="module", params=["gemma2", "llama"])
def eager(request: pytest.FixtureRequest) -> LanguageModel:
    model = small_model(request.param)
    model.model.set_attn_implementation("eager")
    return model


def references(model: LanguageModel) -> list[dict[str, torch.Tensor]]:
    """The adapters after some steps of the published loop, one run after another."""
    found = []
    for seed, (adapters, splices, config) in enumerate(RUNS):
        torch.manual_seed(seed)
        one = Reference(model, splices, adapters, config, dropout=Dropout)
        for tokens in BATCHES:
            one.step(tokens)
        found.append({name: weight.detach() for name, weight in one.weights.items()})
    return found


def together(model: LanguageModel, how: KLComputation) -> list[dict[str, torch.Tensor]]:
    """The same from a pack."""
    trainings = []
    for seed, (adapters, splices, config) in enumerate(RUNS):
        torch.manual_seed(seed)
        trainings.append(GradientState(LoRAStudent(model, splices, adapters), config, STEPS))
    pack = DistillTrainer(model, Isolation(trainings), evaluator(model), NO_IDS, kl(model, how))
    for tokens in BATCHES:
        pack._take_step(trainings, tokens)
    return [{name: weight.detach() for name, weight in one.student.weights.items()} for one in trainings]


def test_a_pack_is_the_published_loop_run_by_run(eager: LanguageModel) -> None:
    """Adapters after several steps of AdamW with dropout: ranks, SAEs, blocks, targets mixed."""
    expected, found = references(eager), together(eager, KLComputation.full)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_fused_it_is_so_up_to_rounding(eager: LanguageModel) -> None:
    expected, found = references(eager), together(eager, KLComputation.fused)
    for one, other in zip(found, expected, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=2e-4)


def test_evaluation_is_that_of_whole_passes(eager: LanguageModel) -> None:
    adapters, splices, config = RUNS[4]
    references, students = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        references.append(Reference(eager, splices, adapters, config))
        fill(references[-1].weights, seed)
        torch.manual_seed(seed)
        students.append(LoRAStudent(eager, splices, adapters))
        fill(students[-1].weights, seed)
    for found, expected in zip(evaluator(eager)(students), evaluate(references, HELD_OUT), strict=True):
        measured = found.base_ce, found.spliced_ce, found.student_ce, found.kl
        assert measured == pytest.approx(expected, rel=1e-5)
