"""Gives packs to submitit: to jobs on this machine, as places become free, or to SLURM as array jobs.

A job (`Job`) executes its pack in a process of its own. Only this module and `job` know submitit.
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

from sae_lora.common.console import complain, say
from sae_lora.common.errors import UserError
from sae_lora.common.locks import holder
from sae_lora.common.signals import handling
from sae_lora.config.schema import LauncherConfig
from sae_lora.launch.job import Job, halves
from sae_lora.launch.live_view import Watch
from sae_lora.launch.packs import places
from sae_lora.launch.plan import Pack, Run
from sae_lora.records import slurm
from sae_lora.records.folder import RunFolder
from sae_lora.records.status import standings
from sae_lora.tracking import tracker

_NO_LIMIT_MIN = 10 * 365 * 24 * 60
_TIMEOUTS = 1_000
"""How often a job may be started again that was out of time; one that hangs ends itself."""
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""All is fetched before; a node without internet is the normal case."""
_LOOK_EVERY_S = 0.5
_ASK_SLURM_EVERY_S = 10.0


# ---- this machine -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AtWork:
    """A pack that has a place."""

    pack: Pack
    job: submitit.Job[None]
    place: dict[str, str]
    reached: set[Path]
    """What it had come to when it began."""


def run_here(packs: Sequence[Pack], settings: LauncherConfig) -> None:
    """Executes the packs on this machine, as many at a time as there are places, and shows them.

    Raises:
        KeyboardInterrupt: When asked to stop, once what runs has saved where it stands.
    """
    runs = [run for pack in packs for run in pack]
    folder = _new_folder(runs)
    executor = submitit.LocalExecutor(folder, max_num_timeout=_TIMEOUTS)
    timeout_min = settings.timeout_min or _NO_LIMIT_MIN
    executor.update_parameters(timeout_min=timeout_min, signal_delay_s=settings.signal_delay_s)
    variables = _OFFLINE | tracker.settled(runs[0].config.tracking)
    free, waiting = deque(places(runs, settings)), deque(packs)
    at_work: list[_AtWork] = []
    asked = handling((signal.SIGTERM, signal.SIGHUP), _stop_asked)
    with _hearing_interrupts(), asked, Watch([run.folder for run in runs]) as watch:
        try:
            while waiting or at_work:
                while waiting and free:
                    place, pack = free.popleft(), waiting.popleft()
                    with _errors_to(folder / "controllers.log"):
                        job = executor.submit(_job(pack, variables | place, settings))
                    at_work.append(_AtWork(pack, job, place, _reached(pack)))
                time.sleep(_LOOK_EVERY_S)
                watch.update()
                ended = [one for one in at_work if one.job.done()]
                at_work = [one for one in at_work if one not in ended]
                free.extend(one.place for one in ended)
                waiting.extend(part for one in ended for part in _rest(one))
        except KeyboardInterrupt:
            say("stopping: what runs saves where it stands")
            _stop(at_work, settings.signal_delay_s, watch)
            raise


@contextmanager
def _hearing_interrupts() -> Iterator[None]:
    """Inside the block, what is started hears Ctrl-C's signal, by which submitit stops it.

    A script makes what it puts in the background deaf to it, and with that all that is started there. So
    that the script's Ctrl-C still stops none of it, it is in a process group of its own from then on.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


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


def _rest(ended: _AtWork) -> list[Pack]:
    """What is to be started again of a pack: submitit itself starts a job only so often.

    Together where that led further, in halves where it did not; a run alone that gets no further is
    left for another launch.
    """
    found = standings([run.folder for run in ended.pack])
    left = [run for run, standing in zip(ended.pack, found, strict=True) if standing.is_to_do]
    if left and not _reached(ended.pack) <= ended.reached:
        return [left]
    return halves(left) if len(left) > 1 else []


def _reached(pack: Pack) -> set[Path]:
    """Checkpoints, and ends."""
    ends = {path for run in pack for path in (run.folder.summary, run.folder.failure) if path.exists()}
    return ends | {path for run in pack for path in run.folder.checkpoints.glob("step-*")}


def _stop(at_work: Sequence[_AtWork], most_s: float, watch: Watch) -> None:
    for one in at_work:
        one.job.cancel()
    deadline = time.monotonic() + most_s
    runs = [run for one in at_work for run in one.pack]
    while any(holder(run.folder.path) for run in runs):
        if time.monotonic() > deadline:
            for run in runs:
                if (left := holder(run.folder.path)) is not None:
                    complain("does not stop", f"{run.name}, process {left.pid} on {left.host}")
            return
        time.sleep(_LOOK_EVERY_S)
        watch.update()


def _stop_asked(number: int, frame: FrameType | None) -> None:
    """A kill, or a terminal that is closed, is what Ctrl-C is."""
    raise KeyboardInterrupt


# ---- SLURM --------------------------------------------------------------------------------------


def submit(packs: Sequence[Pack], settings: LauncherConfig) -> None:
    """Submits the packs to SLURM as array jobs, and notes the job of each run in its folder.

    Raises:
        UserError: Where SLURM refuses.
    """
    runs = [run for pack in packs for run in pack]
    executor = submitit.AutoExecutor(_new_folder(runs), "slurm", slurm_max_num_timeout=_TIMEOUTS)
    cores = settings.cpus_per_task
    executor.update_parameters(
        name=slurm.JOB_NAME + runs[0].config.sweep,
        timeout_min=settings.timeout_min,
        nodes=settings.nodes,
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
        slurm_srun_args=[
            # One process on the first node alone: it starts the others (`sae_lora.train.distributed`).
            *(["--nodes=1", "--ntasks=1"] if settings.nodes > 1 else []),
            # Since SLURM 22.05 srun does not take it over from sbatch.
            *([f"--cpus-per-task={cores}"] if cores else []),
        ],
    )
    threads = {"OMP_NUM_THREADS": str(max(1, cores // settings.node_processes))} if cores else {}
    variables = _OFFLINE | threads
    for start in range(0, len(packs), settings.max_array_size):
        part = packs[start : start + settings.max_array_size]
        try:
            with _as_outside_a_job(), executor.batch():
                jobs = [executor.submit(_job(pack, variables, settings)) for pack in part]
        except FailedJobError as error:
            said = [line for line in str(error).splitlines() if "error" in line or "unrec" in line]
            reason = "\n  ".join(said or [str(error)])
            raise UserError(
                f"launcher=slurm: sbatch refused {len(part)} jobs ({start} are in):\n  {reason}"
            ) from error
        for pack, job in zip(part, jobs, strict=True):
            for run in pack:
                run.folder.write_job(job.job_id)
    in_jobs = f" in {len(packs)} jobs" if len(packs) < len(runs) else ""
    say(
        f"{len(runs)} submitted to SLURM{in_jobs}; `python -m sae_lora status {_sweep(runs)}` shows them"
    )


def wait_for(folders: Sequence[RunFolder]) -> None:
    """Shows the runs until SLURM has none of their jobs any more."""
    jobs = {job for folder in folders if (job := folder.job) is not None}
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


def _job(pack: Pack, variables: dict[str, str], settings: LauncherConfig) -> Job:
    return Job(
        [run.folder.path.absolute() for run in pack],
        variables,
        time_s=60 * (settings.timeout_min or _NO_LIMIT_MIN) - settings.signal_delay_s,
        answer_s=0.8 * settings.signal_delay_s,
        options=[f"--nodes={settings.nodes}", f"--processes-per-node={settings.node_processes}"],
    )


def _sweep(runs: Sequence[Run]) -> Path:
    return runs[0].folder.path.parent


def _new_folder(runs: Sequence[Run]) -> Path:
    """For submitit's own files, which it names by process number: one for each launch."""
    launch = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    return _sweep(runs).absolute() / ".submitit" / launch
