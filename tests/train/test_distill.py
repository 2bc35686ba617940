"""Training and evaluation: the weights that change, and the values of the results."""

import dataclasses

import pytest
import torch
from torch.nn.functional import log_softmax

from sae_lora.common.errors import UserError
from sae_lora.config.enums import Reduction, Schedule
from sae_lora.config.schema import LoRAConfig, TrainConfig
from sae_lora.models import lora
from sae_lora.models.hookpoints import resid_post
from sae_lora.models.language_model import LanguageModel
from sae_lora.records.schema import CurvePoint
from sae_lora.saes.loading import IdentitySAE
from sae_lora.splice.hooks import Coder, Reading, Splice, spliced
from sae_lora.train.evaluator import Reconstruction
from sae_lora.train.lr_schedule import lr_factor
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import D_MODEL, random_tokens, small_model
from tests.support.trainings import (
    CONFIG,
    batches,
    comparable,
    evaluator,
    fill,
    pack,
    student,
    training,
    whole_pass,
)


def train(
    model: LanguageModel,
    sae: Coder,
    config: TrainConfig = CONFIG,
    steps: int = 6,
    adapters: LoRAConfig | None = None,
) -> list[CurvePoint]:
    run = training(model, sae, config, steps, adapters)
    return [point for _, point in pack(model, run).points(batches(steps))]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["after", "all"])
def test_training_closes_the_gap_and_changes_only_adapters(model: LanguageModel, blocks: str) -> None:
    sae = jumprelu_sae()
    frozen = {**model.model.state_dict(), **sae.state_dict(prefix="sae.")}
    originals = {name: weight.clone() for name, weight in frozen.items()}
    points = train(model, sae, adapters=LoRAConfig(rank=8, blocks=blocks), steps=20)
    assert points[-1].kl < points[0].kl
    assert points[-1].student_ce != points[0].student_ce
    assert all(torch.equal(weight, originals[name]) for name, weight in frozen.items())
    assert not any(weight.requires_grad for weight in model.model.parameters())


def test_same_seed_twice_gives_the_same_curve() -> None:
    def curve(seed: int) -> list[CurvePoint]:
        points = train(small_model("llama"), topk_sae(), dataclasses.replace(CONFIG, seed=seed))
        return [comparable(point) for point in points]

    assert curve(0) == curve(0)
    assert curve(0) != curve(1)


def test_points_before_during_and_after_training() -> None:
    points = train(small_model("llama"), topk_sae(), steps=7)
    assert [point.tokens for point in points] == [0, 96, 192, 224]
    assert [point.step for point in points] == [0, 3, 6, 7]
    first = points[0]
    assert first.student_ce == first.spliced_ce
    assert first.gap_closed == 0
    assert {point.base_ce for point in points} == {first.base_ce}


def test_identity_has_no_gap_to_close(model: LanguageModel) -> None:
    (first, *_) = train(model, IdentitySAE(), steps=1)
    assert first.ce_gap == 0
    assert first.kl == 0
    assert first.gap_closed is None
    assert first.top1_agreement == 1
    assert first.fvu == 0


@pytest.mark.parametrize("make_sae", [topk_sae, jumprelu_sae])
@pytest.mark.parametrize("blocks", ["after", "all"])
def test_evaluation_equals_the_direct_computation(model: LanguageModel, make_sae, blocks: str) -> None:
    sae = make_sae()
    measured = student(model, sae, LoRAConfig(rank=2, blocks=blocks))
    fill(measured.weights)
    (evaluation,) = evaluator(model)([measured])
    base, plain = whole_pass(model, []), whole_pass(model, [Splice(1, sae)])
    adapted = whole_pass(measured.model, [Splice(1, sae)])
    teacher, learner = log_softmax(base.logits, -1), log_softmax(adapted.logits, -1)
    kl = torch.nn.functional.kl_div(learner, teacher, log_target=True, reduction="none").sum(-1).mean()
    assert evaluation.base_ce == pytest.approx(base.ce, abs=1e-5)
    assert evaluation.spliced_ce == pytest.approx(plain.ce, abs=1e-5)
    assert evaluation.student_ce == pytest.approx(adapted.ce, abs=1e-5)
    assert evaluation.kl == pytest.approx(float(kl), abs=1e-5)
    agreement = (base.logits.argmax(-1) == adapted.logits.argmax(-1)).float().mean()
    assert evaluation.top1_agreement == pytest.approx(float(agreement), rel=1e-6)
    (figures,) = evaluation.per_sae.values()
    assert figures["fvu"] == pytest.approx(adapted.fvu[resid_post(1)], rel=1e-4)
    assert figures["l0"] == pytest.approx(adapted.l0[resid_post(1)])


def test_evaluation_does_not_depend_on_batching(model: LanguageModel) -> None:
    evaluated = student(model, topk_sae())
    fill(evaluated.weights)
    (whole,), (parts,) = evaluator(model, 10, 1000)([evaluated]), evaluator(model, 3, 7)([evaluated])
    for expected, result in zip(whole[:5], parts[:5], strict=True):
        assert expected == pytest.approx(result, rel=1e-5, abs=1e-6)
    (of_whole,), (of_parts,) = whole.per_sae.values(), parts.per_sae.values()
    assert of_whole == pytest.approx(of_parts, rel=1e-5)


@pytest.mark.slow
def test_the_cache_of_evaluations_changes_no_bit(model: LanguageModel) -> None:
    """Students that change, join, leave and return; with memory for all states, none, or some."""
    students = [
        student(model, topk_sae()),
        student(model, jumprelu_sae(), LoRAConfig(rank=2, blocks="all")),
        student(model, topk_sae(), LoRAConfig(rank=3), block=2),
    ]
    caching, uncached = evaluator(model, cache_bytes=1e9), evaluator(model)
    half_cached = evaluator(model, cache_bytes=1.2 * 10 * 16 * 32 * 4 * 3)
    for number, indices in enumerate([(0, 1), (0, 1), (0, 1, 2), (2,), (0, 1, 2), (1, 2)]):
        for evaluated in students:
            fill(evaluated.weights, seed=number)
        chosen = [students[index] for index in indices]
        assert caching(chosen) == uncached(chosen) == half_cached(chosen) == evaluator(model)(chosen)
    assert len(caching._trunks) == 3
    assert not uncached._trunks


def test_evaluation_restores_every_mode(model: LanguageModel) -> None:
    evaluated = student(model, topk_sae(), LoRAConfig(rank=2, dropout=0.5))
    lora.set_adapter_dropout(evaluated.model, True)
    next(evaluated.model.blocks[0].children()).train()
    modes = {name: module.training for name, module in evaluated.model.model.named_modules()}
    assert len(set(modes.values())) == 2
    evaluate = evaluator(model)
    assert evaluate([evaluated]) == evaluate([evaluated])
    assert {name: module.training for name, module in evaluated.model.model.named_modules()} == modes


def test_reconstruction_worked_by_hand() -> None:
    """Residuals (0,0), (2,0), (4,0): variance 8 about their mean. Errors 1 and 1: FVU 2/8."""
    sums = Reconstruction(topk_sae(k=2, width=3), D_MODEL, torch.device("cpu"))
    resid, recon = torch.zeros(2, 3, D_MODEL)
    resid[:, :2] = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    recon[:, :2] = torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 0.0]])
    latents = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    sums.add(Reading("x", resid[:1], latents[:1], recon[:1], torch.tensor([False])))
    sums.add(Reading("x", resid[1:], latents[1:], recon[1:], torch.tensor([False, True])))
    assert sums.fvu == pytest.approx(0.25)
    # Without the last token: variance 2, error 1.
    assert sums.metrics["fvu_without_outliers"] == pytest.approx(0.5)
    assert sums.l0 == pytest.approx(1.0)
    assert sums.dead == pytest.approx(1 / 3)


def test_a_step_equals_the_plain_step() -> None:
    """One step of the loop equals AdamW on the KL of whole logits, written out."""
    sae, tokens = topk_sae(), random_tokens(batch=2, length=16, seed=0)
    config = dataclasses.replace(CONFIG, warmup_share=0.0, schedule=Schedule.constant)
    model = small_model("gemma2")
    run = training(model, sae, config, 1, LoRAConfig(rank=2))
    list(pack(model, run).points([tokens]))
    trained = [weight.detach() for weight in run.student.weights.values()]

    model = small_model("gemma2")
    torch.manual_seed(config.seed)
    adapters = lora.attach(model, LoRAConfig(rank=2), first_sae=1)
    weights = list(lora.trainable_weights(model).values())
    with torch.no_grad(), adapters.disable_adapter():
        teacher = log_softmax(model.model(tokens, use_cache=False).logits, -1)
    with spliced(model, [Splice(1, sae)]):
        learner = log_softmax(model.model(tokens, use_cache=False).logits, -1)
    (teacher.exp() * (teacher - learner)).sum(-1).mean().backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0).step()
    for result, expected in zip(trained, weights, strict=True):
        torch.testing.assert_close(result, expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_summed_loss_scales_the_gradient() -> None:
    """The first gradient is larger by a factor of the sequence length."""
    norms = {}
    for reduction in Reduction:
        config = dataclasses.replace(CONFIG, kl_reduction=reduction, eval_every_tokens=1)
        norms[reduction] = train(small_model("llama"), topk_sae(), config, steps=1)[-1].grad_norm
    assert norms[Reduction.sequence_sum] == pytest.approx(16 * norms[Reduction.token_mean], rel=1e-4)


def test_lora_plus_multiplies_the_step_of_b() -> None:
    """AdamW's first step is as long as the rate, and A has no gradient while B is zero."""
    config = dataclasses.replace(CONFIG, warmup_share=0.0, grad_clip=None)
    tokens, weights = random_tokens(batch=2, length=16, seed=0), []
    for ratio in (1.0, 8.0):
        model = small_model("llama")
        run = training(model, topk_sae(), dataclasses.replace(config, loraplus_ratio=ratio), 1)
        list(pack(model, run).points([tokens]))
        weights.append(run.student.weights)
    for name, plain in weights[0].items():
        expected = 8 * plain if "lora_B" in name else plain
        torch.testing.assert_close(weights[1][name], expected)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_learning_rate(schedule: Schedule) -> None:
    config = TrainConfig(schedule=schedule, warmup_share=0.25)
    rates = [lr_factor(config, 8, step) for step in range(9)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    expected = [1.0] * 6 if schedule is Schedule.constant else [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0]
    assert rates[3:] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_is_reported() -> None:
    config = dataclasses.replace(CONFIG, lr=1e30, grad_clip=None, warmup_share=0.0)
    with pytest.raises(UserError, match=r"train\.lr"):
        train(small_model("llama"), topk_sae(), config, steps=12)
