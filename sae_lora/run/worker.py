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
from sae_lora.common.signals import SIGNALS
from sae_lora.config.enums import Device
from sae_lora.config.identity import train_steps
from sae_lora.models import loading
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.loading import device_of, quieten
from sae_lora.records.folder import RunFolder
from sae_lora.run.active_run import Claim, Member
from sae_lora.run.build import assemble
from sae_lora.saes.loading import SAEs
from sae_lora.train.distributed import GoneError, Several, following
from sae_lora.train.train_state import Training


class Beginning(NamedTuple):
    """What the leader tells first.

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
        cls, trainings: Mapping[int, Training], special_ids: Tensor, validation_tokens: Tensor
    ) -> "Beginning":
        """That of trainings, by the number of their folder."""
        steps = {number: training.step for number, training in trainings.items()}
        weights = [training.student.weights.items() for training in trainings.values()]
        on_cpu = [{name: weight.detach().cpu() for name, weight in own} for own in weights]
        return cls(steps, on_cpu, special_ids, validation_tokens)


def follow(workers: Several, members: Sequence[Member]) -> None:
    """Builds the same pack as the leader, and does with it what it is told to."""
    config = members[0].config
    device = device_of(config)
    saes = SAEs(read_dimensions(config.model), device)
    model = loading.load_model(config.model, config.train.dtype, device)
    beginning: Beginning | None = workers.hear()
    if beginning is None:
        return
    trainings = []
    for (number, step), weights in zip(beginning.steps.items(), beginning.weights, strict=True):
        member = members[number]
        member.build(model, saes.of(member.config.sae), train_steps(config))
        if member.training.step != step:
            raise RuntimeError(f"{member.name}: step {member.training.step} here, {step} at the leader")
        for name, weight in member.training.student.weights.items():
            weight.data.copy_(weights[name])
        trainings.append(member.training)
    special_ids = beginning.special_ids.to(device)
    pack = assemble(config, model, trainings, special_ids, beginning.validation_tokens, workers)
    while (task := workers.hear()) is not None:
        pack.follow(task)


def main() -> int:
    """One of several processes; the leader has started it, and says when it ends."""
    for number in SIGNALS:  # the leader heeds them, and needs this process to end a step
        signal.signal(number, signal.SIG_IGN)
    quieten()
    members = [Member(Claim(RunFolder(Path(path)))) for path in sys.argv[1:]]
    for member in members:
        member.read()
    on_gpu = members[0].config.train.device is not Device.cpu and torch.cuda.is_available()
    try:
        with following(on_gpu) as workers:
            if workers is not None:
                follow(workers, members)
    except GoneError as error:
        complain("ended", str(error))
        sys.stderr.flush()
        os._exit(1)  # the way out could wait for what a GPU has begun with the others
    return 0


if __name__ == "__main__":
    sys.exit(main())
