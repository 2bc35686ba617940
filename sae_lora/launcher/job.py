"""A job that submitit runs, on this machine or on a node: a pack of runs that train together.

Every attempt at a pack is a child process, so that an exit, a kill, too little memory or a hang ends
only this attempt. If a pack fails, it is split and its halves run separately, until the failing run is
isolated. The cause is written into the folder of that run.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from submitit.helpers import DelayedSubmission

from sae_lora.common.errors import EXIT_HELD, EXIT_INTERRUPTED, EXIT_NOT_TOGETHER
from sae_lora.common.locks import holder
from sae_lora.common.signals import SIGNALS
from sae_lora.evaluation.suite_records import pending
from sae_lora.records.folder import RunFolder

STOP = SIGNALS[0]
"""Asks a run to save and stop."""
_TAIL_BYTES = 20_000
Item = TypeVar("Item")


class RunFailedError(Exception):
    """A run has failed. submitit and SLURM then also count the job as failed."""


@dataclass
class _Part:
    """Runs that still train together."""

    folders: list[RunFolder]
    furthest_step: int = 0
    """Largest step that these runs reached before a time limit, in this or a larger pack."""

    @property
    def unsettled(self) -> list[RunFolder]:
        """Runs that have still to be trained by this job.

        A run that another launch has taken up, or whose folder was deleted, is left out.
        """
        return [
            folder
            for folder in self.folders
            if folder.path.exists() and folder.is_unsettled and holder(folder.path) is None
        ]


class Job:
    """A pack of runs for submitit.

    If the job is preempted or reaches its time limit, submitit pickles it with its unfinished parts.

    Args:
        folders: Folders of runs that train together.
        environment: Variables for the runs, added to those of the job.
        time_s: Seconds before the job is asked to stop.
        answer_s: Seconds that a run may take to save its state after a request to stop.
        options: Further options of `python -m sae_lora.run.execute`.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        environment: dict[str, str],
        time_s: float,
        answer_s: float = 60.0,
        options: Sequence[str] = (),
    ) -> None:
        self._folders = [RunFolder(folder) for folder in folders]
        self._parts = [_Part(self._folders)]
        self._environment = environment
        self._time_s = time_s
        self._answer_s = answer_s
        self._options = options
        self._stopped: list[Path] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def __call__(self) -> None:
        """Execute the parts that are not finished.

        Raises:
            RunFailedError: At the end, if a run has failed.
        """
        while self._parts:
            # Planning removes older failures. A failure in a folder therefore comes from an earlier
            # start of this job: SLURM may restart a job without asking it to save first.
            part = self._parts[0]
            to_do = part.unsettled
            code = self._attempt(to_do) if to_do else 0
            unsettled = part.unsettled
            if unsettled and code not in (EXIT_HELD, EXIT_INTERRUPTED):
                output = _last_output(to_do[0].log)
                if len(to_do) > 1:
                    self._split(how_it_ended(code, output))
                    continue
                unsettled[0].write_failure(how_it_ended(code, output), output)
            if code == EXIT_INTERRUPTED:
                self._stopped += [folder.path for folder in unsettled]
            del self._parts[0]
        to_evaluate = [folder for folder in self._folders if folder.path.exists() and pending(folder)]
        if to_evaluate:  # a suite that fails does not fail the run; other results are kept
            code = self._run("sae_lora.run.evaluate", to_evaluate)
            if code == EXIT_INTERRUPTED and any(map(pending, to_evaluate)):
                self._wait_until_stopped()
        causes = [
            f"{folder.path.name}: {folder.failure_message or 'stopped by a signal'}"
            for folder in self._folders
            if not folder.is_finished and (folder.has_failed or folder.path in self._stopped)
        ]
        if causes:
            raise RunFailedError("; ".join(causes))

    def _run(self, module: str, folders: Sequence[RunFolder], *options: str) -> int:
        """Run a module in a child process, which prints into the first run's log; return its exit code.

        The launcher stops this job by Ctrl-C. The child process then gets the signal `STOP` instead. If
        it ends by this signal, because it came before it could handle signals, it was interrupted.
        """
        paths = [str(folder.path) for folder in folders]
        with folders[0].log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "sae_lora.common.lazy_imports", module, *options, *paths],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_for_torch() | os.environ | self._environment,
            )
        try:
            code = self._child.wait()
        except KeyboardInterrupt:
            self._child.send_signal(STOP)
            raise
        return EXIT_INTERRUPTED if -code in SIGNALS else code

    def _split(self, cause: str) -> None:
        """Replace the first part with the two halves of its unsettled runs."""
        part = self._parts[0]
        parts = [_Part(half, part.furthest_step) for half in halves(part.unsettled)]
        for half in parts:
            number = len(half.folders)
            size = f"in a pack of {number}" if number > 1 else "alone"
            with half.folders[0].log.open("a") as log:
                log.write(f"the pack failed: {cause}; continuing {size}\n")
        self._parts[:1] = parts

    def _attempt(self, pack: Sequence[RunFolder]) -> int:
        self._started = time.monotonic()
        first, *others = pack
        for folder in others:
            with folder.log.open("a") as log:
                log.write(f"trains together with {first.path.name}; see the log of that run\n")
        code = self._run("sae_lora.run.execute", pack, *self._options)
        if code == EXIT_INTERRUPTED and self._parts[0].unsettled:
            self._wait_until_stopped()
        return code

    def _wait_until_stopped(self) -> None:
        """Wait for SLURM to stop this process too, since only the run was asked to stop.

        A preemption or a cancellation begins with a signal to the run. It ends with a call of
        `checkpoint`, or with a kill after a grace period, which may be long. A job that exits earlier
        would count as failed.
        """
        time.sleep(self._answer_s)
        while "SLURM_JOB_ID" in os.environ:
            time.sleep(60)

    def checkpoint(self, *_: Any, **__: Any) -> DelayedSubmission | None:
        """Stop the run, which saves its state. submitit calls this before it requeues the job.

        Returns:
            The job to requeue; `None` if its only remaining run hangs, since a restart would not help.
        """
        has_stopped = self._stop_child()
        self._child = None
        if not self._parts:
            return DelayedSubmission(self)
        part = self._parts[0]
        unsettled = part.unsettled
        reports = [folder.read_progress() for folder in unsettled]
        step = max((progress.step for progress in reports if progress is not None), default=0)
        used_its_time = time.monotonic() - self._started > 0.8 * self._time_s
        if not unsettled or not used_its_time or step > part.furthest_step:
            part.furthest_step = max(part.furthest_step, step)
            return DelayedSubmission(self)
        message = f"hangs after step {step}: no step in {self._time_s / 60:.3g} min"
        if not has_stopped:
            message += ", and no response to the request to stop"
        if len(unsettled) > 1:
            self._split(message)
        else:
            unsettled[0].write_failure(message, _last_output(unsettled[0].log))
            del self._parts[0]
        return DelayedSubmission(self) if self._parts else None

    def _stop_child(self) -> bool:
        """Ask the child process to save and stop; kill it if it does not. Return True if it stopped."""
        if self._child is None or _has_ended(self._child.pid):
            return True
        os.kill(self._child.pid, STOP)
        deadline = time.monotonic() + self._answer_s
        while time.monotonic() < deadline:
            if _has_ended(self._child.pid):
                return True
            time.sleep(0.1)
        os.kill(self._child.pid, signal.SIGKILL)
        return False


def _for_torch() -> dict[str, str]:
    """Settings of torch's allocator on a GPU, unless the user has some: without them, memory breaks into
    pieces where packs nearly fill it."""
    own = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    return {} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def halves(pack: list[Item]) -> list[list[Item]]:
    """The two halves of a pack, the larger one first; a pack of one run is not divided."""
    half = (len(pack) + 1) // 2
    return [part for part in (pack[:half], pack[half:]) if part]


def _has_ended(child: int) -> bool:
    """True once the child process has ended.

    This runs in a signal handler, and the interrupted code may be inside `Popen.wait`, whose lock keeps
    `Popen` itself from seeing that the child ends.
    """
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # the interrupted code has just collected its exit code
        return True


def how_it_ended(code: int, output: str = "") -> str:
    """Describe the end of a process that wrote no failure; `output` is the last text that it printed."""
    lines = output.strip().splitlines()
    last_line = lines[-1] if lines else ""
    if code == EXIT_NOT_TOGETHER:
        return last_line or "the runs cannot train together"
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory, or killed by hand)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    if code == 1 and last_line:  # an uncaught exception in Python, before the run started
        return f"exited with code 1: {last_line}"
    return f"exited with code {code} and no error message"


def _last_output(log: Path) -> str:
    if not log.exists():  # the run folder was deleted
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")
