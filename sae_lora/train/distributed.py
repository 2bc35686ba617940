"""Processes that share the batches of a pack: a leader, and followers that do the tasks it broadcasts.

Each process has the model, SAEs and students, and computes its shard of every batch; gradients and
measurements are summed over all processes. Only the leader makes decisions and writes files.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from sae_lora.common.console import complain
from sae_lora.common.errors import EXIT_INTERRUPTED, EXIT_NOT_TOGETHER, is_out_of_memory
from sae_lora.common.signals import unheard

_LEADER, _SIZE, _RANK = "SAE_LORA_LEADER", "SAE_LORA_PROCESSES", "SAE_LORA_RANK"
"""Environment variables that tell a follower the address of the leader, the number of processes, and its
rank; under SLURM the rank comes from SLURM's variable."""
Rows = TypeVar("Rows", Tensor, Sequence[Any])
_Processes = Sequence[subprocess.Popen[bytes]]
_START_S = 600
"""Time for all processes to connect; they load the model later."""
_PATIENCE = timedelta(days=7)
"""Timeout of collective operations: followers wait while the leader saves, evaluates or is suspended."""
_LOOK_EVERY_S = 0.5
_NOTICE_S = 60
"""Time for the leader's main thread to notice that a follower has ended: it may first finish a step."""
_END_S = 10
"""Time for followers to exit before they are killed."""


class GoneError(Exception):
    """Another process has ended, so that the processes cannot continue together."""


class ProcessGroup:
    """The processes that train a pack. This class is a group of one process."""

    rank = 0
    """Rank of this process; the leader has rank 0."""

    def shard(self, rows: Rows) -> Rows:
        """The rows that this process works on."""
        return rows

    def broadcast(self, message: object) -> None:
        """Send a message to the others, which call `receive`. Only the leader calls this."""

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes. All processes must call this."""

    def release(self) -> None:
        """Allow the others to end from now on. Only the leader calls this."""


class Distributed(ProcessGroup):
    """One of several processes, connected through torch.distributed.

    Args:
        rank: Place of this process.
        size: Number of processes.
        release: Called when the leader no longer needs the others.
    """

    def __init__(self, rank: int, size: int, release: Callable[[], None] = lambda: None) -> None:
        self.rank = rank
        self._size = size
        self._release = release

    def shard(self, rows: Rows) -> Rows:
        return rows[self.rank :: self._size]

    def broadcast(self, message: object) -> None:
        with self._connected():
            dist.broadcast_object_list([message], src=0, device=torch.device("cpu"))

    def receive(self) -> Any:
        """The next message of the leader; waits for it."""
        messages = [None]
        with self._connected():
            dist.broadcast_object_list(messages, src=0, device=torch.device("cpu"))
        return messages[0]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            of_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in of_dtype])
            with self._connected():
                dist.all_reduce(flat)
            sums = flat.split([tensor.numel() for tensor in of_dtype])
            for tensor, summed in zip(of_dtype, sums, strict=True):
                tensor.copy_(summed.view_as(tensor))

    def release(self) -> None:
        self._release()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise GoneError("another process that shares the batches has ended") from error


@dataclass(frozen=True)
class ProcessLayout:
    """Number of processes for a pack."""

    nodes: int = 1
    """Nodes of the SLURM job; 1 for only this machine."""
    per_node: int = 1

    @property
    def size(self) -> int:
        """Total number of processes."""
        return self.nodes * self.per_node


ONE_PROCESS = ProcessLayout()


@contextmanager
def leading(
    layout: ProcessLayout,
    arguments: Sequence[str],
    on_gpus: bool,
    asked_to_stop: Callable[[], bool],
) -> Iterator[ProcessGroup]:
    """Start the other processes, and lead them inside the block.

    Args:
        layout: Number of processes.
        arguments: Arguments of `python -m sae_lora.run.worker`.
        on_gpus: True if each process computes on a GPU.
        asked_to_stop: True if this process was asked to stop; then its end is not a failure.

    Raises:
        GoneError: If another process ends too early. If this process hangs in a collective operation and
            cannot notice that, a thread ends it.
    """
    if layout.size == 1:
        yield ProcessGroup()
        return
    host = "127.0.0.1" if layout.nodes == 1 else socket.gethostname()
    patience = timedelta(seconds=_START_S)
    store = TCPStore(host, 0, layout.size, True, patience, wait_for_workers=False)
    command = [sys.executable, "-m", "sae_lora.common.lazy_imports", "sae_lora.run.worker", *arguments]
    variables = {_LEADER: f"{host}:{store.port}", _SIZE: str(layout.size)}
    followers, may_end = _start_followers(layout, command, variables), threading.Event()
    watch = threading.Thread(
        target=_watch_followers, args=(followers, may_end, asked_to_stop), daemon=True
    )
    watch.start()
    seconds_to_end = 0
    try:
        _wait_for_followers(followers, store, layout.size)
        _join(store, 0, layout.size, on_gpus)
        processes = Distributed(0, layout.size, may_end.set)
        yield processes
        processes.release()
        processes.broadcast(None)
        dist.destroy_process_group()
        seconds_to_end = _END_S
    except GoneError as error:
        raise GoneError(_failure(followers)) from error
    finally:
        may_end.set()
        for process in followers:
            try:
                process.wait(seconds_to_end)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def following(on_gpus: bool) -> Iterator[Distributed | None]:
    """Connect to the leader that started this process; yield `None` if this process is not needed.

    SLURM starts the same number of processes on every node. On the first node one of them is not needed,
    because the leader runs there already.

    Args:
        on_gpus: True if each process computes on a GPU; this process then uses the GPU of its local
            rank.

    Raises:
        GoneError: If the leader does not answer.
    """
    size = int(os.environ[_SIZE])
    if _RANK in os.environ:
        rank = on_node = int(os.environ[_RANK])
    else:  # started by srun
        rank, on_node = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_LOCALID"])
    if rank == 0:
        yield None
        return
    if on_gpus:
        torch.cuda.set_device(on_node)
    host, port = os.environ[_LEADER].rsplit(":", 1)
    try:
        store = TCPStore(host, int(port), size, False, timedelta(seconds=_START_S))
        store.set(_arrival(rank), "")
    except RuntimeError as error:
        raise GoneError(f"no leader answers at {host}:{port}") from error
    _join(store, rank, size, on_gpus)
    yield Distributed(rank, size)
    dist.destroy_process_group()


def _arrival(rank: int) -> str:
    """The key that a follower sets in the store when it has started."""
    return f"here/{rank}"


def _join(store: TCPStore, rank: int, size: int, on_gpus: bool) -> None:
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)


def _start_followers(
    layout: ProcessLayout, command: Sequence[str], variables: Mapping[str, str]
) -> _Processes:
    if layout.nodes == 1:
        with unheard():  # only the leader handles signals; it needs the followers to finish a step
            return [
                subprocess.Popen(command, env={**os.environ, **variables, _RANK: str(rank)})
                for rank in range(1, layout.size)
            ]
    step = [
        *("--overlap", "--overcommit", "--cpu-bind=none", "--mem=0"),
        *("--kill-on-bad-exit=1", "--wait=0"),
        *(f"--nodes={layout.nodes}", f"--ntasks-per-node={layout.per_node}", f"--ntasks={layout.size}"),
    ]
    srun = shutil.which("srun") or "srun"
    return [subprocess.Popen([srun, *step, *command], env=os.environ | variables)]


def _wait_for_followers(followers: _Processes, store: TCPStore, size: int) -> None:
    """Wait until all followers have started.

    Raises:
        GoneError: If a follower ends instead, or does not start in time.
    """
    deadline = time.monotonic() + _START_S
    while not store.check([_arrival(rank) for rank in range(1, size)]):
        if _exit_codes(followers) or time.monotonic() > deadline:
            raise GoneError("a process that shares the batches did not start")
        time.sleep(0.05)


def _exit_codes(followers: _Processes) -> list[int]:
    """Exit codes of the followers that have ended."""
    return [code for process in followers if (code := process.poll()) is not None]


def _failure(followers: _Processes) -> str:
    """The message about a follower that has ended, with its exit code. Waits shortly for the code."""
    deadline = time.monotonic() + 4 * _LOOK_EVERY_S
    while not (codes := _exit_codes(followers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    reason = f"exit code {codes[0]}" if codes else "it does not answer"
    return f"a process that shares the batches ({reason})"


def _watch_followers(
    followers: _Processes, may_end: threading.Event, asked_to_stop: Callable[[], bool]
) -> None:
    """End all processes if a follower ends too early, so that the leader does not wait for ever."""
    while not may_end.wait(_LOOK_EVERY_S):
        # The main thread also notices, and saves checkpoints, unless it hangs (NCCL).
        if _exit_codes(followers) and not may_end.wait(_NOTICE_S):
            try:
                complain("ended", _failure(followers))
                for process in followers:
                    process.kill()
            finally:
                os._exit(EXIT_INTERRUPTED if asked_to_stop() else EXIT_NOT_TOGETHER)
