"""Processes that share the batches of a pack: one leads, the others follow it step by step.

Each has model, SAEs and students, and takes its part of every batch; gradients and what is measured are
added up over all. The leader alone decides and writes, and tells the others what comes next.
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
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from sae_lora.common.console import complain
from sae_lora.common.errors import EXIT_INTERRUPTED, EXIT_NOT_TOGETHER, is_out_of_memory
from sae_lora.common.signals import unheard

_LEADER, _SIZE, _RANK = "SAE_LORA_LEADER", "SAE_LORA_PROCESSES", "SAE_LORA_RANK"
"""Variables by which a follower finds the others; SLURM says itself which one it has started."""
Rows = TypeVar("Rows", Tensor, Sequence[Any])
_START_S = 600
"""Until all have found each other; loading the model comes after."""
_PATIENCE = timedelta(days=7)
"""Followers wait while the leader saves, evaluates or is suspended."""
_LOOK_EVERY_S = 0.5
_NOTICE_S = 60
"""Until the leader has noticed by itself that another has ended: it may have a step to do first."""
_END_S = 10
"""Until followers that were told to end are ended."""


class GoneError(Exception):
    """Another of the processes has ended, and with it what they have in common."""


class ProcessGroup(Protocol):
    """The processes that train a pack, seen from one of them."""

    @property
    def rank(self) -> int:
        """Which one it is; the leader is the first, 0."""
        ...

    def shard(self, rows: Rows) -> Rows:
        """Of what is shared, what this process is to do."""
        ...

    def broadcast(self, what: object) -> None:
        """Sends it to the others, who `receive` it. For the leader."""
        ...

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, who call it at the same time."""
        ...

    def release(self) -> None:
        """From now on it makes no difference whether the others end. For the leader."""
        ...


class SingleProcess:
    """One process that does everything."""

    rank = 0

    def shard(self, rows: Rows) -> Rows:
        """All of it."""
        return rows

    def broadcast(self, what: object) -> None:
        """There is nobody to tell."""

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """They are the sum."""

    def release(self) -> None:
        """There is nobody to let go."""


class Distributed:
    """One of several processes, which have found each other through torch.distributed.

    Args:
        rank: Which.
        size: How many there are.
        release: What the leader is to do when it needs the others no more.
    """

    def __init__(self, rank: int, size: int, release: Callable[[], None] = lambda: None) -> None:
        self.rank = rank
        self._size = size
        self._release = release

    def shard(self, rows: Rows) -> Rows:
        """Every so many-th."""
        return rows[self.rank :: self._size]

    def broadcast(self, what: object) -> None:
        """Sends it to all others."""
        with self._in_touch():
            dist.broadcast_object_list([what], src=0, device=torch.device("cpu"))

    def receive(self) -> Any:
        """What the leader tells next; waits for it."""
        told = [None]
        with self._in_touch():
            dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        return told[0]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Adds up all tensors of a precision in one go."""
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            together = torch.cat([tensor.flatten() for tensor in alike])
            with self._in_touch():
                dist.all_reduce(together)
            sums = together.split([tensor.numel() for tensor in alike])
            for tensor, found in zip(alike, sums, strict=True):
                tensor.copy_(found.view_as(tensor))

    def release(self) -> None:
        """From now on it makes no difference whether the others end."""
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
    """How many processes there are to be."""

    nodes: int = 1
    """Nodes of the SLURM job; 1 for this machine alone."""
    per_node: int = 1

    @property
    def size(self) -> int:
        """In all."""
        return self.nodes * self.per_node


ONE_PROCESS = ProcessLayout()


@contextmanager
def leading(
    layout: ProcessLayout,
    arguments: Sequence[str],
    on_gpus: bool = False,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Iterator[ProcessGroup]:
    """Has the others there inside the block, this process being the first.

    Args:
        layout: How many.
        arguments: Of `python -m sae_lora.run.worker`.
        on_gpus: Whether each computes on a GPU.
        asked_to_stop: Whether this process has been; then what ends with it has not failed.

    Raises:
        GoneError: Where one of them ends too early. Where this process does not notice, because it
            waits for ever, it ends.
    """
    if layout.size == 1:
        yield SingleProcess()
        return
    host = "127.0.0.1" if layout.nodes == 1 else socket.gethostname()
    patience = timedelta(seconds=_START_S)
    store = TCPStore(host, 0, layout.size, True, patience, wait_for_workers=False)
    command = [sys.executable, "-m", "sae_lora.common.lazy_imports", "sae_lora.run.worker", *arguments]
    found = {_LEADER: f"{host}:{store.port}", _SIZE: str(layout.size)}
    with _Followers(_started(layout, command, found), asked_to_stop) as followers:
        try:
            followers.meet(store, layout.size)
            _join(store, 0, layout.size, on_gpus)
            processes = Distributed(0, layout.size, followers.may_end)
            yield processes
            processes.release()
            processes.broadcast(None)
            dist.destroy_process_group()
        except GoneError as error:
            raise GoneError(followers.what_is_wrong()) from error


@contextmanager
def following(on_gpus: bool) -> Iterator[Distributed | None]:
    """Finds the leader who has started this process; `None` where it is not needed after all.

    Beside a leader on the first node of a job, SLURM starts as many processes there as elsewhere.

    Args:
        on_gpus: Whether each computes on a GPU; this process then has its own in use.

    Raises:
        GoneError: Where the leader is not there, or no longer.
    """
    here, size = os.environ, int(os.environ[_SIZE])
    rank = on_node = here.get(_RANK)
    if rank is None or on_node is None:  # started by srun
        rank, on_node = here["SLURM_PROCID"], here["SLURM_LOCALID"]
    if int(rank) == 0:
        yield None
        return
    if on_gpus:
        torch.cuda.set_device(int(on_node))
    host, port = here[_LEADER].rsplit(":", 1)
    try:
        store = TCPStore(host, int(port), size, False, timedelta(seconds=_START_S))
        store.set(_here(int(rank)), "")
    except RuntimeError as error:
        raise GoneError(f"nobody leads at {host}:{port}") from error
    _join(store, int(rank), size, on_gpus)
    yield Distributed(int(rank), size)
    dist.destroy_process_group()


def _here(rank: int) -> str:
    """What a follower sets to say that it has come."""
    return f"here/{rank}"


def _join(store: TCPStore, rank: int, size: int, on_gpus: bool) -> None:
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)


def _started(
    layout: ProcessLayout, command: Sequence[str], found: Mapping[str, str]
) -> list[subprocess.Popen[bytes]]:
    if layout.nodes == 1:
        with unheard():  # the leader heeds signals, and needs the others to end a step
            return [
                subprocess.Popen(command, env={**os.environ, **found, _RANK: str(rank)})
                for rank in range(1, layout.size)
            ]
    step = [
        *("--overlap", "--overcommit", "--cpu-bind=none", "--mem=0"),
        *("--kill-on-bad-exit=1", "--wait=0"),
        *(f"--nodes={layout.nodes}", f"--ntasks-per-node={layout.per_node}", f"--ntasks={layout.size}"),
    ]
    return [subprocess.Popen([shutil.which("srun") or "srun", *step, *command], env=os.environ | found)]


class _Followers:
    """Processes that live no longer than the block, and that this process does not outlive inside."""

    def __init__(
        self, processes: Sequence[subprocess.Popen[bytes]], asked_to_stop: Callable[[], bool]
    ) -> None:
        self._processes = processes
        self._asked_to_stop = asked_to_stop
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "_Followers":
        self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        for process in self._processes:
            try:
                process.wait(_END_S if kind is None else 0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def may_end(self) -> None:
        """From now on it makes no difference whether they do."""
        self._over.set()

    def meet(self, store: TCPStore, size: int) -> None:
        """Waits until all have come.

        Raises:
            GoneError: Where one has ended instead, or is too late.
        """
        deadline = time.monotonic() + _START_S
        while not store.check([_here(rank) for rank in range(1, size)]):
            if self._codes or time.monotonic() > deadline:
                raise GoneError("a process that shares the batches has not come")
            time.sleep(0.05)

    def what_is_wrong(self) -> str:
        """Which of them has ended, as soon as that can be seen."""
        deadline = time.monotonic() + 4 * _LOOK_EVERY_S
        while not self._codes and time.monotonic() < deadline:
            time.sleep(0.05)
        how = f"exit code {self._codes[0]}" if self._codes else "it does not answer"
        return f"a process that shares the batches ({how})"

    @property
    def _codes(self) -> list[int]:
        """The exit codes of those that have ended."""
        return [code for process in self._processes if (code := process.poll()) is not None]

    def _look(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            # The main thread notices too, and saves what there is, unless it waits for ever (NCCL).
            if self._codes and not self._over.wait(_NOTICE_S):
                try:
                    complain("ended", self.what_is_wrong())
                    for process in self._processes:
                        process.kill()
                finally:
                    os._exit(EXIT_INTERRUPTED if self._asked_to_stop() else EXIT_NOT_TOGETHER)
