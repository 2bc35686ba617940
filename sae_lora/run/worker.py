"""A process that shares the batches of a pack: it follows the leader and writes no files."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sae_lora.common.errors import EXIT_NOT_TOGETHER, is_gone
from sae_lora.common.isolation import Isolation
from sae_lora.common.signals import SIGNALS
from sae_lora.config.enums import Device
from sae_lora.models.loading import silence_transformers
from sae_lora.records.folder import RunFolder
from sae_lora.run.active_run import ActiveRun
from sae_lora.run.build import Builder
from sae_lora.train.distributed import Distributed, Member


def follow(this: Member, folders: Sequence[RunFolder]) -> int:
    """Follow the leader until all tasks are done; return the exit code.

    Args:
        this: This process.
        folders: The run folders of the pack, of which the leader chooses some.
    """
    for number in SIGNALS:  # the leader handles them, and needs this process to finish a step
        signal.signal(number, signal.SIG_IGN)
    silence_transformers()
    try:
        first = ActiveRun(folders[0])
        first.read()
        on_gpu = first.config.train.device is not Device.cpu and torch.cuda.is_available()
        with this.following(on_gpu) as processes:
            if processes is not None:
                _do_tasks(processes, this)
    except Exception as error:
        if not is_gone(error):
            raise
        # The process that is gone, or the agent, has said why.
        sys.stderr.flush()
        os._exit(EXIT_NOT_TOGETHER)  # a normal exit could wait for GPU work that other processes share
    return 0


def _do_tasks(processes: Distributed, this: Member) -> None:
    """Build the same pack as the leader, and do the leader's tasks until it ends."""
    start = processes.receive()
    if start is None:
        return
    paths, special_ids, validation_tokens = start
    runs = {path: ActiveRun(RunFolder(Path(path))) for path in paths}
    for run in runs.values():
        run.read()
    builder = Builder(next(iter(runs.values())).config, this)
    for run in runs.values():
        builder.saes.of(run.config.sae)
    _ = builder.model  # loaded while the leader loads its model; perhaps each has a part
    errors: dict[str, Exception] = {}
    for path, run in runs.items():
        try:
            run.build(builder.model, builder.saes.of(run.config.sae), special_ids)
        except Exception as error:  # the leader has the same, and goes on without this run
            errors[path] = error
    states = processes.receive()
    if states is None:
        return
    trainings = []
    for path, (step, weights) in states.items():
        if path in errors:
            raise errors[path]
        run = runs[path]
        if run.training.step != step:
            raise RuntimeError(
                f"{run.name}: this worker is at step {run.training.step}, the leader at {step}"
            )
        for name, weight in run.training.student.weights.items():
            weight.data.copy_(weights[name])
        trainings.append(run.training)
    if builder.model.shards:  # the leader looks for dominant positions, with one pass
        builder.model.hidden(torch.zeros(1, 2, dtype=torch.long, device=builder.device))
    trainer = builder.trainer(Isolation(trainings), validation_tokens, processes)
    while (task := processes.receive()) is not None:
        trainer.follow(task)
