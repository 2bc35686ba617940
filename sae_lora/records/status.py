"""States of runs, from their folders and, for submitted runs, from SLURM."""

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
    """The state of a run."""

    new = "new"
    """Nothing exists but, at most, its config."""
    queued = "queued"
    """SLURM has a job for it, which has yet to start or resume it."""
    running = "running"
    """A process works on it."""
    resumable = "resumable"
    """Started, not running; resumes from its checkpoint."""
    failed = "failed"
    done = "done"


@dataclass(frozen=True)
class RunStatus:
    """The state of a run, and a note for people."""

    state: State
    note: str | None = None
    """The process that has the run, the cause of its failure, or the end of its job; `None` where there
    is no more to say."""

    @property
    def is_to_do(self) -> bool:
        """True where it has yet to be run, and no process or job has it."""
        return self.state in (State.new, State.resumable)


def counts(states: Iterable[State]) -> str:
    """The number of runs in each state, in words."""
    numbers = Counter(states)
    return ", ".join(f"{numbers[state]} {state.value}" for state in State if numbers[state])


def read_statuses(folders: Sequence[RunFolder]) -> list[RunStatus]:
    """The state of each run.

    A run that was submitted counts as queued also where SLURM cannot be asked from this machine.
    """
    states = [_in_folder(folder) for folder in folders]
    jobs = {
        number: job
        for number, folder in enumerate(folders)
        if states[number].is_to_do and (job := folder.job) is not None
    }
    if not jobs:
        return states
    try:
        queue = slurm.queue()
    except slurm.UnreachableError as error:
        for number, job in jobs.items():
            gone = f"if that job is gone for good, delete {folders[number].job_file}"
            states[number] = RunStatus(State.queued, f"as job {job}, or no more: {error}; {gone}")
        return states
    ends = slurm.ends([job for job in jobs.values() if job not in queue])
    for number, job in jobs.items():
        if job in queue:
            states[number] = RunStatus(State.queued, f"as job {job}, {queue[job]}")
        else:
            how = ends.get(job, "how it ended is not known")
            note = f"SLURM has its job {job} no more: {how}"
            states[number] = RunStatus(states[number].state, note)
    return states


def finished(path: Path) -> RunFolder:
    """The finished run in this folder.

    Raises:
        UserError: Where there is no run, or it is not finished; says how far it is.
    """
    folder = RunFolder(path)
    if not folder.config.exists():
        raise UserError(f"{path} is no run; a run's folder is outputs/<sweep>/<run>")
    (status,) = read_statuses([folder])
    if status.state is State.done:
        return folder
    now = folder.read_progress()
    how_far = f", at step {now.step:,} of {now.steps:,}" if now is not None and now.steps else ""
    note = f" ({status.note})" if status.note else ""
    raise UserError(f"{path} is not finished: it is {status.state.value}{how_far}{note}")


def _in_folder(folder: RunFolder) -> RunStatus:
    if folder.is_finished:
        return RunStatus(State.done)
    if (at_work := holder(folder.path)) is not None:
        return RunStatus(State.running, f"by process {at_work.pid} on {at_work.host}")
    if (message := folder.failure_message) is not None:
        return RunStatus(State.failed, message)
    return RunStatus(State.resumable if folder.checkpoints.exists() else State.new)
