"""A process that does its share of what another leads: `python -m sae_lora.follower <run> …`.

It reads the run folders and writes nothing.
"""

import signal
import sys
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sae_lora import models
from sae_lora.assembly import SAEs, assemble, device_of, quieten
from sae_lora.dimensions import read_dimensions
from sae_lora.identity import train_steps
from sae_lora.interruption import SIGNALS
from sae_lora.member import Claim, Member
from sae_lora.records import RunFolder
from sae_lora.workers import GoneError, Several, joined


class Beginning(NamedTuple):
    """What the leader tells first.

    Args:
        steps: The trainings: of which folder each is, by number, and how many steps it has taken.
        special_ids: Ids `[n]` whose positions some SAEs leave as they are.
        validation_tokens: Held-out tokens `[sequence, pos]`.
    """

    steps: dict[int, int]
    special_ids: Tensor
    validation_tokens: Tensor


def follow(workers: Several, folders: list[RunFolder]) -> None:
    """Builds the same pack as the leader, and does with it what it is told to."""
    quieten()
    members = [Member(Claim(folder)) for folder in folders]
    for member in members:
        member.read()
    config = members[0].config
    device = device_of(config)
    saes = SAEs(read_dimensions(config.model), device)
    model = models.load_model(config.model, config.train.dtype, device)
    beginning: Beginning | None = workers.hear()
    if beginning is None:
        return
    trainings = []
    for number, step in beginning.steps.items():
        member = members[number]
        member.build(model, saes.of(member.config.sae), train_steps(config))
        if member.training.step != step:
            raise RuntimeError(f"{member.name}: step {member.training.step} here, {step} at the leader")
        trainings.append(member.training)
    special_ids = beginning.special_ids.to(device)
    pack = assemble(config, model, trainings, special_ids, beginning.validation_tokens, workers)
    while (task := workers.hear()) is not None:
        pack.follow(task)


def main() -> int:
    """One of several processes; the leader has started it, and says when it ends."""
    for number in SIGNALS:  # the leader heeds them, and needs this process to end a step
        signal.signal(number, signal.SIG_IGN)
    workers = joined()
    if workers is None:
        return 0
    try:
        follow(workers, [RunFolder(Path(path)) for path in sys.argv[1:]])
    except GoneError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
