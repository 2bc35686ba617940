"""Runs that train together: each equals the same run trained alone, to the last bit."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from sae_lora.common.errors import UserError
from sae_lora.common.isolation import Isolation
from sae_lora.config.enums import Reduction, Schedule
from sae_lora.config.schema import LoRAConfig
from sae_lora.models.language_model import LanguageModel
from sae_lora.records.schema import CurvePoint
from sae_lora.splice.trunk import Trunk
from sae_lora.train import distill
from sae_lora.train.checkpoint import Snapshot
from sae_lora.train.cost.memory import PeakMemory
from sae_lora.train.distill import DistillTrainer
from sae_lora.train.optim import GradientState
from sae_lora.train.train_state import TrainState
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import random_tokens, small_model
from tests.support.stepping import gradients
from tests.support.trainings import (
    CONFIG,
    batches,
    comparable,
    curves,
    evaluator,
    fill,
    kl,
    pack,
    same,
    stopped,
    training,
)

pytestmark = pytest.mark.slow  # many seconds in all

STEPS = 7
MODELS = {family: small_model(family) for family in ("gemma2", "llama")}
SAES = [topk_sae(), jumprelu_sae()]


def variants(family: str) -> list[Callable[[], TrainState]]:
    """Runs that differ in everything that runs of a pack may differ in."""
    model = MODELS[family]

    def variant(rank: int, sae: int = 0, block: int = 1, **settings: object) -> Callable[[], TrainState]:
        adapters = {
            name: settings.pop(name)
            for name in ("alpha", "dropout", "targets", "blocks", "rank_stabilised")
            if name in settings
        }
        config = dataclasses.replace(CONFIG, **settings)  # pyright: ignore[reportArgumentType]
        lora = LoRAConfig(**{"rank": rank, "dropout": 0.2} | adapters)  # pyright: ignore
        return lambda: training(model, SAES[sae], config, STEPS, lora, block)

    return [
        variant(1),
        variant(4, alpha=4.0, seed=3),
        variant(16, sae=1, lr=1e-2),
        variant(64, block=2, dropout=0.5, targets="attn"),
        variant(256, dropout=0.0, weight_decay=0.1, rank_stabilised=True),
        variant(2, blocks="all", schedule=Schedule.constant),
        variant(2, blocks=[3], grad_clip=None),
        variant(4, sae=1, block=0, targets="mlp", kl_reduction=Reduction.sequence_sum, warmup_share=0.5),
        variant(4, blocks=[0, 2], block=2),
    ]


def ended(run: TrainState) -> dict[str, torch.Tensor]:
    return run.state().tensors


Alone = list[tuple[list[CurvePoint], Snapshot]]


@pytest.fixture(scope="module", params=sorted(MODELS))
def alone(request: pytest.FixtureRequest) -> tuple[str, Alone]:
    """Curve and last state of each run in a pack of its own."""
    results = []
    for make in variants(request.param):
        run = make()
        (curve,) = curves(pack(MODELS[request.param], run), STEPS).values()
        results.append((curve, run.state()))
    assert len({repr(curve) for curve, _ in results}) == len(results)
    return request.param, results


def test_packed_runs_equal_single_runs(alone: tuple[str, Alone]) -> None:
    """Curves, weights, optimizers and random states, after several steps with dropout."""
    family, expected = alone
    trainings = [make() for make in variants(family)]
    result = curves(pack(MODELS[family], *trainings), STEPS)
    for run, (curve, state) in zip(trainings, expected, strict=True):
        assert result[run] == curve
        assert same(ended(run), state.tensors)


def test_groups_of_runs_change_no_bit(alone: tuple[str, Alone], monkeypatch: pytest.MonkeyPatch) -> None:
    """It also limits the activations in memory."""
    family, expected = alone
    peaks = []
    for at_once in (1, 4):
        monkeypatch.setattr(distill, "AT_ONCE", at_once)
        trainings = [make() for make in variants(family)[:4]]
        trainer = pack(MODELS[family], *trainings)
        assert curves(trainer, STEPS) == {
            run: curve for run, (curve, _) in zip(trainings, expected, strict=False)
        }
        with PeakMemory() as memory:
            trainer._take_step(trainings, batches(1)[0])
        peaks.append(memory.peak)
    assert peaks[0] < 0.6 * peaks[1]


@pytest.mark.parametrize("order", [(2, 0), (5, 3, 8), (7, 6, 1, 4)])
def test_other_runs_of_a_pack_do_not_matter(alone: tuple[str, Alone], order: tuple[int, ...]) -> None:
    family, expected = alone
    trainings = [variants(family)[number]() for number in order]
    result = curves(pack(MODELS[family], *trainings), STEPS)
    for run, number in zip(trainings, order, strict=True):
        assert result[run] == expected[number][0]
        assert same(ended(run), expected[number][1].tensors)


def test_runs_may_resume_at_different_steps(alone: tuple[str, Alone]) -> None:
    """They meet at a later step, and each ends as if it had never stopped."""
    family, expected = alone
    trainings, earlier_points = [], []
    for number, stop in ((0, 0), (3, 5), (5, 2), (7, STEPS)):
        stopped_run, resumed = (variants(family)[number]() for _ in range(2))
        earlier_points.append(stopped(pack(MODELS[family], stopped_run), stop, STEPS))
        resumed.restore(stopped_run.state())
        trainings.append((number, resumed))
    result = curves(pack(MODELS[family], *(resumed for _, resumed in trainings)), STEPS)
    for (number, resumed), points in zip(trainings, earlier_points, strict=True):
        assert points + result[resumed] == expected[number][0]
        assert same(ended(resumed), expected[number][1].tensors)


class TestOneThatFails:
    """It is dropped, and the others end as if it had not been in the pack."""

    FAMILY = "llama"

    def together(
        self, *numbers: int
    ) -> tuple[DistillTrainer, list[TrainState], dict[TrainState, Exception]]:
        trainings = [variants(self.FAMILY)[number]() for number in numbers]
        errors: dict[TrainState, Exception] = {}

        def fail(run: TrainState, error: Exception) -> None:
            errors[run] = error
            run.reset()

        model = MODELS[self.FAMILY]
        isolation = Isolation(trainings, fail)
        trainer = DistillTrainer(model, isolation, evaluator(model), kl(model))
        return trainer, trainings, errors

    @pytest.mark.parametrize("at", ["hidden", "take_step", "point"])
    def test_at_any_moment(self, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
        expected, (first, _, third), _ = self.together(0, 1, 2)
        whole = curves(expected, STEPS)
        trainer, (run, failing, last), errors = self.together(0, 1, 2)
        owner = GradientState if at == "hidden" else TrainState
        method = getattr(owner, at)

        def fails(run: GradientState | TrainState, *arguments: object) -> object:
            if run is failing and failing.step == 3:
                raise ZeroDivisionError("injected")
            return method(run, *arguments)

        monkeypatch.setattr(owner, at, fails)
        curve = curves(trainer, STEPS)
        assert list(errors) == [failing]
        assert curve[run] == whole[first]
        assert curve[last] == whole[third]
        assert same(ended(run), ended(first))
        assert not failing.has_ended

    def test_by_a_loss_that_is_not_finite(self) -> None:
        model = MODELS[self.FAMILY]
        absurd = dataclasses.replace(CONFIG, lr=1e30, grad_clip=None, warmup_share=0.0)
        trainer, (first, second), errors = self.together(0, 1)
        failing = training(model, SAES[0], absurd, STEPS)
        for trainings in (trainer.active, trainer._trainings.runs):
            trainings.append(failing)
        curve = curves(trainer, STEPS)
        assert isinstance(errors[failing], UserError)
        for run in (first, second):
            assert len(curve[run]) == 4
            assert run.has_ended

    def test_all_of_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer, trainings, errors = self.together(0, 1)

        def fails(training: TrainState, *arguments: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(TrainState, "take_step", fails)
        curves(trainer, STEPS)
        assert errors.keys() == set(trainings)
        assert trainer.active == []


def test_a_failed_step_can_be_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example after running out of memory: dropout draws the same numbers again."""
    model = MODELS["llama"]
    expected = variants("llama")[0]()
    whole = curves(pack(model, expected), STEPS)[expected]
    run = variants("llama")[0]()
    take_step = TrainState.take_step

    def fails_once(training: TrainState, *arguments: object) -> None:
        if training.step == 3:
            monkeypatch.undo()
            raise torch.OutOfMemoryError("no room")
        take_step(training, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(TrainState, "take_step", fails_once)
    points = []
    with pytest.raises(torch.OutOfMemoryError):
        points += [comparable(point) for _, point in pack(model, run).points(batches(STEPS))]
    resumed = variants("llama")[0]()
    resumed.restore(run.state())
    remaining = curves(pack(model, resumed), STEPS)[resumed]
    assert remaining == whole[-len(remaining) :]
    assert same(ended(resumed), ended(expected))


def test_training_cannot_resume_from_an_incomplete_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example after running out of memory inside the optimiser, when some weights have changed."""
    run = variants("llama")[0]()

    def fails(optimizer: torch.optim.Optimizer) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(run._optimizer, "step", lambda: fails(run._optimizer))
    assert run.is_between_steps
    with pytest.raises(torch.OutOfMemoryError):
        list(pack(MODELS["llama"], run).points(batches(STEPS)))
    assert not run.is_between_steps


def test_seconds_are_divided_among_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances a second per reading: the seconds of the runs add up to the pack's."""
    seconds = iter(range(1_000_000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))

    def seconds_of(number: int) -> list[float]:
        trainings = [variants("llama")[0]() for _ in range(number)]
        trainer = pack(MODELS["llama"], *trainings)
        last = {run: point.train_seconds for run, point in trainer.points(batches(STEPS))}
        return list(last.values())

    (single,) = seconds_of(1)
    shares = seconds_of(4)
    assert sum(shares) == pytest.approx(single)
    assert len(set(shares)) == 1


@pytest.mark.parametrize("blocks", ["after", "all"])
def test_recomputation_changes_no_bit(model: LanguageModel, blocks: str) -> None:
    """Activation checkpointing with dropout, and with an SAE inside the live part."""
    results = []
    for recomputes in (False, True):
        config = dataclasses.replace(CONFIG, activation_checkpointing=recomputes)
        adapters = LoRAConfig(rank=2, dropout=0.2, blocks=blocks)
        run = training(model, topk_sae(), config, adapters=adapters)
        (points,) = curves(pack(model, run), 6).values()
        results.append((points, run.student.weights))
    (plain, weights), (recomputed, recomputed_weights) = results
    assert plain == recomputed
    assert all(torch.equal(weights[name], recomputed_weights[name]) for name in weights)


@pytest.mark.parametrize("reduction", list(Reduction))
def test_gradients_of_micro_batches_add_up(model: LanguageModel, reduction: Reduction) -> None:
    config = dataclasses.replace(CONFIG, kl_reduction=reduction)
    tokens = random_tokens(batch=2, length=16, seed=0)
    whole, parts = (training(model, topk_sae(), config, adapters=LoRAConfig(rank=2)) for _ in range(2))
    expected = gradients(model, whole, tokens=tokens)
    result = gradients(model, parts, tokens=tokens, micro_batch=1)
    assert parts.tokens == whole.tokens == tokens.numel()
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(result[name], gradient)


def test_dropout_differs_between_micro_batches() -> None:
    """The parts of a step have different dropout masks; a repeated step has the same masks again."""
    model, config = small_model("llama"), dataclasses.replace(CONFIG, grad_clip=None)
    tokens = random_tokens(batch=1, length=16, seed=0)
    run = training(model, topk_sae(), config, adapters=LoRAConfig(rank=2, dropout=0.5))
    fill(run.student.weights)
    trunk = Trunk(model, tokens, run.student.cuts)
    (first,), (second,) = run.hidden(trunk), run.hidden(trunk)
    assert not torch.equal(first, second)
    run.reset()
    assert torch.equal(run.hidden(trunk)[0], first)
    assert torch.equal(run.hidden(trunk)[0], second)
