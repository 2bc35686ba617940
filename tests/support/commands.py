"""The command `python launch.py …`."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
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
    changed = os.environ | {"COLUMNS": "160", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        [sys.executable, "launch.py", *arguments],
        cwd=REPOSITORY,
        env={name: value for name, value in changed.items() if value is not None},
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
