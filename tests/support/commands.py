"""The command `python launch.py …`.

`python -m tests.support.commands` runs several of them; `session` starts it.
"""

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

REPOSITORY = Path(__file__).parents[2]


def launch(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run the command offline and return its output.

    Args:
        arguments: Overrides and options.
        environment: Environment variables to set, or to remove (`None`).
    """
    return subprocess.run(
        [sys.executable, "launch.py", *arguments],
        cwd=REPOSITORY,
        env=_changed(environment),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


class Session:
    """A process that runs commands one after the other, with the same caches.

    Commands and their jobs are forked from a process that has imported everything, because imports take
    longer than a small run.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def launch(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command with these overrides and options."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return subprocess.CompletedProcess(*json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def session(**environment: str | None) -> Iterator[Session]:
    """A session inside the block; `environment` is as in `launch`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.commands"],
        cwd=REPOSITORY,
        env=_changed(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Session(process)


def _changed(environment: Mapping[str, str | None]) -> dict[str, str]:
    changed = os.environ | {"COLUMNS": "160", "HF_HUB_OFFLINE": "1"} | environment
    return {name: value for name, value in changed.items() if value is not None}


_checked: dict[str, list[str]] = {}
"""Results of checks of the included text. A dry run cuts it into tokens, which takes a second."""


@contextlib.contextmanager
def _text_checked_once() -> Iterator[None]:
    """Inside the block, the included text is not checked again for the same request."""
    from sae_lora.data import corpus

    check = corpus.check

    def check_once(config: Any, tokenizer: Any, *numbers: int) -> list[str]:
        if config.source is not corpus.TextSource.stdlib or tokenizer is None:
            return check(config, tokenizer, *numbers)
        key = repr((replace(config, cache_dir=""), tokenizer.name_or_path, numbers))
        if key not in _checked:
            _checked[key] = check(config, tokenizer, *numbers)
        return _checked[key]

    with mock.patch.object(corpus, "check", check_once):
        yield


def launch_in_this_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which saves the seconds that a new process takes to start."""
    with (
        _text_checked_once(),
        contextlib.chdir(REPOSITORY),
        mock.patch.dict(os.environ, {"COLUMNS": "160"}),
        mock.patch("sys.argv", ["launch.py", *arguments]),
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_path("launch.py", run_name="__main__")
    assert isinstance(ended.value.code, int)
    return subprocess.CompletedProcess(arguments, ended.value.code, stdout.getvalue(), stderr.getvalue())


def _launch_forked(arguments: Sequence[str], answer: Connection) -> None:
    """Run the command in this forked process; its jobs are forked from the same process."""
    from tests.support.forked_jobs import forked_jobs

    # Without this, a process that is itself forked would start another process to fork from.
    reached = mock.patch.object(
        forkserver._forkserver, "ensure_running", resource_tracker.ensure_running
    )  # pyright: ignore
    with reached, forked_jobs():
        ended = launch_in_this_process(*arguments)
    answer.send((ended.args, ended.returncode, ended.stdout, ended.stderr))


def main() -> None:
    """Run the commands that the lines of stdin give as JSON; print how each ended, as JSON."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.support.imported"])
    for line in sys.stdin:
        ended, answer = forks.Pipe(duplex=False)
        command = forks.Process(target=_launch_forked, args=(json.loads(line), answer))
        command.start()
        answer.close()
        print(json.dumps(ended.recv()), flush=True)
        command.join()


if __name__ == "__main__":
    main()
