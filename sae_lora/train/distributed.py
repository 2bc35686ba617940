"""Processes that share the batches of a pack: a leader, and followers that do the tasks it broadcasts.

Each process has the model, SAEs and students, and computes its shard of every batch; gradients and
measurements are summed over all processes. Only the leader makes decisions and writes files. torch's
elastic agent starts and watches the processes (`run/together.py`).
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from sae_lora.common.errors import GoneError, is_out_of_memory

STORE, DIVIDES = "SAE_LORA_STORE", "SAE_LORA_DIVIDES"
"""Environment variables: the address of the store that all processes of a pack share; 1 if they divide
the model's weights among them."""
ASKED, LEADER, BEGINS, CODE = "asked", "leader", "begins", "code"
"""Keys of the store: set if a stop was requested; host and process id of the leader; 1 when the leader
needs the followers, 0 if it ends without them; the exit code of the leader."""
Rows = TypeVar("Rows", Tensor, Sequence[Any])
_START_S = 600
"""Time for all processes to connect; they load the model later."""
_PATIENCE = timedelta(days=7)
"""Timeout of collective operations: followers wait while the leader saves, evaluates or is suspended."""
_LOOK_EVERY_S = 1
_ASK_S = 5
"""Time in which a request to stop must be in the store after the leader has received its signal."""


class ProcessGroup:
    """The processes that train a pack. This class is a group of one process."""

    rank = 0
    """Rank of this process; the leader has rank 0."""
    size = 1
    """Number of processes."""

    def shard(self, rows: Rows) -> Rows:
        """The rows that this process works on."""
        return rows

    def broadcast(self, message: object) -> None:
        """Send a message to the others, which call `receive`. Only the leader calls this."""

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes. All processes must call this."""


class Distributed(ProcessGroup):
    """One of several processes, connected through torch.distributed.

    Args:
        rank: Place of this process.
        size: Number of processes.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def shard(self, rows: Rows) -> Rows:
        return rows[self.rank :: self.size]

    def broadcast(self, message: object) -> None:
        with _gone_if_alone():
            dist.broadcast_object_list([message], src=0, device=torch.device("cpu"))

    def receive(self) -> Any:
        """The next message of the leader; waits for it."""
        messages = [None]
        with _gone_if_alone():
            dist.broadcast_object_list(messages, src=0, device=torch.device("cpu"))
        return messages[0]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            of_dtype = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in of_dtype])
            with _gone_if_alone():
                dist.all_reduce(flat)
            sums = flat.split([tensor.numel() for tensor in of_dtype])
            for tensor, summed in zip(of_dtype, sums, strict=True):
                tensor.copy_(summed.view_as(tensor))


@dataclass(frozen=True)
class ProcessLayout:
    """Number of processes for a pack."""

    nodes: int = 1
    """Nodes of the SLURM job; 1 for only this machine."""
    per_node: int = 1
    divides: bool = False
    """True if they divide the model's weights among them."""

    @property
    def size(self) -> int:
        """Total number of processes."""
        return self.nodes * self.per_node


class Member:
    """This process as one of those that share the batches, by the variables that the agent sets."""

    def __init__(self) -> None:
        self.rank, self.size, self._on_node = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
        self.divides = os.environ[DIVIDES] == "1"
        """True if the processes divide the model's weights among them."""
        self._store = client(os.environ[STORE])
        self._parent = os.getppid()

    @property
    def leads(self) -> bool:
        """True for the process that decides and writes files."""
        return self.rank == 0

    def register(self) -> bool:
        """Tell who leads: from now on a signal asks this process to stop. Only the leader calls this.

        Returns:
            False if a stop was requested before.
        """
        threading.Thread(target=self._end_with_parent, daemon=True).start()
        with _gone_if_alone():
            self._store.set(LEADER, f"{socket.gethostname()} {os.getpid()}")
            return not self._store.check([ASKED])

    def is_asked_to_stop(self) -> bool:
        """True if the signal that this process has received was a request to stop.

        The agent sends one too if another process has ended.
        """
        if self._is_orphan:
            return False
        with suppress(RuntimeError):  # not in this time, or the store is gone
            self._store.wait([ASKED], timedelta(seconds=_ASK_S))
            return True
        return False

    def report(self, code: int) -> None:
        """Tell the exit code, and let followers end that were not needed. Only the leader calls this."""
        if self._is_orphan:
            return
        with _gone_if_alone():
            self._store.set(CODE, str(code))
            if not self._store.check([BEGINS]):
                self._store.set(BEGINS, "0")

    @contextmanager
    def leading(self, on_gpus: bool) -> Iterator[Distributed]:
        """Lead the others inside the block; after an error, they end because this process does.

        Args:
            on_gpus: True if each process computes on a GPU.
        """
        with _gone_if_alone():
            self._store.set(BEGINS, "1")
        processes = self._joined(on_gpus)
        yield processes
        processes.broadcast(None)
        dist.destroy_process_group()

    @contextmanager
    def following(self, on_gpus: bool) -> Iterator[Distributed | None]:
        """Join the leader; `None` if this process is not needed. `on_gpus` is as in `leading`."""
        if on_gpus:
            torch.cuda.set_device(self._on_node)
        with _gone_if_alone():
            self._store.wait([BEGINS], _PATIENCE)
            is_needed = self._store.get(BEGINS) == b"1"
        if not is_needed:
            yield None
            return
        yield self._joined(on_gpus)
        dist.destroy_process_group()

    @property
    def _is_orphan(self) -> bool:
        """True if the agent that has started this process is gone."""
        return os.getppid() != self._parent

    def _end_with_parent(self) -> None:
        """Ask this process to save and end once the agent is gone."""
        while not self._is_orphan:
            time.sleep(_LOOK_EVERY_S)
        os.kill(os.getpid(), signal.SIGTERM)

    def _joined(self, on_gpus: bool) -> Distributed:
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        store = PrefixStore("group", self._store)
        with _gone_if_alone():
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE
            )
        return Distributed(self.rank, self.size)


def member() -> Member | None:
    """This process as one of several; `None` if it trains alone.

    Raises:
        GoneError: If the process that has started it does not answer.
    """
    if STORE not in os.environ:
        return None
    with _gone_if_alone():
        return Member()


def client(address: str) -> TCPStore:
    """A connection to the store at `host:port`."""
    host, port = address.rsplit(":", 1)
    return TCPStore(host, int(port), None, False, timedelta(seconds=_START_S))


@contextmanager
def _gone_if_alone() -> Iterator[None]:
    """Turn torch's error about a lost connection into `GoneError`."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise GoneError("another process that shares the batches has ended") from error
