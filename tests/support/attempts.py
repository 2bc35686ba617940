"""An attempt at runs in a separate process, with a fault injected at a chosen step.

The processes are forked from a process that has imported everything, because imports take longer than a
small run.
"""

import contextlib
import importlib
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
from safetensors.torch import load_file

from sae_lora.launcher.plan import plan
from sae_lora.records.folder import RunFolder
from sae_lora.train.train_state import TrainState
from tests.support.composing import composed

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["sae_lora.run.execute", "sae_lora.run.together", "sae_lora.launcher.launch"]
)


@dataclass(frozen=True)
class Ended:
    """The result of an attempt."""

    returncode: int
    """Negative if a signal ended the process."""
    stdout: str
    stderr: str


def _end(main: Callable[[], int], paths: list[Path], *options: str) -> None:
    """Call `main` with these arguments and end the process with its exit code."""
    sys.argv = ["sae_lora.run.execute", *map(str, paths), *options]
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def redirect(*files: str) -> None:
    """Write stdout, or stdout and stderr, of this process into files."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def run_with_fault(
    paths: list[Path], step: int, what: str, largest_file: int | None, output: list[str]
) -> None:
    """Execute the runs in this process, with the fault as in `attempt`."""
    import torch

    from sae_lora.run import execute
    from sae_lora.train import checkpoint

    torch.set_num_threads(1)
    redirect(*output)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    take_step, save_file = TrainState.take_step, checkpoint.save_file
    injected = []

    def inject(training: TrainState | None) -> None:
        match what:
            case "exit":
                os._exit(17)
            case "raise":
                raise ZeroDivisionError("injected fault")
            case "memory":
                raise torch.OutOfMemoryError("no room")
            case "optimizer":
                assert training is not None
                move = training._optimizer.step  # pyright: ignore
                training._optimizer.step = lambda: (move(), torch.empty(10**16))  # pyright: ignore
            case "delete":
                shutil.rmtree(paths[0])
            case _:
                os.kill(os.getpid(), int(what))

    def stepping(training: TrainState, batch: torch.Size) -> None:
        if training.step == step - 1 and not injected:
            injected.append(training)
            inject(training)
        take_step(training, batch)

    def saving(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        if f"step-{-step:08d}" in str(path):
            inject(None)

    TrainState.take_step, checkpoint.save_file = stepping, saving
    _end(execute.main, paths)


def attempt(
    *folders: RunFolder,
    step: int = 0,
    what: str | int = "",
    after_s: float | None = None,
    largest_file: int | None = None,
) -> Ended:
    """Run `python -m sae_lora.run.execute` in a process and wait until it ends.

    Args:
        folders: The run folders.
        step: Step in which the fault is injected; negative: while the checkpoint of that step is
            written; 0: no fault.
        what: The fault. The number of a signal that the process sends itself; `exit`; in one run `raise`
            for an error, `memory` for an out-of-memory error, `optimizer` for an out-of-memory error at
            the end of an optimiser step; or `delete` to delete the folder of the first run.
        after_s: Seconds after which the process is killed.
        largest_file: Largest file that can be written, in bytes.
    """
    with tempfile.TemporaryDirectory() as home:
        output = [f"{home}/stdout", f"{home}/stderr"]
        paths = [folder.path for folder in folders]
        process = FORKS.Process(
            target=run_with_fault, args=(paths, step or 10**9, str(what), largest_file, output)
        )
        process.start()
        process.join(after_s or 600)
        if process.is_alive():
            process.kill()
        process.join()
        assert process.exitcode is not None
        said = [Path(file).read_text() if Path(file).exists() else "" for file in output]
        return Ended(process.exitcode, *said)


def _read_offline() -> None:
    """Apply `HF_HUB_OFFLINE`, which the libraries have read when they were imported."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        for library in ("huggingface_hub.constants", "datasets.config"):
            if library in sys.modules:
                sys.modules[library].HF_HUB_OFFLINE = True  # pyright: ignore


class ForkedModule:
    """A module of this package in a forked process, with the parts of `subprocess.Popen` that are used.

    Args:
        command: `python -m sae_lora.common.lazy_imports <module> …`.
        env: The environment variables of the process.
        stdout: File to which the module prints, with its errors; by default those of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: dict[str, str],
        stdout: IO[bytes] | None = None,
        stderr: int | None = None,
    ) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.clear()
            os.environ.update(env)
            _read_offline()
            if stdout is not None:
                assert stderr == subprocess.STDOUT
                for number in (1, 2):
                    os.dup2(stdout.fileno(), number)
            sys.argv = list(command[command.index("sae_lora.common.lazy_imports") + 1 :])
            code = 1
            try:
                code = importlib.import_module(sys.argv[0]).main()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """The exit code; `None` while the worker is alive."""
        if self._code is None:
            with contextlib.suppress(ChildProcessError):  # another thread has just collected it
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, timeout: float = 600) -> int:
        """Wait for the end; return the exit code."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("module", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


class Together:
    """A running attempt, with several processes that share the batches.

    Args:
        folders: The run folders.
        processes: Number of processes.
        forked: True if the processes are forked from the one that starts them. Real ones are new
            processes, whose imports take longer than a small run.
        shard: True if they divide the model's weights among them.
    """

    def __init__(
        self,
        folders: Sequence[RunFolder],
        processes: int,
        *,
        forked: bool = True,
        shard: bool = False,
    ) -> None:
        descriptor, self._output = tempfile.mkstemp()
        os.close(descriptor)
        paths = [folder.path for folder in folders]
        options = [f"--processes-per-node={processes}", *["--shard"] * shard]
        self._process = FORKS.Process(target=_leader, args=(paths, options, self._output, forked))
        self._process.start()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process that has started the others, as a job does."""
        psutil.Process(self._process.pid).send_signal(number)

    @property
    def members(self) -> list[psutil.Process]:
        """The processes that share the batches and are still alive, by rank: the leader is the first."""
        children = psutil.Process(self._process.pid).children()
        return sorted(children, key=lambda child: child.pid)

    @property
    def is_alive(self) -> bool:
        """True until the process that has started the others ends."""
        return self._process.is_alive()

    def kill(self) -> None:
        """Kill the process that has started the others."""
        self._process.kill()

    def ended(self) -> tuple[int, str]:
        """Wait until it ends; return its exit code and the output of all processes."""
        self._process.join(300)
        output = Path(self._output)
        text = output.read_text()
        assert self._process.exitcode is not None, text
        output.unlink()
        return self._process.exitcode, text


def _leader(paths: list[Path], options: list[str], output: str, forked: bool) -> None:
    from sae_lora.run import execute, together

    if forked:
        # torch's agent tells of forked processes through another logger than of real ones.
        logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)
        together.member_command = lambda folders: (_member, [output, *folders], "fork")
    redirect(output, output)
    _end(execute.main, paths, *options)


def _member(output: str, *folders: str) -> None:
    """A process that the agent has forked. The agent waits for its result after code 0."""
    from sae_lora.run import execute

    redirect(output, output)
    sys.argv = ["sae_lora.run.execute", *folders]
    code = execute.main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


def frozen(home: Path, *overrides: str) -> RunFolder:
    """The folder of a run of the embedded default when its job begins: it contains only the config."""
    folders = f"output_dir={home}", f"data.cache_dir={home}/cache"
    config = composed("tracking=disabled", *folders, *overrides)
    (planned,) = plan([config]).runs
    planned.freeze()
    return planned.folder


def killed(finished: Ended) -> bool:
    """True if the process was ended by SIGKILL."""
    return finished.returncode == -signal.SIGKILL


def results(folder: RunFolder) -> dict[str, object]:
    """The results of a run: its curve without times, and its trained weights."""
    curve = [
        {
            name: value
            for name, value in vars(point).items()
            if name not in ("train_seconds", "tokens_per_second", "peak_memory_gb")
        }
        for point in folder.read_curve()
    ]
    tensors = {
        f"{path.parent.relative_to(folder.path)}/{name}": value.tolist()
        for artifact in (folder.adapter, folder.sae, folder.output_adapter)
        for path in sorted(artifact.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }
    assert tensors
    return {"curve": curve} | tensors
