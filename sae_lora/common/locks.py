"""Leases: a folder belongs to one process at a time, and is free when that process ends or is killed.

A lease needs only a file system that creates files exclusively and records modification times. Several
machines may share it, and their clocks may differ.

.lease/00000007    Only the file with the largest number counts. It names the process that holds the
                   folder (a run or a sweep), or is `null` if the folder is free. The holder touches
                   the file every few seconds; a file that is not touched has no living holder.

The library filelock cannot replace this: across machines its `FileLock` works only if the file server
supports locks, and it cannot tell at once which process holds a lock.
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

LEASE = ".lease"
"""Folder of the leases, in the folder that they are for."""
RENEW_S = 10.0
"""Seconds between two touches of the lease file."""
STALE_S = 90.0
"""Seconds without a touch after which a holder counts as dead, if its process cannot be looked up."""


class HeldError(UserError):
    """Another process holds the run.

    Args:
        name: Name of the folder of the run.
        process: The process that holds it.
    """

    def __init__(self, name: str, process: "Holder") -> None:
        self.process = f"PID {process.pid} on {process.host}"
        super().__init__(f"{name} is being run by another process ({self.process})")


class LostError(UserError):
    """Another process took over the run, because this process did not touch its lease for too long."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a run, on this machine or another."""

    host: str
    pid: int
    machine: str
    """Identifies the machine and the container, also if names are equal: a PID is valid only there."""
    started: str
    """Start time of the process, in ticks of its kernel: the system reuses PIDs."""
    slurm_job: str | None = None
    slurm_restart: int = 0

    @classmethod
    def this_process(cls) -> "Holder":
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
        """True while the process runs; `None` if this process cannot know it."""
        current = Holder.this_process()
        if self.machine == current.machine:
            return _start_of(self.pid) == self.started
        if self.slurm_job is not None and self.slurm_job == current.slurm_job:
            # SLURM has ended the earlier start of a job before it starts the job again.
            return False if self.slurm_restart < current.slurm_restart else None
        return None


class Lease:
    """The hold of this process on a run."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lost = False

    def check(self) -> None:
        """Check that this process still holds the run; call it before results are written.

        Raises:
            LostError: If another process holds the run now.
            UserError: If the run folder was deleted.
        """
        if not self._file.parent.exists():
            raise UserError("the folder of this run has been deleted; the run stops")
        if self._lost or _newest(self._file.parent) != int(self._file.name):
            raise LostError(
                "another process has taken over this run, because this process did not renew its lease "
                f"for {STALE_S:g} s; this process leaves the run"
            )

    def _renew_until(self, stop: threading.Event, every_s: float) -> None:
        while not stop.wait(every_s):
            try:
                os.utime(self._file)
            except FileNotFoundError:  # a process that takes over a run deletes the old leases
                self._lost = True
                return
            except OSError:  # a short outage of the file server; the next touch may succeed
                continue


@contextmanager
def held(folder: Path, renew_s: float = RENEW_S) -> Iterator[Lease]:
    """Hold this folder, of a run or a sweep, inside the block.

    Args:
        folder: The run folder.
        renew_s: Seconds between two touches of the lease file.

    Raises:
        HeldError: If another process holds the run.
        UserError: If a file has the name of the folder of its leases.
    """
    file = _take(folder / LEASE)
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
    """The process that holds the run of this folder now; `None` if the run is free."""
    return _look(folder / LEASE)[1]


def _look(leases: Path) -> tuple[int, Holder | None]:
    """The largest lease number, and the living holder of this lease, if any."""
    while number := _newest(leases):
        with contextlib.suppress(FileNotFoundError):  # taken over in the meantime: look again
            return number, _living(leases / f"{number:08d}")
    return 0, None


def _take(leases: Path) -> Path:
    try:
        leases.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{leases} must be a folder, and is a file: delete it") from error
    while True:
        number, process = _look(leases)
        if process is not None:
            raise HeldError(leases.parent.name, process)
        # Several processes may see that this lease is free; only one of them can create the next file.
        file = leases / f"{number + 1:08d}"
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:  # another process was faster: find out which
            continue
        with os.fdopen(descriptor, "w") as stream:
            json.dump(asdict(Holder.this_process()), stream)
            stream.flush()
            os.fsync(stream.fileno())
        for path in leases.iterdir():
            if path.name.isdigit() and path.is_file() and int(path.name) <= number:
                path.unlink(missing_ok=True)
        return file


def _newest(leases: Path) -> int:
    """The largest lease number; 0 if there is no lease."""
    try:
        return max((int(path.name) for path in leases.iterdir() if path.name.isdigit()), default=0)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _living(file: Path) -> Holder | None:
    """The holder of the lease, if it is alive.

    Raises:
        FileNotFoundError: If the lease has been deleted.
    """
    if file.is_dir():  # nobody's lease; the next number is free
        return None
    touched = file.stat().st_mtime
    try:
        values = json.loads(file.read_text())
    except ValueError:  # created by its process and not written yet
        values = {"host": "?", "pid": 0, "machine": "", "started": ""}
    if values is None:
        return None
    process = Holder(**values)
    alive = process.is_alive
    if alive is None:
        alive = _now(file.parent) - touched <= STALE_S
    return process if alive else None


def _now(folder: Path) -> float:
    """The time by the clock of the folder's file system, which also sets the times of touches."""
    probe = folder / f".now-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.write_text("")
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
    except OSError:  # without write access, only the clock of this machine is available
        return time.time()
    return now


def _start_of(pid: int) -> str | None:
    """Start time of the process, in ticks of the kernel; `None` if the process has ended."""
    if not Path("/proc/self/stat").exists():  # macOS: only its existence is known, not its start
        return "" if psutil.pid_exists(pid) else None
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] not in "ZX":
            return fields[19]
    return None


def _machine() -> str:
    """An id for where PIDs are unique: this host, this boot of its kernel, this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)
