"""Small runs on the tests' SLURM: to submit them, look at them and wait for them."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_lora.common.locks import holder
from sae_lora.records.folder import RunFolder
from tests.support.cluster import Cluster, missing_programs
from tests.support.commands import launch, launch_in_this_process
from tests.support.points import SMALL, folders_in

NEEDS_SLURM = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_programs()), reason=f"SLURM is not installed: {missing_programs()}"),
    pytest.mark.usefixtures("empty_queue"),
]
"""Marks of a module whose tests need an empty queue of its `cluster`."""
LONG = ("train.train_tokens=30000", "train.eval_every_tokens=10000", "train.checkpoint_every_steps=10")
ON_CLUSTER = (
    "launcher=slurm",
    "launcher.timeout_min=30",
    "launcher.gpus_per_node=0",
    "launcher.cpus_per_task=1",
)


def submitted_jobs(cluster: Cluster) -> set[str]:
    """The jobs of the last minutes, also those that have ended."""
    options = "--noheader", "--array", "--states=all", "--format=%i"
    return set(cluster.command("squeue", *options).split())


def jobs(cluster: Cluster) -> list[str]:
    return cluster.command("squeue", "--noheader", "--array", "--format=%i").split()


def until(condition: Callable[[], object], what: str, limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:g} s"
        time.sleep(0.2)


def submitted(
    home: Path, *arguments: str, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """The launch command; in a process of its own only with other environment variables."""
    options = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if argument not in options]
    folders = f"output_dir={home}", f"data.cache_dir={home}/cache"
    command = *options, *SMALL, *ON_CLUSTER, *folders, *overrides
    return launch(*command, **environment) if environment else launch_in_this_process(*command)


def the_run(home: Path) -> RunFolder:
    (folder,) = folders_in(home)
    return folder


def occupy(cluster: Cluster, seconds: int) -> None:
    """Submit a job of higher priority that takes both nodes."""
    whole = "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"
    cluster.command("sbatch", *whole, f"--wrap=sleep {seconds}")


def at_step(folder: RunFolder, step: int) -> bool:
    progress = folder.read_progress()
    return progress is not None and progress.step >= step


def halt(*folders: RunFolder, step: int) -> int:
    """Suspend the process of runs once they are at a step, because they are faster than SLURM.

    Returns:
        The process id, for `go_on`.
    """
    until(lambda: all(at_step(folder, step) for folder in folders), "at work")
    owner = holder(folders[0].path)
    assert owner is not None
    os.kill(owner.pid, signal.SIGSTOP)
    return owner.pid


def go_on(pid: int) -> None:
    """Resume a suspended process; it may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def is_asked_to_stop(pid: int) -> bool:
    """True if a suspended process has a pending stop signal, or has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    (pending,) = [line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd")]
    return any(int(pending, 16) >> number - 1 & 1 for number in (signal.SIGUSR2, signal.SIGTERM))
