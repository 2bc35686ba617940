"""Runs that train together, built from their points as in a process."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sae_lora.common.isolation import Isolation
from sae_lora.config.identity import train_steps
from sae_lora.config.schema import Config
from sae_lora.launcher.plan import plan
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.loading import load_model
from sae_lora.saes import loading
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Splice
from sae_lora.splice.kl import Comparison, kl_of
from sae_lora.train import methods
from sae_lora.train.distill import DistillTrainer
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.passes import Passing
from tests.support.coders import write_topk_sae
from tests.support.points import points_in

CPU = torch.device("cpu")


def resolved(home: Path, overrides: tuple[str, ...]) -> list[Config]:
    defaults = ["train.train_tokens=8192", "train.batch_size=8", "lora.rank=16"]
    points = points_in(home)
    write_topk_sae(home / "of_an_mlp", "blocks.3.hook_mlp_out", width=4096)
    parsed = [of_run.format(home=home).split() for of_run in overrides]
    return [run.config for run in plan([points(*defaults, *of_run) for of_run in parsed]).runs]


def pack_of(configs: Sequence[Config], device: torch.device = CPU) -> DistillTrainer:
    """The trainer of the runs as a process builds it, but without held-out text."""
    common = configs[0]
    model = load_model(common.model, common.train.dtype, device)
    dimensions = read_dimensions(common.model)
    saes = {
        repr(choice): loading.load(config.sae, choice, dimensions, device).sae
        for config in configs
        for choice in config.sae.used
    }
    trainings = []
    for config in configs:
        splices = [Splice(choice.block, saes[repr(choice)], choice.hook) for choice in config.sae.used]
        trainings.append(methods.build(config, model, tuple(splices), train_steps(config))[0])
    nothing = torch.zeros(1, 2, dtype=torch.long)
    comparison = Comparison(Head.of(model), common.train.kl_chunk_tokens)
    evaluate = Evaluator(model, nothing, 1, comparison)
    kl = kl_of(comparison, common.train.kl)
    train = common.train
    return DistillTrainer(
        model,
        Isolation(trainings),
        evaluate,
        kl,
        train.micro_batch_size,
        passing=Passing.of(train, device),
    )


def take_step(pack: DistillTrainer, config: Config) -> None:
    tokens = torch.randint(3, 2000, (config.train.batch_size, config.data.context_length))
    pack._take_step(pack.active, pack._on_device(tokens))
