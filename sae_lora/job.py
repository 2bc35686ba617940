"""What submitit runs, on this machine or on a node: the runs it was given, one after another.

Every attempt at a run is a child process, so that whatever ends it (an exit, a kill, too little
memory, a hang) ends nothing else, and is written into the run's folder.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission

from sae_lora.errors import EXIT_HELD, EXIT_INTERRUPTED
from sae_lora.interruption import SIGNALS
from sae_lora.records import RunFolder

STOP = signal.SIGUSR2
"""Asks a run to save and stop."""
_TAIL_BYTES = 20_000


class RunFailedError(Exception):
    """A run has failed: what submitit and SLURM are to know of it."""


class Job:
    """Runs, to be executed one after another wherever submitit takes them.

    What is left of it survives in submitit's pickle when the job is preempted or out of time.

    Args:
        folders: The run folders.
        environment: Variables for the runs, beside those of the job.
        time_s: Seconds that the job is given before it is asked to stop.
        answer_s: Seconds that a run may take to save where it stands, once asked to stop.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        environment: dict[str, str],
        time_s: float,
        answer_s: float = 60.0,
    ) -> None:
        self._left = [str(folder) for folder in folders]
        self._environment = environment
        self._time_s = time_s
        self._answer_s = answer_s
        self._failed: list[str] = []
        self._furthest_step = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def __call__(self) -> None:
        """Executes what is left.

        Raises:
            RunFailedError: At the end, where a run has failed.
        """
        while self._left:
            folder = RunFolder(Path(self._left[0]))
            # A failure that is there already is of an earlier start of this job: planning clears
            # away those of before. SLURM may start a job anew without telling it to save first.
            code = 0
            if not folder.is_finished and not folder.has_failed:
                code = self._attempt(folder)
            if not folder.is_finished and code != EXIT_HELD:
                cause = folder.failure_message or "stopped by a signal"
                self._failed.append(f"{folder.path.name}: {cause}")
            self._next()
        if self._failed:
            raise RunFailedError("; ".join(self._failed))

    def _next(self) -> None:
        del self._left[0]
        self._furthest_step = 0

    def _attempt(self, folder: RunFolder) -> int:
        self._started = time.monotonic()
        with folder.log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "sae_lora.run", str(folder.path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._environment,
            )
            try:
                code = self._child.wait()
                if -code in SIGNALS:  # asked to stop before it could listen: nothing was begun
                    code = EXIT_INTERRUPTED
            except KeyboardInterrupt:  # Ctrl-C, or the launcher's word: what runs saves and stops
                self._child.send_signal(STOP)
                raise
        ended = folder.is_finished or folder.has_failed or code in (EXIT_HELD, EXIT_INTERRUPTED)
        if not ended:
            said = _end_of(folder.log)
            folder.write_failure(how_it_ended(code, said), said)
        if code == EXIT_INTERRUPTED and not folder.is_finished:
            self._wait_for_the_end()
        return code

    def _wait_for_the_end(self) -> None:
        """The run was asked to stop, and this process was not.

        A preemption or a cancellation begins so. On SLURM its end comes here too, after a grace period
        that may be long, as a call of `checkpoint` or as a kill; to leave before would be to fail.
        """
        time.sleep(self._answer_s)
        while "SLURM_JOB_ID" in os.environ:
            time.sleep(60)

    def checkpoint(self, *_: Any, **__: Any) -> DelayedSubmission | None:
        """Called by submitit before it requeues the job: the run saves where it stands.

        Returns:
            What goes on later; `None` where nothing is left but a run that hangs, which another
            start would not mend.
        """
        answered = self._stop_child()
        self._child = None
        if self._left:
            folder = RunFolder(Path(self._left[0]))
            progress = folder.read_progress()
            step = progress.step if progress is not None else 0
            had_its_time = time.monotonic() - self._started > 0.8 * self._time_s
            if had_its_time and step <= self._furthest_step and not folder.is_finished:
                message = f"hangs after step {step}: no step in {self._time_s / 60:.3g} min" + (
                    "" if answered else ", and no answer when asked to stop"
                )
                folder.write_failure(message, _end_of(folder.log))
                self._failed.append(f"{folder.path.name}: {message}")
                self._next()
                if not self._left:
                    return None
            else:
                self._furthest_step = max(self._furthest_step, step)
        return DelayedSubmission(self)

    def _stop_child(self) -> bool:
        """Asks the run to save and stop; returns whether it did."""
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


def _has_ended(child: int) -> bool:
    """Whether the child process has ended.

    Asks the system: this runs in a signal handler, and the interrupted code may be inside
    `Popen.wait`, whose lock keeps `Popen` itself from seeing that the child ends.
    """
    try:
        found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the interrupted code has just taken notice of its end
        return True
    return found is not None


def how_it_ended(code: int, said: str = "") -> str:
    """What an exit code says of a process that wrote no failure down itself.

    Args:
        code: The exit code; negative where a signal ended it.
        said: The end of what it printed.
    """
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory, or killed by hand)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    if code == 1 and said.strip():  # Python's own: an exception that nobody caught, before the run began
        return f"ended with exit code 1: {said.strip().splitlines()[-1]}"
    return f"ended by itself with exit code {code} and without a word"


def _end_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")
