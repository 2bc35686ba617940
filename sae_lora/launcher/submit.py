"""Packs as jobs: run on this machine, submit to SLURM as array jobs, cancel."""

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

import submitit
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env

from sae_lora.common.console import complain, count, say
from sae_lora.common.errors import UserError
from sae_lora.common.locks import held, holder
from sae_lora.common.signals import interrupted_once
from sae_lora.config.execution import LauncherConfig
from sae_lora.launcher.job import Job, halves
from sae_lora.launcher.live_view import Watch
from sae_lora.launcher.packs import divides, slots
from sae_lora.launcher.plan import Pack, Run
from sae_lora.records import slurm
from sae_lora.records.folder import DamagedError, RunFolder, runs_of
from sae_lora.records.status import State, read_statuses, what_is_saved
from sae_lora.tracking import tracker

_NO_LIMIT_MIN = 10 * 365 * 24 * 60
_TIMEOUTS = 1_000
"""Largest number of restarts after a time limit. The job itself ends a run that hangs."""
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""Runs need no network: everything is already fetched, and many nodes have no internet."""
_POLL_S = 0.5
_POLL_SLURM_S = 10.0


# ---- this machine -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Started:
    """A pack that runs in a slot."""

    pack: Pack
    job: submitit.Job[None]
    slot: dict[str, str]
    """Environment variables of the slot."""
    milestones: set[Path]
    """Milestones that the pack had reached before this job."""


@contextmanager
def launching(packs: Sequence[Pack]) -> Iterator[Path]:
    """A folder of this launch; inside the block, its runs count as queued for other launches."""
    folder = _new_folder(packs[0][0].folder.path.parent)
    with held(folder):
        for pack in packs:
            for run in pack:
                run.folder.write_launch(folder)
        yield folder


def run_here(packs: Sequence[Pack], settings: LauncherConfig, folder: Path) -> None:
    """Execute the packs on this machine, one in each slot at a time, and show their progress.

    `folder` is that of `launching`.

    Raises:
        KeyboardInterrupt: After a request to stop, when the runs have saved their state.
        UserError: If submitit's files cannot be written, for a full disk; runs are stopped as above.
    """
    runs = [run for pack in packs for run in pack]
    executor = submitit.LocalExecutor(folder, max_num_timeout=_TIMEOUTS)
    timeout_min = settings.timeout_min or _NO_LIMIT_MIN
    executor.update_parameters(timeout_min=timeout_min, signal_delay_s=settings.signal_delay_s)
    variables = _OFFLINE | tracker.settled(runs[0].config.tracking)
    free, waiting = deque(slots(runs, settings)), deque(packs)
    started: list[_Started] = []
    # SIGTERM and a closed terminal have the same effect as Ctrl-C.
    stops = interrupted_once((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    with (
        _receiving_interrupts(),
        stops as listen_again,
        Watch([run.folder for run in runs]) as watch,
    ):
        try:
            while waiting or started:
                while waiting and free:
                    slot, pack = free.popleft(), waiting.popleft()
                    with _errors_to(folder / "controllers.log"):
                        job = executor.submit(_job(pack, variables | slot, settings))
                    started.append(_Started(pack, job, slot, _milestones(pack)))
                time.sleep(_POLL_S)
                watch.update()
                ended = [entry for entry in started if entry.job.done()]
                started = [entry for entry in started if entry not in ended]
                free.extend(entry.slot for entry in ended)
                waiting.extend(pack for entry in ended for pack in _remaining(entry))
        except (KeyboardInterrupt, OSError) as error:
            say("stopping: runs that have taken a step save a checkpoint first")
            for entry in started:
                entry.job.cancel()
            listen_again()
            _wait_for_stop(started, settings.signal_delay_s, watch)
            stopped = [run.folder for entry in started for run in entry.pack if _is_stopped(run)]
            if len(runs) > 1 and stopped:  # the log of a single run says it
                say(f"stopped: {what_is_saved(stopped)}")
            if isinstance(error, OSError):
                cause = error.strerror or str(error)
                raise UserError(f"output_dir: cannot write to {folder}: {cause}") from error
            raise


@contextmanager
def _receiving_interrupts() -> Iterator[None]:
    """Let processes that start inside the block receive SIGINT, by which submitit stops them.

    The background processes of a shell script ignore SIGINT, and their children inherit this. This
    process then moves to its own process group, so that Ctrl-C in the script still does not stop it.
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
    """Send stderr of processes that start inside the block to a file, such as submitit's at Ctrl-C."""
    original = os.dup(2)
    with file.open("ab") as opened:
        os.dup2(opened.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)


def _remaining(ended: _Started) -> list[Pack]:
    """Packs of the runs to start again, since submitit limits the restarts of a job.

    If the pack made progress, its runs stay together, otherwise it is split into halves. A single run
    without progress is left to another launch.
    """
    statuses = read_statuses([run.folder for run in ended.pack])
    to_do = [run for run, status in zip(ended.pack, statuses, strict=True) if status.is_to_do]
    if to_do and not _milestones(ended.pack) <= ended.milestones:
        return [to_do]
    return halves(to_do) if len(to_do) > 1 else []


def _milestones(pack: Pack) -> set[Path]:
    """Checkpoints, summaries and failures of the runs."""
    ends = {path for run in pack for path in (run.folder.summary, run.folder.failure) if path.exists()}
    return ends | {path for run in pack for path in run.folder.checkpoints.glob("step-*")}


def _is_stopped(run: Run) -> bool:
    return run.folder.is_unsettled and holder(run.folder.path) is None


def _wait_for_stop(started: Sequence[_Started], timeout_s: float, watch: Watch) -> None:
    """Wait until the runs of cancelled jobs have stopped, for at most `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    runs = [run for entry in started for run in entry.pack]
    while any(holder(run.folder.path) for run in runs):
        if time.monotonic() > deadline:
            for run in runs:
                if (process := holder(run.folder.path)) is not None:
                    complain("still running", f"{run.name}, process {process.pid} on {process.host}")
            return
        time.sleep(_POLL_S)
        watch.update()


# ---- SLURM --------------------------------------------------------------------------------------


def submit(packs: Sequence[Pack], settings: LauncherConfig) -> None:
    """Submit the packs to SLURM as array jobs, and write the job of each run into its folder.

    Raises:
        UserError: If SLURM refuses.
    """
    runs = [run for pack in packs for run in pack]
    sweep = runs[0].folder.path.parent
    executor = submitit.AutoExecutor(_new_folder(sweep), "slurm", slurm_max_num_timeout=_TIMEOUTS)
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
            # One process, on the first node. It starts the other processes
            # (`sae_lora.train.distributed`).
            *(["--nodes=1", "--ntasks=1"] if settings.nodes > 1 else []),
            # Since SLURM 22.05, srun does not inherit this option from sbatch.
            *([f"--cpus-per-task={cores}"] if cores else []),
        ],
    )
    threads = {"OMP_NUM_THREADS": str(max(1, cores // settings.node_processes))} if cores else {}
    variables = _OFFLINE | threads
    for start in range(0, len(packs), settings.max_array_size):
        part = packs[start : start + settings.max_array_size]
        try:
            with _without_job_variables(), executor.batch():
                jobs = [executor.submit(_job(pack, variables, settings)) for pack in part]
        except FailedJobError as error:
            lines = [line for line in str(error).splitlines() if "error" in line or "unrec" in line]
            reason = "\n  ".join(lines or [str(error)])
            raise UserError(
                f"launcher=slurm: sbatch refused {len(part)} jobs ({start} are submitted):\n  {reason}"
            ) from error
        for pack, job in zip(part, jobs, strict=True):
            for run in pack:
                run.folder.write_job(job.job_id)
    in_jobs = f" in {count(len(packs), 'job')}" if len(packs) < len(runs) else ""
    say(f"{count(len(runs), 'run')} submitted to SLURM{in_jobs}; `sae-lora status {sweep}` shows them")


def wait_for_others(folders: Sequence[RunFolder]) -> None:
    """Show the runs until no process of another launch runs them, or will."""
    with Watch(folders) as watch:
        while any(status.state in (State.running, State.queued) for status in read_statuses(folders)):
            watch.update()
            time.sleep(_POLL_S)


def wait_for(folders: Sequence[RunFolder]) -> None:
    """Show the runs until none of their jobs is in SLURM's queue."""
    jobs = {job for folder in folders if (job := folder.job) is not None}
    with Watch(folders) as watch:
        while True:
            with contextlib.suppress(slurm.UnreachableError):  # SLURM may answer the next time
                if not slurm.queue().keys() & jobs:
                    return
            watch.update()
            time.sleep(_POLL_SLURM_S)


def cancel(folders: Sequence[RunFolder]) -> bool:
    """Cancel the jobs of unfinished runs. The runs keep their checkpoints and can resume.

    Returns:
        True if the job of every run is known; a line is printed for each other run.

    Raises:
        UserError: If SLURM does not answer, or refuses.
    """
    known = {}
    for folder in folders:
        try:
            known[folder] = folder.job
        except DamagedError as error:
            complain("damaged", f"{folder.path}: {error.cause}")
    queue = slurm.queue() if any(known.values()) else {}
    jobs = {job for folder, job in known.items() if job in queue and folder.is_unsettled}
    if jobs:
        slurm.cancel(sorted(jobs))
    say(f"{count(len(jobs), 'job')} cancelled")
    named = {folder.path for folder in folders}
    others = [folder for folder in runs_of(folders[0].path.parent) if folder.path not in named]
    for folder in others:
        with contextlib.suppress(DamagedError):
            if folder.is_unsettled and folder.job in jobs:
                say(f"{folder.path.name} stops too: it trains in the same job")
    for folder, status in zip(known, read_statuses(list(known)), strict=True):
        if status.state is State.running and known[folder] not in jobs:
            complain(
                "skipped", f"{folder.path.name} is running {status.note}; stop it there with Ctrl-C"
            )
    return len(known) == len(folders)


@contextmanager
def _without_job_variables() -> Iterator[None]:
    """Hide the variables of SLURM inside the block: a job submitted from a job must not inherit them."""
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
        options=[
            f"--nodes={settings.nodes}",
            f"--processes-per-node={settings.node_processes}",
            *["--shard"] * divides(pack, settings),
        ],
    )


def _new_folder(sweep: Path) -> Path:
    """A folder for submitit's files, unique for this launch: submitit names files by process number."""
    launch = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    return sweep.absolute() / ".submitit" / launch
