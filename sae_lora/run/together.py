"""Several processes for one pack, started and watched by torch's elastic agent, the core of torchrun.

The process that a job starts has the store in which all processes meet, and the agent of its node; with
several nodes it starts an agent on each through srun. It forwards a request to stop to the leader. If a
process ends too early, the agent ends the others; the leader notices that by itself, and saves.

    python -m sae_lora.run.together --store HOST:PORT --nodes N --processes-per-node M FOLDER …
"""

import argparse
import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sae_lora.common.console import complain
from sae_lora.common.errors import EXIT_FAILED, EXIT_HELD, EXIT_INTERRUPTED, EXIT_NOT_TOGETHER
from sae_lora.common.signals import SIGNALS, handling
from sae_lora.train.distributed import ASKED, CODE, DIVIDES, LEADER, STORE, ProcessLayout, client

_STOP = SIGNALS[0]
_LOOK_EVERY_S = 0.5
_MEET_S = 600
"""Time for the agents of all nodes to meet."""
MEMBER = "sae_lora.run.execute"
"""The module that each process runs."""
_OWN_CODES = (EXIT_FAILED, EXIT_HELD, EXIT_NOT_TOGETHER, EXIT_INTERRUPTED)
"""Exit codes of processes that have said why they end, or that follow others."""


def start(layout: ProcessLayout, folders: Sequence[str]) -> int:
    """Train the runs in these folders in several processes.

    Returns:
        The exit code of the leader; `EXIT_NOT_TOGETHER` if a process ended too early.
    """
    host = "127.0.0.1" if layout.nodes == 1 else socket.gethostname()
    store = TCPStore(host, 0, None, True, wait_for_workers=False)
    node = _Node(f"{host}:{store.port}", layout, folders)
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        store.set(ASKED, "")  # before the signal, because the leader looks for it
        send_stop()

    if layout.nodes == 1:
        send_stop = node.stop_leader
        with handling(SIGNALS, ask):
            failure = node.run()
    else:
        agents = subprocess.Popen(_srun(layout, node), start_new_session=True)
        send_stop = lambda: agents.send_signal(_STOP)  # noqa: E731  srun passes it on to the agents
        with handling(SIGNALS, ask):
            failure = "" if agents.wait() else None
    code = int(store.get(CODE)) if store.check([CODE]) else None
    if code is None and asked:
        return EXIT_INTERRUPTED
    if failure and code in (None, EXIT_NOT_TOGETHER):
        complain("ended", failure)
    return EXIT_NOT_TOGETHER if code is None else code


def _srun(layout: ProcessLayout, node: "_Node") -> list[str]:
    step = [
        *("--overlap", "--overcommit", "--cpu-bind=none", "--mem=0"),
        *("--kill-on-bad-exit=1", "--wait=0"),
        *(f"--nodes={layout.nodes}", "--ntasks-per-node=1", f"--ntasks={layout.nodes}"),
    ]
    python = [sys.executable, "-m", "sae_lora.common.lazy_imports", "sae_lora.run.together"]
    return [shutil.which("srun") or "srun", *step, *python, *node.options]


class _Node:
    """The agent of one node.

    Args:
        address: Address of the store, `host:port`.
        layout: Number of processes.
        folders: The run folders.
    """

    def __init__(self, address: str, layout: ProcessLayout, folders: Sequence[str]) -> None:
        self._address = address
        self._layout = layout
        self._folders = folders

    @property
    def options(self) -> list[str]:
        """The options of this module for the agent of another node."""
        nodes, per_node = self._layout.nodes, self._layout.per_node
        numbers = [f"--nodes={nodes}", f"--processes-per-node={per_node}"]
        shard = ["--shard"] * self._layout.divides
        return [f"--store={self._address}", *numbers, *shard, *self._folders]

    def run(self) -> str | None:
        """Start the processes of this node, and wait until all have ended.

        The agent is in a thread, because it would handle signals in its own way.

        Returns:
            The failure; empty if the failed process has told it, `None` if there is none.
        """
        failure: list[str | None] = ["the processes that share the batches did not start"]
        thread = threading.Thread(target=lambda: failure.__setitem__(0, self._agent()), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK_EVERY_S)  # signals are handled between two looks
        return failure[0]

    def stop_leader(self) -> None:
        """Send the request to stop to the leader, if it is on this node and has started."""
        store = client(self._address)
        if not store.check([LEADER]):
            return
        host, number = store.get(LEADER).decode().split()
        if host == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), _STOP)

    def _agent(self) -> str | None:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        entry, arguments, method = member_command(self._folders)
        with TemporaryDirectory() as logs:
            config = LaunchConfig(
                min_nodes=self._layout.nodes,
                max_nodes=self._layout.nodes,
                nproc_per_node=self._layout.per_node,
                run_id="pack",
                rdzv_backend="c10d",
                rdzv_endpoint=self._address,
                rdzv_configs={"is_host": False, "timeout": _MEET_S},
                max_restarts=0,
                start_method=method,
                local_addr=None if self._layout.nodes > 1 else "127.0.0.1",
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            os.environ |= {STORE: self._address, DIVIDES: str(int(self._layout.divides))}
            try:
                elastic_launch(config, entry)(*arguments)
            except ChildFailedError as error:
                codes = [failure.exitcode for failure in error.failures.values()]
                killed = [code for code in codes if code not in _OWN_CODES]
                return f"a process that shares the batches (exit code {killed[0]})" if killed else ""
            except Exception as error:  # of the store or the rendezvous: torch has no common class
                return f"the processes that share the batches cannot meet: {error}"
        return None


def member_command(folders: Sequence[str]) -> tuple[str | Callable[..., Any], list[str], str]:
    """The program of each process, its arguments, and the way in which it is started."""
    return sys.executable, ["-m", "sae_lora.common.lazy_imports", MEMBER, *folders], "spawn"


def main() -> int:
    """Run the agent of one node; the process that has started it has the store."""
    parser = argparse.ArgumentParser(prog="python -m sae_lora.run.together", description=main.__doc__)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--store", required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--processes-per-node", type=int, required=True)
    parser.add_argument("--shard", action="store_true")
    given = parser.parse_args()
    layout = ProcessLayout(given.nodes, given.processes_per_node, given.shard)
    node = _Node(given.store, layout, given.folders)
    with handling(SIGNALS, lambda number, frame: node.stop_leader()):
        failure = node.run()
    if failure:
        complain("ended", failure)
    return 0 if failure is None else EXIT_NOT_TOGETHER


if __name__ == "__main__":
    sys.exit(main())
