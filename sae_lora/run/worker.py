"""A process that follows a leader and writes no files: `python -m sae_lora.run.worker <folder> …`."""

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
from sae_lora.models.loading import silence_transformers
from sae_lora.records.folder import RunFolder
from sae_lora.run.active_run import ActiveRun
from sae_lora.run.build import Builder
from sae_lora.train.distributed import Distributed, GoneError, following
from sae_lora.train.train_state import TrainState


class Beginning(NamedTuple):
    """The leader's first message.

    Args:
        trainings: Steps taken and trained weights, by the number of a run's folder. The same seed may
            give weights with other last bits on another machine.
        special_ids: Ids `[n]` whose positions some SAEs leave as they are.
        validation_tokens: Held-out tokens `[sequence, pos]`.
    """

    trainings: dict[int, tuple[int, dict[str, Tensor]]]
    special_ids: Tensor
    validation_tokens: Tensor

    @classmethod
    def of(
        cls, trainings: Mapping[int, TrainState], special_ids: Tensor, validation_tokens: Tensor
    ) -> "Beginning":
        """The message about trainings, by the number of their folder."""
        states = {}
        for number, training in trainings.items():
            weights = training.student.weights
            states[number] = training.step, {name: weights[name].detach().cpu() for name in weights}
        return cls(states, special_ids, validation_tokens)


def follow(processes: Distributed, runs: Sequence[ActiveRun]) -> None:
    """Build the same pack as the leader, and follow its tasks."""
    builder = Builder(runs[0].config)
    for run in runs:
        builder.saes.of(run.config.sae)
    model = builder.model
    beginning: Beginning | None = processes.receive()
    if beginning is None:
        return
    trainings = []
    for number, (step, weights) in beginning.trainings.items():
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
    """Follow the leader that has started this process, until it says that all is done."""
    for number in SIGNALS:  # the leader handles them, and needs this process to finish a step
        signal.signal(number, signal.SIG_IGN)
    silence_transformers()
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
        os._exit(1)  # a normal exit could wait for GPU work begun with the others
    return 0


if __name__ == "__main__":
    sys.exit(main())
