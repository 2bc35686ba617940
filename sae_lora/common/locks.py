"""A run belongs to one process at a time, and is free again when that process ends, however it ends.

Nothing is needed but a file system that creates a file exclusively and says when one was last
touched; several machines may share it, and their clocks may differ.

.lease/00000007    the file with the largest number counts: who holds the run, or that nobody does.
                   Its holder touches it every few seconds; one that is not touched has no holder.

The library filelock does not do this: its `FileLock` needs a file server that passes locks on between
machines, and a lease of another machine can only be judged after watching it for as long as it lasts.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from sae_lora.common.errors import UserError
from sae_lora.common.files import write_atomically

RENEW_S = 10.0
"""Seconds between two touches."""
STALE_S = 90.0
"""Seconds without a touch after which the holder is taken for dead, where it cannot be asked."""


class HeldError(UserError):
    """Another process is at work on the run."""


class LostError(UserError):
    """The process did not touch its lease for so long that another has taken the run over."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a run, on this machine or another."""

    host: str
    pid: int
    machine: str
    """Tells machines and containers of one name apart: a process number means nothing elsewhere."""
    started: str
    """Start of the process, in its system's own count: process numbers are used again."""
    slurm_job: str | None = None
    slurm_restart: int = 0

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        pid, variables = os.getpid(), os.environ
        return cls(
            host=socket.gethostname(),
            pid=pid,
            machine=_machine(),
            started=_start_of(pid) or "",
            slurm_job=variables.get("SLURM_JOB_ID"),
            slurm_restart=int(variables.get("SLURM_RESTART_COUNT") or 0),
        )

    @property
    def is_alive(self) -> bool | None:
        """True while the process runs; `None` where that cannot be known from here."""
        here = Holder.here()
        if self.machine == here.machine:
            return _start_of(self.pid) == self.started
        if self.slurm_job is not None and self.slurm_job == here.slurm_job:
            # SLURM runs a job once at a time: what an earlier start of it left has been cut off.
            return False if self.slurm_restart < here.slurm_restart else None
        return None


class Lease:
    """The hold of this process on a run."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lost = False

    def check(self) -> None:
        """Make sure that the run is still held, before anything is written that counts.

        Raises:
            LostError: Where another process holds it now.
            UserError: Where its folder is gone.
        """
        if not self._file.parent.exists():
            raise UserError("the folder of this run has been deleted; it stops here")
        if self._lost or _newest(self._file.parent) != int(self._file.name):
            raise LostError(
                "another process has taken this run over, because this one gave no sign of life "
                f"for {STALE_S:g} s; it stops here"
            )

    def _renew_until(self, stop: threading.Event, every_s: float) -> None:
        while not stop.wait(every_s):
            try:
                os.utime(self._file)
            except FileNotFoundError:  # who takes a run over clears the old leases away
                self._lost = True
                return
            except OSError:  # a file server that is away for a moment; the next touch may succeed
                continue


@contextmanager
def held(folder: Path, renew_s: float = RENEW_S) -> Iterator[Lease]:
    """Hold the run of this folder inside the block.

    Args:
        folder: The run folder.
        renew_s: Seconds between two signs of life.

    Raises:
        HeldError: Where another process holds it.
    """
    file = _take(folder / ".lease")
    lease = Lease(file)
    stop = threading.Event()
    thread = threading.Thread(target=lease._renew_until, args=(stop, renew_s), daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join()
        if file.exists():
            write_atomically(file, "null")


def holder(folder: Path) -> Holder | None:
    """The process that holds the run of this folder now; `None` where nobody does."""
    return _look(folder / ".lease")[1]


def _look(leases: Path) -> tuple[int, Holder | None]:
    """The largest number, and its holder."""
    while number := _newest(leases):
        with contextlib.suppress(FileNotFoundError):  # taken over meanwhile: look again
            return number, _living(leases / f"{number:08d}")
    return 0, None


def _take(leases: Path) -> Path:
    leases.mkdir(parents=True, exist_ok=True)
    while True:
        number, other = _look(leases)
        if other is not None:
            raise HeldError(
                f"{leases.parent.name} is being run by another process "
                f"(number {other.pid} on {other.host})"
            )
        # The next number after the one that was found free: of all who found so, one can make it.
        file = leases / f"{number + 1:08d}"
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:  # somebody was quicker: see who it is
            continue
        with os.fdopen(descriptor, "w") as opened:
            json.dump(asdict(Holder.here()), opened)
            opened.flush()
            os.fsync(opened.fileno())
        for path in leases.iterdir():
            if path.name.isdigit() and int(path.name) <= number:
                path.unlink(missing_ok=True)
        return file


def _newest(leases: Path) -> int:
    """The largest number; 0 where there is none."""
    try:
        return max((int(path.name) for path in leases.iterdir() if path.name.isdigit()), default=0)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _living(file: Path) -> Holder | None:
    """The lease's holder, if it lives.

    Raises:
        FileNotFoundError: Where the lease has been cleared away.
    """
    touched = file.stat().st_mtime
    try:
        values = json.loads(file.read_text())
    except ValueError:  # just made, and not yet written
        values = {"host": "?", "pid": 0, "machine": "", "started": ""}
    if values is None:
        return None
    process = Holder(**values)
    alive = process.is_alive
    if alive is None:
        alive = _now(file.parent) - touched <= STALE_S
    return process if alive else None


def _now(folder: Path) -> float:
    """The time by the clock of the folder's file system, which touches are counted in."""
    probe = folder / f".now-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.write_text("")
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
    except OSError:  # who may only read the folder has to trust the clock of this machine
        return time.time()
    return now


def _start_of(pid: int) -> str | None:
    """Start of the process, in the kernel's ticks; `None` where it has ended."""
    if not Path("/proc/self/stat").exists():  # macOS: no more is known than whether it runs
        return "" if psutil.pid_exists(pid) else None
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] not in "ZX":
            return fields[19]
    return None


def _machine() -> str:
    """A name for what process numbers belong to: this start of this kernel, this container in it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)
