"""Jobs of this machine in forked processes, because imports take longer than a small run.

submitit starts a controller, which starts a task, which starts the run: three new processes.
"""

import ctypes
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from submitit.core.submission import process_job
from submitit.core.utils import JobPaths
from submitit.local import local

from tests.support.attempts import FORKS, ForkedModule, redirect

_MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD: the size from which freed memory goes back to the system at once."""


class _Task:
    """A job's process, with the parts of `subprocess.Popen` that submitit uses."""

    def __init__(self, limit: int | None, folder: Path, *_: object, **__: object) -> None:
        self._process = FORKS.Process(target=_task, args=(limit, folder, dict(os.environ)))
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def _task(limit: int | None, folder: Path, environment: dict[str, str]) -> None:
    """Execute a pickled job as `python -m submitit.core._submit` does."""
    from sae_lora.launcher import job

    if limit is not None:
        # Without this threshold, glibc keeps more or less of what was freed, from run to run.
        assert ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 8_000_000) == 1
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
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
def forked_jobs(limit: int | None = None) -> Iterator[None]:
    """Inside the block, jobs of this machine and their runs are forked processes.

    Args:
        limit: Bytes of memory that each process may use; by default all.
    """
    with mock.patch.object(local, "start_controller", partial(_Task, limit)):
        yield
