"""Estimated costs of runs equal the measured costs of their steps."""

import gc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sae_lora.common.isolation import Isolation
from sae_lora.config.enums import Architecture
from sae_lora.config.identity import step_tokens, train_steps
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import load_model, load_shapes
from sae_lora.run.build import Builder
from sae_lora.saes import loading
from sae_lora.train import methods
from sae_lora.train.cost.estimate import estimate
from sae_lora.train.cost.flops import evaluation_flops
from sae_lora.train.cost.memory import PROCESS_BYTES, PeakMemory
from sae_lora.train.cost.runs import CountedRun, Sizes
from sae_lora.train.distill import DistillTrainer
from sae_lora.train.distributed import ProcessGroup
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.optim import GradientState, SAEGradientState
from sae_lora.train.train_state import TrainState
from tests.support.families import small_model
from tests.support.packs import CPU, pack_of, resolved, take_step

pytestmark = pytest.mark.slow  # many seconds in all

CASES = [
    ("",),
    ("train.kl=full train.kl_chunk_tokens=128",),
    ("lora.blocks=[7]",),
    ("lora.targets=mlp lora.blocks=[5,7] lora.dropout=0.1",),
    ("lora.rank=256",),
    ("sae.width=4k sae.l0=8 lora.blocks=all",),
    ("sae.width=4k sae.l0=8 lora.blocks=all sae.sparse=true",),
    ("sae=disk sae.path={home}/of_an_mlp",),
    ("train.dtype=bfloat16",),
    ("train.micro_batch_size=2",),
    ("train.activation_checkpointing=true",),
    ("method=mezo",),
    ("method=mlp_adapter method.rank=16",),
    ("method=sae_finetune",),
    ("method=lora_sae", "method=lora_sae lora.blocks=all"),
    ("layer.index=[2,5] method=e2e sae=tiny",),
    ("layer.index=[2,5]", "layer.index=2", "layer.index=5 lora.dropout=0.1"),
    (*(f"sae=disk sae.path={{home}}/of_an_mlp lora.rank={rank}" for rank in (1, 2)), ""),
    # More than eight runs: two groups.
    tuple(f"lora.rank={rank} lora.blocks=[7]" for rank in range(1, 11)),
]
"""Runs that train together, by the values that differ from the defaults."""


def use_attention(models: Iterable[LanguageModel], name: str) -> None:
    for model in models:
        model.model.set_attn_implementation(name)


def models_of(pack: DistillTrainer) -> list[LanguageModel]:
    return [pack._model, *(training.student.model for training in pack.active)]


@pytest.mark.parametrize("architecture", [architecture.name for architecture in Architecture])
@pytest.mark.parametrize("method", ["sae", "e2e"])
def test_estimated_flops_of_new_saes_are_those_of_a_step(
    method: str, architecture: str, tmp_path: Path
) -> None:
    """They include sae-lens's losses, and the pass that fills the activation buffer."""
    l0 = () if architecture in ("standard", "gated", "transcoder") else ("sae.l0=8",)
    overrides = f"method={method}", "sae=new", f"sae.architecture={architecture}", "sae.width=1024", *l0
    (config,) = resolved(
        tmp_path, (" ".join((*overrides, "method.buffer_tokens=1", "sae.keep_special_tokens=false")),)
    )
    model = load_model(config.model, config.train.dtype, CPU)
    tokens = torch.randint(3, 2000, (config.train.batch_size, config.data.context_length))
    saes = methods.new_saes(config, model, tokens, ())
    steps = train_steps(config)
    training, _ = methods.build(config, model, loading.splices(config.sae, saes, ()), steps)
    builder = Builder(config)
    builder.model = model
    pack = builder.trainer(Isolation([training]), tokens, ProcessGroup())
    use_attention([model, training.student.model], "eager")
    with FlopCounterMode(display=False) as counter:
        pack._step(0, iter([tokens]), [training])
    assert estimate([config]).flops / steps == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_runs_of_a_divided_model_are_no_stack(tmp_path: Path) -> None:
    """They compute alone, and keep more for their backward pass."""

    def peak(stack: str, divided: bool) -> float:
        runs = (f"train.stack={stack} train.seed=1", f"train.stack={stack} train.seed=2")
        return estimate(resolved(tmp_path, runs), divided).peak_bytes

    assert peak("on", divided=True) == peak("off", divided=True)
    assert peak("on", divided=False) != peak("off", divided=False)


def test_the_activation_buffer_takes_memory(tmp_path: Path) -> None:
    """It counts once for SAEs with the same hookpoints."""
    defaults = "train.train_tokens=131072 method=sae sae.width=64 sae.l0=8"
    larger = f"{defaults} method.buffer_tokens=90000"  # a fill holds whole steps
    small, large, both = (
        estimate(resolved(tmp_path, overrides)).peak_bytes
        for overrides in (
            (f"{defaults} method.buffer_tokens=1024",),
            (larger,),
            (larger, f"{larger} train.seed=1"),
        )
    )
    (config,) = resolved(tmp_path, (larger,))
    step = step_tokens(config)
    assert large - small == (90_000 // step - 1) * step * 128 * 4
    assert both - large < large - small


def held_between_steps(training: TrainState) -> Iterator[Tensor]:
    student = training.student
    coders: list[Any] = [splice.sae for splice in (*student.splices, *student.before)]
    for module in (student.model.model, *coders):
        yield from module.parameters()
    yield from student.buffers.values()
    if isinstance(training, SAEGradientState):
        yield from training._sae_gradients
    if isinstance(training, GradientState):
        for state in training._optimizer.state.values():
            yield from state.values()


@pytest.mark.parametrize("overrides", CASES)
def test_a_step_costs_the_estimate(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of tensors, without holes in the heap; trained weights and FLOPs."""
    monkeypatch.setattr("sae_lora.train.cost.estimate.HEAP", 1)
    configs = resolved(tmp_path, tuple(f"train.eval_batch_tokens=128 {of_run}" for of_run in overrides))
    estimated = estimate(configs)
    trainer = pack_of(configs)
    take_step(trainer, configs[0])
    # The frozen copies of SAEs in training, made for an evaluation, still exist in the next step.
    trainer._evaluate([run.student for run in trainer.active])
    comparison = trainer._evaluate._comparison
    tensors = [
        *(comparison._chunk_buffers + comparison._part_buffers),
        *(tensor for run in trainer.active for tensor in held_between_steps(run)),
    ]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    gc.collect()
    with PeakMemory() as memory:
        take_step(trainer, configs[0])
    tensors_bytes = memory.peak + sum(storages.values())
    assert estimated.peak_bytes - PROCESS_BYTES == pytest.approx(tensors_bytes, rel=0.15)

    use_attention(models_of(trainer), "eager")  # the counter knows no other on a CPU
    with FlopCounterMode(display=False) as counter:
        take_step(trainer, configs[0])
    assert estimated.flops / train_steps(configs[0]) == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )
    assert estimated.adapter_weights == sum(
        weight.numel() for run in trainer.active for weight in run.student.weights.values()
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("",),
        ("lora.rank=1", "lora.rank=2 lora.blocks=[7]"),
        ("method=sae_finetune",),
        ("layer.index=[2,5] method=linear_adapter",),
    ],
)
def test_an_evaluation_costs_the_estimate(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """The first one, which keeps what later ones need, and the second one."""
    configs = resolved(tmp_path, overrides)
    pack = pack_of(configs)
    held_out = torch.randint(3, 2000, (4, configs[0].data.context_length))
    evaluate = Evaluator(pack._model, held_out, 4, pack._evaluate._comparison, cache_bytes=1e9)
    use_attention(models_of(pack), "eager")
    runs = [CountedRun(pack._model, config) for config in configs]
    counted = evaluation_flops(Sizes(pack._model), runs, held_out.shape[1])
    for flops in counted:
        with FlopCounterMode(display=False) as counter:
            evaluate([training.student for training in pack.active])
        assert held_out.numel() * flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_every_family_has_shapes(family: str, tmp_path: Path) -> None:
    small = small_model(family)
    small.model.config.save_pretrained(tmp_path / family)
    (config,) = resolved(tmp_path, ("",))
    config.model.name = str(tmp_path / family)
    config.sae.used[0].block = 0
    config.lora.targets = "mlp"
    shapes = load_shapes(config.model)
    counted = sum(weight.numel() for weight in small.model.parameters())
    assert sum(weight.numel() for weight in shapes.model.parameters()) == counted
    assert estimate([config]).flops > 0
