"""What a run is said to cost is what a step of it costs."""

import gc
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sae_lora import distill, lora, models
from sae_lora.config import Config, train_steps
from sae_lora.dimensions import read_dimensions
from sae_lora.estimate import estimate
from sae_lora.metrics import Evaluator
from sae_lora.plan import plan
from sae_lora.saes import loading
from tests.families import FAMILIES, small_model
from tests.memory import PeakMemory
from tests.points import points_in

CPU = torch.device("cpu")
CASES = [
    "",
    "train.batch_size=16",
    "train.kl_chunk_tokens=128",
    "lora.blocks=all",
    "lora.blocks=[7]",
    "lora.targets=mlp lora.blocks=[5,7]",
    "lora.dropout=0.1",
    "lora.rank=256",
    "sae.width=4k sae.l0=8",
    "layer.index=[2,5]",
    "train.dtype=bfloat16",
]


def resolved(home: Path, overrides: str) -> Config:
    defaults = ["train.train_tokens=8192", "train.batch_size=8", "lora.rank=16"]
    (run,) = plan([points_in(home)(*defaults, *overrides.split())]).runs
    return run.config


def training(config: Config) -> distill.Training:
    loaded = [
        loading.load(config.sae, choice, read_dimensions(config.model), CPU)
        for choice in config.sae.used
    ]
    model = models.load_model(config.model, config.train.dtype, CPU)
    model.model.set_attn_implementation("eager")  # the counter knows no other on a CPU
    lora.attach(model, config.lora, min(choice.block for choice in config.sae.used))
    saes = {one.hookpoint: one.sae for one in loaded}
    nothing = torch.zeros(1, 2, dtype=torch.long)
    evaluate = Evaluator(model, saes, nothing, None, 1, config.train.kl_chunk_tokens)
    return distill.Training(model, saes, evaluate, config.train, train_steps(config))


@pytest.mark.parametrize("overrides", CASES)
def test_flops_and_weights_are_those_of_a_step(overrides: str, tmp_path: Path) -> None:
    config = resolved(tmp_path, overrides)
    counted = training(config)
    tokens = torch.randint(3, 2000, (config.train.batch_size, config.data.context_length))
    with FlopCounterMode(display=False) as counter:
        counted._take_step(tokens)
    said = estimate(config)
    assert said.flops / train_steps(config) == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert said.adapter_weights == sum(
        weight.numel() for weight in lora.trainable_weights(counted._model).values()
    )


@pytest.mark.parametrize("overrides", CASES)
def test_memory_is_what_a_step_needs(overrides: str, tmp_path: Path) -> None:
    config = resolved(tmp_path, f"train.eval_batch_tokens=128 {overrides}")
    measured = training(config)
    measured._model.model.set_attn_implementation("sdpa")
    tokens = torch.randint(3, 2000, (config.train.batch_size, config.data.context_length))
    measured._take_step(tokens)
    held = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in [
            *measured._model.model.parameters(),
            *(weight for sae in measured._saes.values() for weight in sae.parameters()),  # pyright: ignore
            *(value for state in measured._optimizer.state.values() for value in state.values()),
        ]
    }
    gc.collect()
    with PeakMemory() as memory:
        measured._take_step(tokens)
    assert estimate(config).peak_bytes == pytest.approx(memory.peak + sum(held.values()), rel=0.2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_shapes(family: str, tmp_path: Path) -> None:
    small = small_model(family)
    small.model.config.save_pretrained(tmp_path / family)
    config = resolved(tmp_path, "")
    config.model.name = str(tmp_path / family)
    config.sae.used[0].block = 0
    config.lora.targets = "mlp"
    shapes = models.load_shapes(config.model)
    counted = sum(weight.numel() for weight in small.model.parameters())
    assert sum(weight.numel() for weight in shapes.model.parameters()) == counted
    assert estimate(config).flops > 0
