"""Processes that share the batches of a pack: one leads, the others follow it step by step.

Each has model, SAEs and students, and takes its part of every batch; gradients and measurements are
added up over all. The leader alone decides and writes, and sends the others each task.
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
"""Variables by which a follower finds the others; SLURM has a variable of its own for the rank."""
Rows = TypeVar("Rows", Tensor, Sequence[Any])
_Processes = Sequence[subprocess.Popen[bytes]]
_START_S = 600
"""Time for all processes to find each other; they load the model later."""
_PATIENCE = timedelta(days=7)
"""Followers wait while the leader saves, evaluates or is suspended."""
_LOOK_EVERY_S = 0.5
_NOTICE_S = 60
"""Time for the leader to notice the end of a follower by itself: it may have to end a step first."""
_END_S = 10
"""Time for followers to end by themselves."""


class GoneError(Exception):
    """Another of the processes has ended, and with it the work in common."""


class ProcessGroup:
    """The processes that train a pack, seen from one of them; this class is a group of one."""

    rank = 0
    """Place of this process in the group; the leader is the first, 0."""

    def shard(self, rows: Rows) -> Rows:
        """The rows that this process works on."""
        return rows

    def broadcast(self, message: object) -> None:
        """Sends a message to the others, who `receive` it. For the leader."""

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, which call this at the same time."""

    def release(self) -> None:
        """Lets the others end from now on. For the leader."""


class Distributed(ProcessGroup):
    """One of several processes, connected through torch.distributed.

    Args:
        rank: Place of this process.
        size: Number of processes.
        release: Called when the leader does not need the others any more.
    """

    def __init__(self, rank: int, size: int, release: Callable[[], None] = lambda: None) -> None:
        self.rank = rank
        self._size = size
        self._release = release

    def shard(self, rows: Rows) -> Rows:
        return rows[self.rank :: self._size]

    def broadcast(self, message: object) -> None:
        with self._in_touch():
            dist.broadcast_object_list([message], src=0, device=torch.device("cpu"))

    def receive(self) -> Any:
        """The next message of the leader; waits for it."""
        messages = [None]
        with self._in_touch():
            dist.broadcast_object_list(messages, src=0, device=torch.device("cpu"))
        return messages[0]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            together = torch.cat([tensor.flatten() for tensor in alike])
            with self._in_touch():
                dist.all_reduce(together)
            sums = together.split([tensor.numel() for tensor in alike])
            for tensor, summed in zip(alike, sums, strict=True):
                tensor.copy_(summed.view_as(tensor))

    def release(self) -> None:
        self._release()

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
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
    """Nodes of the SLURM job; 1 for this machine alone."""
    per_node: int = 1

    @property
    def size(self) -> int:
        """Number of processes in all."""
        return self.nodes * self.per_node


ONE_PROCESS = ProcessLayout()


@contextmanager
def leading(
    layout: ProcessLayout,
    arguments: Sequence[str],
    on_gpus: bool,
    asked_to_stop: Callable[[], bool],
) -> Iterator[ProcessGroup]:
    """Starts the other processes, and leads them inside the block.

    Args:
        layout: Number of processes.
        arguments: Arguments of `python -m sae_lora.run.worker`.
        on_gpus: Whether each computes on a GPU.
        asked_to_stop: Whether this process was asked to stop: then its end is no failure.

    Raises:
        GoneError: Where one of them ends too early. A leader that waits for ever, and so cannot notice,
            ends itself.
    """
    if layout.size == 1:
        yield ProcessGroup()
        return
    host = "127.0.0.1" if layout.nodes == 1 else socket.gethostname()
    patience = timedelta(seconds=_START_S)
    store = TCPStore(host, 0, layout.size, True, patience, wait_for_workers=False)
    command = [sys.executable, "-m", "sae_lora.common.lazy_imports", "sae_lora.run.worker", *arguments]
    variables = {_LEADER: f"{host}:{store.port}", _SIZE: str(layout.size)}
    followers, may_end = _started(layout, command, variables), threading.Event()
    watch = threading.Thread(target=_watch, args=(followers, may_end, asked_to_stop), daemon=True)
    watch.start()
    seconds_to_end = 0
    try:
        _meet(followers, store, layout.size)
        _join(store, 0, layout.size, on_gpus)
        processes = Distributed(0, layout.size, may_end.set)
        yield processes
        processes.release()
        processes.broadcast(None)
        dist.destroy_process_group()
        seconds_to_end = _END_S
    except GoneError as error:
        raise GoneError(_what_is_wrong(followers)) from error
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
    """Joins the leader that has started this process; yields `None` where this process is not needed.

    Beside a leader on the first node of a job, SLURM starts as many processes there as elsewhere.

    Args:
        on_gpus: Whether each computes on a GPU; this process then has its own in use.

    Raises:
        GoneError: Where there is no leader, or no longer.
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
        raise GoneError(f"nobody leads at {host}:{port}") from error
    _join(store, rank, size, on_gpus)
    yield Distributed(rank, size)
    dist.destroy_process_group()


def _arrival(rank: int) -> str:
    """Name that a follower sets in the store when it arrives."""
    return f"here/{rank}"


def _join(store: TCPStore, rank: int, size: int, on_gpus: bool) -> None:
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)


def _started(layout: ProcessLayout, command: Sequence[str], variables: Mapping[str, str]) -> _Processes:
    if layout.nodes == 1:
        with unheard():  # the leader heeds signals, and needs the others to end a step
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


def _meet(followers: _Processes, store: TCPStore, size: int) -> None:
    """Waits until all followers have arrived.

    Raises:
        GoneError: Where one has ended instead, or is too late.
    """
    deadline = time.monotonic() + _START_S
    while not store.check([_arrival(rank) for rank in range(1, size)]):
        if _exit_codes(followers) or time.monotonic() > deadline:
            raise GoneError("a process that shares the batches has not come")
        time.sleep(0.05)


def _exit_codes(followers: _Processes) -> list[int]:
    """Exit codes of the followers that have ended."""
    return [code for process in followers if (code := process.poll()) is not None]


def _what_is_wrong(followers: _Processes) -> str:
    """The exit code of a follower that has ended, as soon as that can be seen."""
    deadline = time.monotonic() + 4 * _LOOK_EVERY_S
    while not (codes := _exit_codes(followers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    how = f"exit code {codes[0]}" if codes else "it does not answer"
    return f"a process that shares the batches ({how})"


def _watch(followers: _Processes, may_end: threading.Event, asked_to_stop: Callable[[], bool]) -> None:
    """Ends all processes where a follower ends too early, so that the leader does not wait for ever."""
    while not may_end.wait(_LOOK_EVERY_S):
        # The main thread notices too, and saves checkpoints, unless it waits for ever (NCCL).
        if _exit_codes(followers) and not may_end.wait(_NOTICE_S):
            try:
                complain("ended", _what_is_wrong(followers))
                for process in followers:
                    process.kill()
            finally:
                os._exit(EXIT_INTERRUPTED if asked_to_stop() else EXIT_NOT_TOGETHER)
