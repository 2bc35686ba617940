"""How far runs are, from their folders and, for those that were submitted, from SLURM."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sae_lora.common.errors import UserError
from sae_lora.common.locks import holder
from sae_lora.records import slurm
from sae_lora.records.folder import RunFolder


class State(Enum):
    """How far a run is."""

    new = "new"
    """Nothing of it is there, or its config alone."""
    queued = "queued"
    """SLURM has it; it has not begun there, or waits to go on."""
    running = "running"
    """A process is at it."""
    resumable = "resumable"
    """It was begun, nobody is at it, and it goes on from its checkpoint."""
    failed = "failed"
    done = "done"


@dataclass(frozen=True)
class Standing:
    """How far a run is, and what a person may need to know of it."""

    state: State
    note: str | None = None
    """Who has it, why it failed, what became of its job; `None` where the state says all."""

    @property
    def is_to_do(self) -> bool:
        """Whether it has yet to be run, and nobody has it."""
        return self.state in (State.new, State.resumable)


def counts(states: Iterable[State]) -> str:
    """How many runs are in which state, in words."""
    found = Counter(states)
    return ", ".join(f"{found[state]} {state.value}" for state in State if found[state])


def standings(folders: Sequence[RunFolder]) -> list[Standing]:
    """How far each run is.

    A run that was submitted counts as queued also where SLURM cannot be asked from this machine.
    """
    found = [_in_folder(folder) for folder in folders]
    jobs = {
        at: job.id
        for at, folder in enumerate(folders)
        if found[at].is_to_do and (job := folder.job) is not None
    }
    if not jobs:
        return found
    try:
        queue = slurm.queue()
    except slurm.UnreachableError as error:
        for at, job in jobs.items():
            gone = f"if that job is gone for good, delete {folders[at].job_file}"
            found[at] = Standing(State.queued, f"as job {job}, or no more: {error}; {gone}")
        return found
    lost = {at: job for at, job in jobs.items() if job not in queue}
    ends = slurm.ends(lost.values())
    for at, job in jobs.items():
        if at in lost:
            how = ends.get(job, "how it ended is not known")
            found[at] = Standing(found[at].state, f"SLURM has its job {job} no more: {how}")
        else:
            found[at] = Standing(State.queued, f"as job {job}, {queue[job]}")
    return found


def finished(path: Path) -> RunFolder:
    """The run in this folder, which has ended well.

    Raises:
        UserError: Where there is none, or it has not; says how far it is.
    """
    folder = RunFolder(path)
    if not folder.config.exists():
        raise UserError(f"{path} is no run; a run's folder is outputs/<sweep>/<run>")
    (standing,) = standings([folder])
    if standing.state is State.done:
        return folder
    now = folder.read_progress()
    how_far = f", at step {now.step:,} of {now.steps:,}" if now is not None and now.steps else ""
    note = f" ({standing.note})" if standing.note else ""
    raise UserError(f"{path} is not finished: it is {standing.state.value}{how_far}{note}")


def _in_folder(folder: RunFolder) -> Standing:
    if folder.is_finished:
        return Standing(State.done)
    if (at_work := holder(folder.path)) is not None:
        return Standing(State.running, f"by process {at_work.pid} on {at_work.host}")
    if (message := folder.failure_message) is not None:
        return Standing(State.failed, message)
    return Standing(State.resumable if folder.checkpoints.exists() else State.new)
