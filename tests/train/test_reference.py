"""A pack computes the same as the published loop: to the last bit, or up to rounding if fused."""

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
from tests.support.trainings import CONFIG, HELD_OUT, evaluator, fill, kl

SAES = [topk_sae(), jumprelu_sae()]
STEPS = 4
RATE = dataclasses.replace(CONFIG, schedule=Schedule.constant, warmup_share=0.0)
SUMMED = dataclasses.replace(RATE, kl_reduction=Reduction.sequence_sum)
RUNS = [
    (LoRAConfig(rank=1, dropout=0.1), (Splice(1, SAES[0]),), RATE),
    (LoRAConfig(rank=4, dropout=0.1, targets="mlp"), (Splice(1, SAES[0]),), RATE),
    (LoRAConfig(rank=16, dropout=0.1), (Splice(1, SAES[1]),), SUMMED),
    (LoRAConfig(rank=64, dropout=0.1, targets="attn"), (Splice(2, SAES[0]),), RATE),
    (LoRAConfig(rank=256, dropout=0.1, blocks="all"), (Splice(2, SAES[1]),), RATE),
    (
        LoRAConfig(rank=8, dropout=0.1, blocks=[1, 3]),
        (Splice(0, SAES[0]), Splice(2, SAES[1])),
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
    """The adapters after some steps of the published loop, for each run."""
    results = []
    for seed, (adapters, splices, config) in enumerate(RUNS):
        torch.manual_seed(seed)
        reference = Reference(model, splices, adapters, config, dropout=Dropout)
        for tokens in BATCHES:
            reference.step(tokens)
        results.append({name: weight.detach() for name, weight in reference.weights.items()})
    return results


def together(model: LanguageModel, computation: KLComputation) -> list[dict[str, torch.Tensor]]:
    """The adapters after the same steps in a pack."""
    trainings = []
    for seed, (adapters, splices, config) in enumerate(RUNS):
        torch.manual_seed(seed)
        trainings.append(GradientState(LoRAStudent(model, splices, adapters), config, STEPS))
    pack = DistillTrainer(model, Isolation(trainings), evaluator(model), kl(model, computation))
    for tokens in BATCHES:
        pack._take_step(trainings, tokens)
    return [{name: weight.detach() for name, weight in run.student.weights.items()} for run in trainings]


def test_a_pack_equals_the_published_loop(eager: LanguageModel) -> None:
    """Adapters after several steps of AdamW with dropout, for different ranks, SAEs, blocks, targets."""
    expected, results = references(eager), together(eager, KLComputation.full)
    for result, reference in zip(results, expected, strict=True):
        assert result.keys() == reference.keys()
        assert all(torch.equal(result[name], reference[name]) for name in result)


def test_the_fused_kl_equals_the_published_loop_up_to_rounding(eager: LanguageModel) -> None:
    expected, results = references(eager), together(eager, KLComputation.fused)
    for result, reference in zip(results, expected, strict=True):
        for name in result:
            torch.testing.assert_close(result[name], reference[name], rtol=1e-2, atol=2e-4)


def test_evaluation_equals_that_of_whole_passes(eager: LanguageModel) -> None:
    adapters, splices, config = RUNS[4]
    references, students = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        references.append(Reference(eager, splices, adapters, config))
        fill(references[-1].weights, seed)
        torch.manual_seed(seed)
        students.append(LoRAStudent(eager, splices, adapters))
        fill(students[-1].weights, seed)
    for result, expected in zip(evaluator(eager)(students), evaluate(references, HELD_OUT), strict=True):
        measured = result.base_ce, result.spliced_ce, result.student_ce, result.kl
        assert measured == pytest.approx(expected, rel=1e-5)
