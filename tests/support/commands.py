"""The command `python launch.py …`.

`python -m tests.support.commands` runs several of them; `launch_each` calls it.
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import pytest

REPOSITORY = Path(__file__).parents[2]


def launch(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run the command offline and return its output.

    Args:
        arguments: Overrides and options.
        environment: Environment variables to set, or to remove (`None`).
    """
    return _run(["launch.py", *arguments], environment)


def launch_each(
    *commands: Sequence[str], **environment: str | None
) -> list[subprocess.CompletedProcess[str]]:
    """Run the commands, given by their arguments, one after the other in one new process.

    Their jobs are forked. That saves the seconds that processes take to import torch.
    `environment` is as in `launch`.
    """
    finished = _run(["-m", "tests.support.commands"], environment, json.dumps(commands))
    assert finished.returncode == 0, finished.stderr
    return [subprocess.CompletedProcess(*result) for result in json.loads(finished.stdout)]


def _run(
    arguments: Sequence[str], environment: Mapping[str, str | None], given: str | None = None
) -> subprocess.CompletedProcess[str]:
    changed = os.environ | {"COLUMNS": "160", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={name: value for name, value in changed.items() if value is not None},
        input=given,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def launch_in_this_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which saves the seconds that a new process takes to start."""
    with (
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


def main() -> None:
    """Run the commands that stdin lists as JSON; print arguments, exit codes and output as JSON."""
    from tests.support.forked_jobs import forked_jobs

    with forked_jobs():
        results = [launch_in_this_process(*arguments) for arguments in json.load(sys.stdin)]
    print(json.dumps([(each.args, each.returncode, each.stdout, each.stderr) for each in results]))


if __name__ == "__main__":
    main()
