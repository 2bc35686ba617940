"""Runs in a stack: they train as they do alone, up to rounding."""

import dataclasses
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from sae_lora.config.schema import LoRAConfig
from sae_lora.models import lora
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice import stack
from sae_lora.splice.stack import Stack
from sae_lora.splice.stacked_lora import StackedLoRA, padded_rank
from sae_lora.splice.trunk import Trunk
from sae_lora.train.optim import GradientState
from sae_lora.train.passes import Together
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import random_tokens, small_model
from tests.support.trainings import CONFIG, batches, fill, pack, same, training

STEPS = 4
Weights = dict[str, Tensor]


def trainings(
    model: LanguageModel, ranks: Sequence[int] = (17, 2, 4), *, one_sae: bool = False, **adapters: Any
) -> list[GradientState]:
    """Runs around two SAEs, with several ranks, seeds, and shares of dropout; the first has none."""
    saes = topk_sae(), jumprelu_sae()
    runs = []
    for number, rank in enumerate(ranks):
        config = dataclasses.replace(CONFIG, seed=number)
        lora_config = LoRAConfig(rank=rank, dropout=0.1 * number, **adapters)
        run = training(model, saes[0 if one_sae else number % 2], config, STEPS, lora_config)
        assert isinstance(run, GradientState)
        runs.append(run)
    return runs


def weights(runs: Sequence[GradientState]) -> list[Weights]:
    return [
        {name: weight.detach().clone() for name, weight in run.student.weights.items()} for run in runs
    ]


def trained(model: LanguageModel, runs: Sequence[GradientState], **how: Any) -> list[Weights]:
    """The weights after all steps."""
    together = pack(model, *runs, **how)
    for tokens in batches(STEPS):
        together._take_step(together.active, tokens)
    return weights(runs)


def assert_close(ours: Sequence[Weights], theirs: Sequence[Weights]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for name, weight in other.items():
            torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=2e-5)


def passes() -> Any:
    """A patch that counts the passes of stacks."""
    return patch.object(Stack, "hidden", autospec=True, side_effect=Stack.hidden)


@pytest.mark.parametrize("adapters", [{}, {"blocks": "all", "one_sae": True}, {"blocks": [2, 3]}])
def test_it_trains_as_each_run_alone(model: LanguageModel, adapters: dict[str, Any]) -> None:
    """With dropout: on a CPU the masks are the same. SAEs before the adapters may differ."""
    before = weights(trainings(model, **adapters))
    alone = trained(model, trainings(model, **adapters))
    with passes() as stacked:
        together = trained(model, trainings(model, **adapters), stacked=True)
    assert stacked.call_count == STEPS + 1  # the first is the proof
    assert_close(together, alone)
    assert not any(same(first, last) for first, last in zip(before, together, strict=True))


def test_parts_of_a_batch_add_up() -> None:
    model = small_model("gemma2")
    alone = trained(model, trainings(model), micro_batch=1)
    assert_close(trained(model, trainings(model), micro_batch=1, stacked=True), alone)


def test_only_runs_of_one_kind_share_a_stack() -> None:
    """Another first block, another SAE behind it, other matrices and DoRA are other kinds."""
    model = small_model("llama")
    sae = topk_sae()

    def run(block: int = 1, **adapters: Any) -> GradientState:
        made = training(model, sae, CONFIG, STEPS, LoRAConfig(rank=2, **adapters), block)
        assert isinstance(made, GradientState)
        return made

    runs = [run(), run(), run(2), run(2), run(targets=["mlp"]), run(dora=True), run(dora=True)]
    stacks = pack(model, *runs, stacked=True)._passes.of(runs)
    members = [stack.trainings for stack in stacks if isinstance(stack, Together)]
    assert members == [runs[:2], runs[2:4]]
    assert len(stacks) == 2 + 3


def test_weights_are_those_of_the_students() -> None:
    """Evaluations and checkpoints read the students, training moves the stack, also beyond a restart."""
    model = small_model("llama")
    runs = trainings(model)
    trained(model, runs, stacked=True)
    stacked = Stack(model, [run.student for run in runs])
    for student in stacked.students:
        fill(student.weights)
        lora.set_adapter_dropout(student.model, False)
    trunk = Trunk(model, random_tokens(batch=2, length=16, seed=3), stacked.students[0].cuts)
    with torch.no_grad():
        for states, student in zip(stacked.hidden(trunk), stacked.students, strict=True):
            torch.testing.assert_close(states, student.hidden(trunk), rtol=1e-4, atol=1e-5)


def test_a_run_that_leaves_does_not_change_the_others() -> None:
    model = small_model("gemma2")
    alone = trained(model, trainings(model))
    runs = trainings(model)
    together = pack(model, *runs, stacked=True)
    for step, tokens in enumerate(batches(STEPS)):
        if step == 2:
            together._trainings.leave(runs[1])
        together._take_step(together.active, tokens)
    assert_close(weights([runs[0], runs[2]]), [alone[0], alone[2]])
    assert runs[1].step == 2


def test_a_loss_that_is_not_finite_is_that_of_its_run() -> None:
    model = small_model("llama")
    runs = trainings(model)
    with torch.no_grad():
        next(iter(runs[1].student.weights.values())).fill_(torch.nan)
    trained(model, runs, stacked=True)
    assert [bool(torch.tensor(run.loss).isfinite()) for run in runs] == [True, False, True]


def test_a_stopped_stack_goes_on_to_the_last_bit() -> None:
    model = small_model("llama")
    whole = trained(model, trainings(model), stacked=True)
    first = pack(model, *(runs := trainings(model)), stacked=True)
    for tokens in batches(STEPS)[:2]:
        first._take_step(first.active, tokens)
    saved = [run.state() for run in runs]
    runs = trainings(model)
    for run, state in zip(runs, saved, strict=True):
        run.restore(state)
    second = pack(model, *runs, stacked=True)
    for tokens in batches(STEPS)[2:]:
        second._take_step(second.active, tokens)
    assert all(same(ours, theirs) for ours, theirs in zip(weights(runs), whole, strict=True))


def test_runs_that_were_stacked_go_on_alone() -> None:
    """Their state is complete without the stack."""
    model = small_model("llama")
    alone = trained(model, trainings(model))
    runs = trainings(model)
    for stacked, tokens in enumerate(batches(STEPS)):
        trainer = pack(model, *runs, stacked=stacked % 2 == 0)
        trainer._take_step(trainer.active, tokens)
    assert_close(weights(runs), alone)


def wrong_gradients(self: Stack, hidden: Tensor, gradients: Tensor) -> None:
    usual_backward(self, hidden, gradients * 1.1)


def failing(*_: object) -> None:
    raise RuntimeError("no kernel for this device")


usual_backward = Stack.backward


@pytest.mark.parametrize("backward", [wrong_gradients, failing])
def test_a_stack_that_proves_nothing_gives_way(
    backward: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model("llama")
    alone = trained(model, trainings(model))
    monkeypatch.setattr(Stack, "backward", backward)
    together = trained(model, trainings(model), stacked=True)
    assert all(same(ours, theirs) for ours, theirs in zip(together, alone, strict=True))
    told = capsys.readouterr().err
    assert told.count("each run alone serves in place of runs in a stack") == 1


def test_a_pass_that_fails_later_is_computed_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model("llama")
    alone = trained(model, trainings(model))
    calls = 0

    def failing_late(self: Stack, *arguments: Any, **named: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:  # after the proof and two steps
            raise RuntimeError("no kernel for this device")
        return usual_hidden(self, *arguments, **named)

    usual_hidden = Stack.hidden
    monkeypatch.setattr(Stack, "hidden", failing_late)
    assert_close(trained(model, trainings(model), stacked=True), alone)
    assert calls == 4
    assert capsys.readouterr().err.count("each run alone serves in place of runs in a stack") == 1


def test_the_proof_leaves_no_trace() -> None:
    """Nor does it move the random numbers."""
    model = small_model("gemma2")
    runs = trainings(model)
    before, randomness = weights(runs), [run.generator().get_state() for run in runs]
    students = [run.student for run in runs]
    made = Stack(model, students)
    assert 0 < made.difference(random_tokens(batch=1, length=16, seed=0)) < 1e-4
    assert all(same(ours, theirs) for ours, theirs in zip(weights(runs), before, strict=True))
    assert all(
        run.generator().get_state().equal(state) for run, state in zip(runs, randomness, strict=True)
    )
    assert all(weight.grad is None for run in runs for weight in run.student.weights.values())
    assert stack.kind_of(students[0]) == stack.kind_of(students[2])


def test_ranks_are_padded() -> None:
    """16, 64, 256, … Beyond a run's rank its adapter is zero, and stays so."""
    ranks = (1, 16, 17, 64, 65, 256, 257)
    assert [padded_rank(rank) for rank in ranks] == [16, 16, 64, 64, 256, 256, 1024]
    model = small_model("llama")
    together = pack(model, *trainings(model, ranks=(3, 5)), stacked=True)
    for tokens in batches(2):
        together._take_step(together.active, tokens)
    (made,) = together._passes._together
    view = made.stack._stacked.view.model
    layers = [module for module in view.modules() if isinstance(module, StackedLoRA)]
    assert layers
    for layer in layers:
        a, b = layer.stacks
        assert a.shape[1] == b.shape[2] == 16
        assert a.grad is None and b.grad is None  # the runs have them
        for run, rank in enumerate((3, 5)):
            assert a[run, :rank].any() and b[run, :, :rank].any()
            assert not a[run, rank:].any() and not b[run, :, rank:].any()


def test_adapters_in_bfloat16() -> None:
    """They round what they add to a bfloat16 model, as its outputs are rounded, but no weights."""
    model = small_model("llama")
    model.model.to(torch.bfloat16)
    students = [run.student for run in trainings(model)]
    tokens = random_tokens(batch=1, length=16, seed=0)
    differences = [
        Stack(model, students, products).difference(tokens)
        for products in (torch.float32, torch.bfloat16)
    ]
    assert 0 < differences[0] < differences[1] < 2 * torch.finfo(torch.bfloat16).eps
    runs = trainings(model)
    together = pack(model, *runs, stacked=True, products=torch.bfloat16)
    together._take_step(together.active, batches(1)[0])
    (made,) = together._passes._together
    layers = [part for part in made.stack._stacked.view.model.modules() if isinstance(part, StackedLoRA)]
    for layer in layers:
        for rounded, weight in zip(layer.rounded, layer.stacks, strict=True):
            assert rounded.dtype is torch.bfloat16 and weight.dtype is torch.float32
    assert all(weight.dtype is torch.float32 for run in runs for weight in run.student.weights.values())
