"""Gives runs to submitit: to jobs on this machine, as places become free, or to SLURM as array jobs.

A job (`Job`) executes its run in a process of its own. Only this module and `job` know submitit.
"""

import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import submitit
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env

from sae_lora import slurm, tracking
from sae_lora.config import LauncherConfig
from sae_lora.errors import UserError
from sae_lora.interruption import handling
from sae_lora.job import Job
from sae_lora.lease import holder
from sae_lora.plan import Run
from sae_lora.records import RunFolder, SubmittedJob
from sae_lora.standing import State, standings
from sae_lora.terminal import complain, say
from sae_lora.watch import Watch

_NO_LIMIT_MIN = 10 * 365 * 24 * 60
_TIMEOUTS = 1_000
"""How often SLURM may start a job again that was out of time; one that hangs ends itself."""
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""All is fetched before; a node without internet is the normal case."""
_LOOK_EVERY_S = 0.5
_ASK_SLURM_EVERY_S = 10.0


# ---- this machine -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AtWork:
    """A run that has a place."""

    run: Run
    job: submitit.Job[None]
    place: dict[str, str]
    checkpoint: str | None
    """The newest when it began."""


def run_here(runs: Sequence[Run], settings: LauncherConfig) -> None:
    """Executes the runs on this machine, as many at a time as there are places, and shows them.

    Raises:
        KeyboardInterrupt: When asked to stop, once what runs has saved where it stands.
    """
    folder = _new_folder(runs)
    executor = submitit.LocalExecutor(folder)
    timeout_min = settings.timeout_min or _NO_LIMIT_MIN
    executor.update_parameters(timeout_min=timeout_min, signal_delay_s=settings.signal_delay_s)
    variables = _OFFLINE | tracking.settled(runs[0].config.tracking)
    free, waiting = deque(_places(runs, settings)), deque(runs)
    at_work: list[_AtWork] = []
    asked = handling((signal.SIGTERM, signal.SIGHUP), _stop_asked)
    with asked, Watch([run.folder for run in runs]) as watch:
        try:
            while waiting or at_work:
                while waiting and free:
                    place, run = free.popleft(), waiting.popleft()
                    with _errors_to(folder / "controllers.log"):
                        job = executor.submit(_job(run, variables | place, settings))
                    at_work.append(_AtWork(run, job, place, _newest_checkpoint(run.folder)))
                time.sleep(_LOOK_EVERY_S)
                watch.update()
                ended = [one for one in at_work if one.job.done()]
                at_work = [one for one in at_work if one not in ended]
                free.extend(one.place for one in ended)
                waiting.extend(one.run for one in ended if _goes_on(one))
        except KeyboardInterrupt:
            say("stopping: what runs saves where it stands")
            _stop(at_work, settings.signal_delay_s, watch)
            raise


@contextmanager
def _errors_to(file: Path) -> Iterator[None]:
    """What is started inside the block complains there: submitit's processes do so at Ctrl-C."""
    before = os.dup(2)
    with file.open("ab") as opened:
        os.dup2(opened.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _goes_on(ended: _AtWork) -> bool:
    """Whether a run is to be started again: submitit itself starts a job only so often."""
    (standing,) = standings([ended.run.folder])
    further = _newest_checkpoint(ended.run.folder) != ended.checkpoint
    return standing.state is State.resumable and further


def _newest_checkpoint(folder: RunFolder) -> str | None:
    return max((path.name for path in folder.checkpoints.glob("step-*")), default=None)


def _stop(at_work: Sequence[_AtWork], most_s: float, watch: Watch) -> None:
    for one in at_work:
        one.job.cancel()
    deadline = time.monotonic() + most_s
    while any(holder(one.run.folder.path) for one in at_work):
        if time.monotonic() > deadline:
            for one in at_work:
                if (left := holder(one.run.folder.path)) is not None:
                    complain("does not stop", f"{one.run.name}, process {left.pid} on {left.host}")
            return
        time.sleep(_LOOK_EVERY_S)
        watch.update()


def _stop_asked(number: int, frame: FrameType | None) -> None:
    """A kill, or a terminal that is closed, is what Ctrl-C is."""
    raise KeyboardInterrupt


def _places(runs: Sequence[Run], settings: LauncherConfig) -> list[dict[str, str]]:
    """Where runs can be at the same time: for each place, the variables that keep a run to it."""
    gpus = [] if all(run.config.train.device.name == "cpu" for run in runs) else _gpus()
    number = settings.max_parallel or len(gpus) or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = settings.cpus_per_task or (max(1, cores // number) if number > 1 else None)
    shared = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return [
        shared | ({"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {})
        for place in range(number)
    ]


def _gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch  # there already, since something was fetched

    return [str(number) for number in range(torch.cuda.device_count())]


# ---- SLURM --------------------------------------------------------------------------------------


def submit(runs: Sequence[Run], settings: LauncherConfig) -> None:
    """Submits the runs to SLURM as array jobs, and notes the job of each in its folder.

    Raises:
        UserError: Where SLURM refuses.
    """
    executor = submitit.AutoExecutor(_new_folder(runs), "slurm", slurm_max_num_timeout=_TIMEOUTS)
    cores = settings.cpus_per_task
    executor.update_parameters(
        name=slurm.JOB_NAME + runs[0].config.sweep,
        timeout_min=settings.timeout_min,
        gpus_per_node=settings.gpus_per_node or None,
        cpus_per_task=cores,
        mem_gb=settings.mem_gb,
        slurm_partition=settings.partition,
        slurm_account=settings.account,
        slurm_qos=settings.qos,
        slurm_constraint=settings.constraint,
        slurm_setup=settings.setup or None,
        slurm_signal_delay_s=settings.signal_delay_s,
        slurm_array_parallelism=settings.array_parallelism,
        slurm_additional_parameters={"requeue": True} | (settings.sbatch or {}),
        # Since SLURM 22.05 srun does not take it over from sbatch.
        slurm_srun_args=[f"--cpus-per-task={cores}"] if cores else None,
    )
    variables = _OFFLINE | ({"OMP_NUM_THREADS": str(cores)} if cores else {})
    for start in range(0, len(runs), settings.max_array_size):
        part = runs[start : start + settings.max_array_size]
        try:
            with _as_outside_a_job(), executor.batch():
                jobs = [executor.submit(_job(run, variables, settings)) for run in part]
        except FailedJobError as error:
            said = [line for line in str(error).splitlines() if "error" in line or "unrec" in line]
            reason = "\n  ".join(said or [str(error)])
            raise UserError(
                f"launcher=slurm: sbatch refused {len(part)} jobs ({start} are in):\n  {reason}"
            ) from error
        for run, job in zip(part, jobs, strict=True):
            run.folder.write_job(SubmittedJob(job.job_id))
    say(f"{len(runs)} submitted to SLURM; `python -m sae_lora status {_sweep(runs)}` shows them")


def wait_for(folders: Sequence[RunFolder]) -> None:
    """Shows the runs until SLURM has none of their jobs any more."""
    jobs = {job.id for folder in folders if (job := folder.job) is not None}
    with Watch(folders) as watch:
        while True:
            with contextlib.suppress(slurm.UnreachableError):  # it may answer again in a moment
                if not slurm.queue().keys() & jobs:
                    return
            watch.update()
            time.sleep(_ASK_SLURM_EVERY_S)


@contextmanager
def _as_outside_a_job() -> Iterator[None]:
    """A job that is submitted from within another must not take over what that one was given."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    configuration = os.environ.get("SLURM_CONF")
    with clean_env():
        if configuration is not None:
            os.environ["SLURM_CONF"] = configuration
        yield


# ---- both ---------------------------------------------------------------------------------------


def _job(run: Run, variables: dict[str, str], settings: LauncherConfig) -> Job:
    return Job(
        [run.folder.path.absolute()],
        variables,
        time_s=60 * (settings.timeout_min or _NO_LIMIT_MIN) - settings.signal_delay_s,
        answer_s=0.8 * settings.signal_delay_s,
    )


def _sweep(runs: Sequence[Run]) -> Path:
    return runs[0].folder.path.parent


def _new_folder(runs: Sequence[Run]) -> Path:
    """For submitit's own files, which it names by process number: one for each launch."""
    launch = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    return _sweep(runs).absolute() / ".submitit" / launch
