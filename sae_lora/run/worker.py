"""A worker process, which follows the leader and writes no files.

Command: `python -m sae_lora.run.worker <folder> …`.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sae_lora.common.console import complain
from sae_lora.common.isolation import Isolation
from sae_lora.common.signals import SIGNALS
from sae_lora.config.enums import Device
from sae_lora.models.loading import silence_transformers
from sae_lora.records.folder import RunFolder
from sae_lora.run.active_run import ActiveRun
from sae_lora.run.build import Builder
from sae_lora.train.distributed import Distributed, GoneError, following


def follow(processes: Distributed, runs: Sequence[ActiveRun]) -> None:
    """Build the same pack as the leader, and do the leader's tasks until it ends."""
    builder = Builder(runs[0].config)
    for run in runs:
        builder.saes.of(run.config.sae)
    _ = builder.model  # loaded while the leader loads its model
    start = processes.receive()
    if start is None:
        return
    states, special_ids, validation_tokens = start
    trainings = []
    for number, (step, weights) in states.items():
        run = runs[number]
        run.build(builder.model, builder.saes.of(run.config.sae), special_ids)
        if run.training.step != step:
            raise RuntimeError(
                f"{run.name}: this worker is at step {run.training.step}, the leader at {step}"
            )
        for name, weight in run.training.student.weights.items():
            weight.data.copy_(weights[name])
        trainings.append(run.training)
    trainer = builder.trainer(Isolation(trainings), validation_tokens, processes)
    while (task := processes.receive()) is not None:
        trainer.follow(task)


def main() -> int:
    """Follow the leader that started this process, until all tasks are done."""
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
        os._exit(1)  # a normal exit could wait for GPU work that other processes share
    return 0


if __name__ == "__main__":
    sys.exit(main())
