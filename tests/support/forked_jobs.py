"""Jobs of this machine in forked processes, because imports take longer than a small run.

submitit starts a controller, which starts a task, which starts the run: three new processes.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from submitit.core.submission import process_job
from submitit.core.utils import JobPaths
from submitit.local import local

from tests.support.attempts import FORKS, ForkedModule, redirect


class _Task:
    """A job's process, with the parts of `subprocess.Popen` that submitit uses."""

    def __init__(self, folder: Path, *_: object, **__: object) -> None:
        self._process = FORKS.Process(target=_task, args=(folder, dict(os.environ)))
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def _task(folder: Path, environment: dict[str, str]) -> None:
    """Execute a pickled job as `python -m submitit.core._submit` does."""
    from sae_lora.launcher import job

    number = str(os.getpid())
    os.environ.clear()
    os.environ.update(
        environment,
        SUBMITIT_EXECUTOR="local",
        SUBMITIT_LOCAL_JOB_ID=number,
        SUBMITIT_LOCAL_NTASKS="1",
        SUBMITIT_LOCAL_JOB_NUM_NODES="1",
        SUBMITIT_LOCAL_NODEID="0",
        SUBMITIT_LOCAL_GLOBALID="0",
        SUBMITIT_LOCAL_LOCALID="0",
    )
    paths = JobPaths(folder, number, 0)
    redirect(str(paths.stdout), str(paths.stderr))
    job.subprocess = SimpleNamespace(Popen=ForkedModule, STDOUT=subprocess.STDOUT)  # pyright: ignore
    process_job(folder)


@contextmanager
def forked_jobs() -> Iterator[None]:
    """Inside the block, jobs of this machine and their runs are forked processes."""
    with mock.patch.object(local, "start_controller", _Task):
        yield
