"""States of runs, read from their folders and, for submitted runs, from SLURM."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from sae_lora.common.console import complain, count
from sae_lora.common.errors import UserError
from sae_lora.common.locks import Holder, holder
from sae_lora.records import slurm
from sae_lora.records.damage import damage, damage_of_weights
from sae_lora.records.folder import RunFolder, in_full, is_run
from sae_lora.records.schema import Progress


class State(Enum):
    """The state of a run."""

    new = "new"
    """Not started: the folder contains at most a config."""
    queued = "queued"
    """A SLURM job in the queue, or another launch on its machine, will start or resume the run."""
    running = "running"
    """A process holds the run."""
    resumable = "resumable"
    """Started, not running, and nobody stopped it; resumes from its checkpoint."""
    stopped = "stopped"
    """Stopped on request; resumes from its checkpoint."""
    outranked = "outranked"
    """Stopped by `launcher.halving`, because others were ahead; can be taken up again."""
    failed = "failed"
    done = "done"
    damaged = "damaged"
    """A file is missing, cannot be read, or is not of this run."""


TO_DO = (State.new, State.resumable, State.stopped)
"""States of runs that a launch starts or continues."""
ENDED_BADLY = (State.failed, State.damaged)


@dataclass(frozen=True)
class RunStatus:
    """The state of a run, and a note for people."""

    state: State
    note: str | None = None
    """The process that holds the run, the cause of its failure, of its stop or of its damage, or the
    final state of its job; else `None`."""

    @property
    def is_to_do(self) -> bool:
        """True if a launch starts or continues the run without being asked to."""
        return self.state in TO_DO


def counts(states: Iterable[State]) -> str:
    """The number of runs in each state, as text: `3 new, 1 failed`."""
    numbers = Counter(states)
    return ", ".join(f"{numbers[state]} {state.value}" for state in State if numbers[state])


def read_statuses(folders: Sequence[RunFolder]) -> list[RunStatus]:
    """The state of each run.

    A submitted run counts as queued if SLURM does not answer from this machine.
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
            advice = f"if this job no longer exists, delete {folders[number].job_file}"
            states[number] = RunStatus(State.queued, f"probably, as job {job}: {error}; {advice}")
        return states
    ends = slurm.ends([job for job in jobs.values() if job not in queue])
    for number, job in jobs.items():
        if job in queue:
            states[number] = RunStatus(State.queued, f"as job {job}, {queue[job]}")
        else:
            end = ends.get(job, "final state unknown")
            message = slurm.last_message(folders[number].path.parent, job)
            note = f"job {job} has left the SLURM queue: {end}" + (f"; {message}" if message else "")
            states[number] = RunStatus(states[number].state, note)
    return states


def progress_of(folder: RunFolder, state: State) -> Progress | None:
    """The newest report of a run; `None` without one.

    A run that does not train has the step of its checkpoint, from which it resumes: its process may
    have taken more steps before it was killed, or fewer before its last report.
    """
    progress = folder.read_progress()
    if progress is None or state not in (*TO_DO, State.queued, State.outranked):
        return progress
    step = folder.checkpoint_step or 0
    return replace(
        progress,
        step=step,
        tokens=round(progress.train_tokens * step / max(1, progress.steps)),
        loss=progress.loss if step == progress.step else None,
    )


def is_done(folder: RunFolder) -> bool:
    """True if the run is finished and its folder is not damaged."""
    return folder.is_finished and damage(folder) is None


def sound(folders: Sequence[RunFolder]) -> list[RunFolder]:
    """The folders that are not damaged. For each other folder, a line is printed.

    Raises:
        UserError: If all are damaged.
    """
    causes = {folder: cause for folder in folders if (cause := damage(folder)) is not None}
    lines = [f"{folder.path}: {cause}" for folder, cause in causes.items()]
    if len(causes) == len(folders):
        raise UserError("\n".join([f"damaged: {line}" for line in lines]))
    for line in lines:
        complain("damaged", line)
    return [folder for folder in folders if folder not in causes]


def what_is_saved(stopped: Iterable[RunFolder]) -> str:
    """The steps that stopped runs resume from, as text."""
    checkpoints = [folder.checkpoint_step for folder in stopped]
    saved = [step for step in checkpoints if step is not None]
    texts = {}
    if saved:
        first, last = min(saved), max(saved)
        steps = f"step {last:,} is" if first == last else f"steps {first:,} to {last:,} are"
        texts[f"{steps} saved, the same command resumes from there"] = len(saved)
    if len(saved) < len(checkpoints):
        without = len(checkpoints) - len(saved)
        texts["nothing to save yet, because no step was taken"] = without
    several = len(checkpoints) > 1
    return "; ".join(
        f"{count(runs, 'run')}: {text}" if several else text for text, runs in texts.items()
    )


def with_weights(path: Path) -> RunFolder:
    """The finished run in this folder, for a command that uses its trained weights.

    Raises:
        UserError: As `finished`, and if the weights are not those that the run wrote.
    """
    folder = finished(path)
    if (cause := damage_of_weights(folder)) is not None:
        raise UserError(f"{folder.path} is damaged: {cause}")
    return folder


def finished(path: Path) -> RunFolder:
    """The finished run in this folder.

    Raises:
        UserError: If the folder is not a run, or the run is not finished. The message has its state.
    """
    path = in_full(path)
    folder = RunFolder(path)
    if not is_run(path):
        raise UserError(f"{path} is not a run; the folder of a run is outputs/<sweep>/<run>")
    (status,) = read_statuses([folder])
    if status.state is State.done:
        return folder
    progress = progress_of(folder, status.state)
    step = ""
    if progress is not None and progress.steps:
        step = f", at step {progress.step:,} of {progress.steps:,}"
    note = f" ({status.note})" if status.note else ""
    raise UserError(f"{path} is not finished: it is {status.state.value}{step}{note}")


def _launching(folder: RunFolder) -> Holder | None:
    """The process of another launch that will run this run; `None` without one."""
    process = holder(folder.launch) if folder.launch is not None else None
    return None if process == Holder.this_process() else process


def _in_folder(folder: RunFolder) -> RunStatus:
    if (cause := damage(folder)) is not None:
        return RunStatus(State.damaged, cause)
    if folder.is_finished:
        return RunStatus(State.done)
    if (process := holder(folder.path)) is not None:
        return RunStatus(State.running, f"by process {process.pid} on {process.host}")
    if (message := folder.failure_message) is not None:
        return RunStatus(State.failed, message)
    if folder.is_outranked:
        return RunStatus(State.outranked, folder.stop_message)
    if (process := _launching(folder)) is not None:
        return RunStatus(State.queued, f"in the launch of process {process.pid} on {process.host}")
    if (message := folder.stop_message) is not None:
        return RunStatus(State.stopped, message)
    return RunStatus(State.resumable if folder.checkpoints.exists() else State.new)
