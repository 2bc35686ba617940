"""What submitit runs, on this machine or on a node: a pack of runs, which train together.

Every attempt at a pack is a child process, so that whatever ends it (an exit, a kill, too little
memory, a hang) ends nothing else. What ends a pack of several may be the doing of one, or of their
number: each half then goes on by itself, down to the one run whose doing it is, in whose folder it
is written down.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from submitit.helpers import DelayedSubmission

from sae_lora.common.errors import EXIT_HELD, EXIT_INTERRUPTED, EXIT_NOT_TOGETHER
from sae_lora.common.signals import SIGNALS
from sae_lora.evaluation.suite_records import pending
from sae_lora.records.folder import RunFolder

STOP = signal.SIGUSR2
"""Asks a run to save and stop."""
_TAIL_BYTES = 20_000
One = TypeVar("One")


class RunFailedError(Exception):
    """A run has failed: what submitit and SLURM are to know of it."""


@dataclass
class _Part:
    """Runs that are still together."""

    folders: list[RunFolder]
    furthest_step: int = 0
    """The most that they reached before a time limit, together or in a larger pack."""

    @property
    def unsettled(self) -> list[RunFolder]:
        """Those of which it is not known what becomes of them; a folder that is gone is left alone."""
        return [
            folder
            for folder in self.folders
            if folder.path.exists() and not folder.is_finished and not folder.has_failed
        ]


class Job:
    """A pack of runs, to be executed wherever submitit takes it.

    What is left of it survives in submitit's pickle when the job is preempted or out of time.

    Args:
        folders: The run folders, of runs that train together.
        environment: Variables for the runs, beside those of the job.
        time_s: Seconds that the job is given before it is asked to stop.
        answer_s: Seconds that a run may take to save where it stands, once asked to stop.
        options: Further ones of `python -m sae_lora.run.execute`.
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
        """Executes what is left.

        Raises:
            RunFailedError: At the end, where a run has failed.
        """
        while self._parts:
            # A failure that is there already is of an earlier start of this job: planning clears
            # away those of before. SLURM may start a job anew without telling it to save first.
            part = self._parts[0]
            to_do = part.unsettled
            code = self._attempt(to_do) if to_do else 0
            unsettled = part.unsettled
            if unsettled and code not in (EXIT_HELD, EXIT_INTERRUPTED):
                said = _end_of(to_do[0].log)
                if len(to_do) > 1:
                    self._split(how_it_ended(code, said))
                    continue
                unsettled[0].write_failure(how_it_ended(code, said), said)
            if code == EXIT_INTERRUPTED:
                self._stopped += [folder.path for folder in unsettled]
            del self._parts[0]
        self._evaluate()
        causes = [
            f"{folder.path.name}: {folder.failure_message or 'stopped by a signal'}"
            for folder in self._folders
            if not folder.is_finished and (folder.has_failed or folder.path in self._stopped)
        ]
        if causes:
            raise RunFailedError("; ".join(causes))

    def _evaluate(self) -> None:
        """Measures the finished runs as their configs ask; what cannot be measured fails no run."""
        left = [folder for folder in self._folders if folder.path.exists() and pending(folder)]
        if not left:
            return
        with left[0].log.open("ab") as log:
            self._child = self._begun(log, "sae_lora.run.evaluate", left)
            try:
                self._child.wait()
            except KeyboardInterrupt:
                self._child.kill()  # each suite that it has ended is kept
                raise

    def _begun(
        self, log: IO[bytes], module: str, folders: Sequence[RunFolder], *options: str
    ) -> subprocess.Popen[bytes]:
        """A child process that does what a module does with these runs, and prints into a log."""
        paths = [str(folder.path) for folder in folders]
        return subprocess.Popen(
            [sys.executable, "-m", "sae_lora.common.lazy_imports", module, *options, *paths],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | self._environment,
        )

    def _split(self, why: str) -> None:
        """Puts the halves of what is left of the first part in its place."""
        part = self._parts[0]
        parts = [_Part(half, part.furthest_step) for half in halves(part.unsettled)]
        for one in parts:
            number = len(one.folders)
            company = f"with {number} together" if number > 1 else "alone"
            note = f"with others: {why}; going on {company}\n"
            with one.folders[0].log.open("a") as log:
                log.write(note)
        self._parts[:1] = parts

    def _attempt(self, pack: Sequence[RunFolder]) -> int:
        self._started = time.monotonic()
        first, *others = pack
        for folder in others:
            with folder.log.open("a") as log:
                log.write(f"trains together with {first.path.name}, whose log says how\n")
        with first.log.open("ab") as log:
            self._child = self._begun(log, "sae_lora.run.execute", pack, *self._options)
            try:
                code = self._child.wait()
                if -code in SIGNALS:  # asked to stop before it could listen: nothing was begun
                    code = EXIT_INTERRUPTED
            except KeyboardInterrupt:  # Ctrl-C, or the launcher's word: what runs saves and stops
                self._child.send_signal(STOP)
                raise
        if code == EXIT_INTERRUPTED and self._parts[0].unsettled:
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
        if self._parts:
            part = self._parts[0]
            unsettled = part.unsettled
            progress = [folder.read_progress() for folder in unsettled]
            step = max((one.step for one in progress if one is not None), default=0)
            had_its_time = time.monotonic() - self._started > 0.8 * self._time_s
            if unsettled and had_its_time and step <= part.furthest_step:
                message = f"hangs after step {step}: no step in {self._time_s / 60:.3g} min" + (
                    "" if answered else ", and no answer when asked to stop"
                )
                if len(unsettled) > 1:
                    self._split(message)
                else:
                    unsettled[0].write_failure(message, _end_of(unsettled[0].log))
                    del self._parts[0]
                    if not self._parts:
                        return None
            else:
                part.furthest_step = max(part.furthest_step, step)
        return DelayedSubmission(self)

    def _stop_child(self) -> bool:
        """Asks what runs to save and stop; returns whether it did."""
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


def halves(pack: list[One]) -> list[list[One]]:
    """The two halves of a pack, without an empty one; the first is the larger."""
    half = (len(pack) + 1) // 2
    return [part for part in (pack[:half], pack[half:]) if part]


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
    if code == EXIT_NOT_TOGETHER:
        return said.strip().splitlines()[-1] if said.strip() else "they do not go together"
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory, or killed by hand)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    if code == 1 and said.strip():  # Python's own: an exception that nobody caught, before the run began
        return f"ended with exit code 1: {said.strip().splitlines()[-1]}"
    return f"ended by itself with exit code {code} and without a word"


def _end_of(log: Path) -> str:
    if not log.exists():  # somebody has deleted the run
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")
