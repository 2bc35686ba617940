"""Compiled blocks: they give what blocks as they are give, up to rounding, and are compiled once.

Most tests let torch trace blocks without generating code, which takes seconds instead of minutes.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

from sae_lora.config.enums import Hook
from sae_lora.config.schema import LoRAConfig
from sae_lora.models.attention import fused
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice import compiled
from sae_lora.splice.compiled import CompiledBlocks
from sae_lora.splice.hooks import Splice, spliced
from sae_lora.train.distill import COMPILING, DistillTrainer
from sae_lora.train.optim import GradientState
from sae_lora.train.trainer import TRAINING
from tests.support.coders import topk_sae
from tests.support.families import random_tokens, small_model
from tests.support.trainings import CONFIG, batches, evaluator, pack, same, training

STEPS = 3
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks are traced, and run without generated code."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def runs(model: LanguageModel, **adapters: Any) -> list[GradientState]:
    """Two runs around one SAE, with dropout."""
    sae, made = topk_sae(), []
    for seed, rank in enumerate((2, 17)):
        config = dataclasses.replace(CONFIG, seed=seed)
        run = training(model, sae, config, STEPS, LoRAConfig(rank=rank, dropout=0.1, **adapters))
        assert isinstance(run, GradientState)
        made.append(run)
    return made


def trained(
    model: LanguageModel,
    after_step: Callable[[DistillTrainer], object] = lambda pack: None,
    targets: Sequence[str] = ("all",),
    **how: bool,
) -> list[Weights]:
    """The weights of two runs after all steps."""
    made = runs(model, targets=list(targets))
    together = pack(model, *made, **how)
    for tokens in batches(STEPS):
        together._take_step(together.active, tokens)
        after_step(together)
    return [
        {name: weight.detach().clone() for name, weight in run.student.weights.items()} for run in made
    ]


def assert_close(ours: list[Weights], theirs: list[Weights], atol: float = 2e-5) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for name, weight in other.items():
            torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=atol)


def graphs() -> int:
    """The number of pieces of code that torch has compiled."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("stacked", [True, False])
def test_runs_train_as_without_and_nothing_is_compiled_after_the_first_step(stacked: bool) -> None:
    """A run that is alone is a stack of one, with the same masks of dropout."""
    model = small_model("gemma2")
    numbers: list[int] = []
    compiled_weights = trained(model, lambda _: numbers.append(graphs()), stacked=stacked, compiled=True)
    assert numbers[0] > 0 and numbers == numbers[:1] * STEPS
    assert_close(compiled_weights, trained(model))
    assert not counters["graph_break"]


def test_a_smaller_last_part_of_a_batch_keeps_the_gradients_of_the_first() -> None:
    """It has another shape, which is compiled and proven in the middle of a step."""
    model = small_model("llama")
    results = []
    for compiles in (True, False):
        made = runs(model)
        together = pack(model, *made, micro_batch=2, compiled=compiles)
        for seed in range(2):
            together._take_step(together.active, random_tokens(batch=3, length=16, seed=seed))
        results.append([dict(run.student.weights) for run in made])
    assert_close(*results)


@pytest.mark.slow
def test_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    model = small_model("llama")
    ours = trained(model, stacked=True, compiled=True, targets=["down"])  # little to generate
    assert graphs() > 0
    assert_close(ours, trained(model, targets=["down"]), atol=1e-4)


def wrong(self: Any, *arguments: Any, **keywords: Any) -> Any:
    output = self._plain(*arguments, **keywords)
    return 1.1 * output if isinstance(output, torch.Tensor) else (1.1 * output[0], *output[1:])


def failing(*_: object, **__: object) -> None:
    raise RuntimeError("no compiler for this device")


@pytest.mark.parametrize("call", [wrong, failing])
def test_compiled_blocks_that_prove_nothing_give_way(
    call: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model("llama")
    plain = trained(model, stacked=True)
    monkeypatch.setattr(compiled._Compiled, "__call__", call)
    ours = trained(model, stacked=True, compiled=True)
    assert all(same(mine, other) for mine, other in zip(ours, plain, strict=True))
    assert capsys.readouterr().err.count("the uncompiled model serves in place of compiled blocks") == 1


def test_a_block_that_fails_later_gives_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model("llama")
    plain = trained(model, stacked=True)

    def fail(together: DistillTrainer) -> None:
        monkeypatch.setattr(compiled._Compiled, "__call__", failing)

    assert_close(trained(model, fail, stacked=True, compiled=True), plain)
    assert capsys.readouterr().err.count("the uncompiled model serves in place of compiled blocks") == 1


def test_a_block_with_an_sae_inside_runs_as_it_is() -> None:
    model = small_model("llama")
    tokens = random_tokens(batch=1, length=8, seed=0)
    blocks = CompiledBlocks(model)
    with torch.no_grad(), spliced(model, [Splice(1, topk_sae(), Hook.mlp_out)]):
        plain = model.hidden(tokens)
        with blocks.in_use():
            torch.testing.assert_close(model.hidden(tokens), plain)
    assert graphs() == 1  # the three other blocks share their code
    assert not any("forward" in block.__dict__ for block in model.blocks)


def test_fused_attention_is_compiled_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has its definition, and no gradient of it."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    fused.register()
    model = small_model("gemma2")
    model.model.set_attn_implementation(fused.NAME)
    tokens = random_tokens(batch=1, length=fused._SHORT + 1, seed=0)
    blocks = CompiledBlocks(model)
    with torch.no_grad():
        plain = model.hidden(tokens)
        before = graphs()
        with blocks.in_use():
            torch.testing.assert_close(model.hidden(tokens), plain)
    assert graphs() - before == 2  # blocks with a window and without
    assert not counters["graph_break"]


def test_the_step_that_compiles_is_announced() -> None:
    model = small_model("llama")
    together = pack(model, *runs(model), compiled=True)
    stages: list[str] = []
    together._evaluate.report = lambda stage, done, total: stages.append(stage)
    for _ in together.points(batches(STEPS)):
        pass
    assert stages.count(COMPILING) == 1
    assert stages.index(TRAINING) < stages.index(COMPILING)


def test_evaluations_do_not_compile() -> None:
    model = small_model("llama")
    made = runs(model)
    together = pack(model, *made, stacked=True, compiled=True)
    together._evaluate([run.student for run in made])
    evaluator(model)([run.student for run in made])
    assert graphs() == 0
