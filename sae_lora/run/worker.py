"""A process that does its share of what another leads: `python -m sae_lora.run.worker <run> …`.

It reads the run folders and writes nothing.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lora.common.console import complain
from sae_lora.common.isolation import Isolation
from sae_lora.common.signals import SIGNALS
from sae_lora.config.enums import Device
from sae_lora.models.loading import quieten
from sae_lora.records.folder import RunFolder
from sae_lora.run.active_run import ActiveRun
from sae_lora.run.build import Builder
from sae_lora.train.distributed import Distributed, GoneError, following
from sae_lora.train.train_state import TrainState


class Beginning(NamedTuple):
    """What the leader sends first.

    Args:
        steps: The trainings: of which folder each is, by number, and how many steps it has taken.
        weights: The adapters of each, by name. What a seed and a matrix make of them may differ in
            the last bits from machine to machine.
        special_ids: Ids `[n]` whose positions some SAEs leave as they are.
        validation_tokens: Held-out tokens `[sequence, pos]`.
    """

    steps: dict[int, int]
    weights: list[dict[str, Tensor]]
    special_ids: Tensor
    validation_tokens: Tensor

    @classmethod
    def of(
        cls, trainings: Mapping[int, TrainState], special_ids: Tensor, validation_tokens: Tensor
    ) -> "Beginning":
        """That of trainings, by the number of their folder."""
        steps = {number: training.step for number, training in trainings.items()}
        weights = [
            {name: weight.detach().cpu() for name, weight in training.student.weights.items()}
            for training in trainings.values()
        ]
        return cls(steps, weights, special_ids, validation_tokens)


def follow(processes: Distributed, runs: Sequence[ActiveRun]) -> None:
    """Builds the same pack as the leader, and does with it what it is told to."""
    builder = Builder(runs[0].config)
    for run in runs:
        builder.load_saes(run.config.sae)
    model = builder.model
    beginning: Beginning | None = processes.receive()
    if beginning is None:
        return
    trainings = []
    for (number, step), weights in zip(beginning.steps.items(), beginning.weights, strict=True):
        run = runs[number]
        builder.build(run)
        if run.training.step != step:
            raise RuntimeError(f"{run.name}: step {run.training.step} here, {step} at the leader")
        for name, weight in run.training.student.weights.items():
            weight.data.copy_(weights[name])
        trainings.append(run.training)
    special_ids = beginning.special_ids.to(model.device)
    trainer = builder.trainer(Isolation(trainings), special_ids, beginning.validation_tokens, processes)
    while (task := processes.receive()) is not None:
        trainer.follow(task)


def main() -> int:
    """One of several processes; the leader has started it, and says when it ends."""
    for number in SIGNALS:  # the leader handles them, and needs this process to end a step
        signal.signal(number, signal.SIG_IGN)
    quieten()
    runs = [ActiveRun(RunFolder(Path(path))) for path in sys.argv[1:]]
    for run in runs:
        run.read()
    on_gpu = runs[0].config.train.device is not Device.cpu and torch.cuda.is_available()
    try:
        with following(on_gpu) as processes:
            if processes is not None:
                follow(processes, runs)
    except GoneError as error:
        complain("ended", str(error))
        sys.stderr.flush()
        os._exit(1)  # the way out could wait for what a GPU has begun with the others
    return 0


if __name__ == "__main__":
    sys.exit(main())
