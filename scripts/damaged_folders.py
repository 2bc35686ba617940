"""Damage to the folders of finished runs: a campaign of `python -m scripts.faults`."""

import contextlib
import io
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

from sae_lora.cli import main
from sae_lora.launcher.launch import launch
from sae_lora.records.folder import RunFolder
from sae_lora.records.status import State, read_statuses
from tests.support.damage import DAMAGE
from tests.support.points import points_in, run_here


def commands(sweep: str, damaged: str) -> list[list[str]]:
    """Commands on a sweep with a damaged run, and on this run."""
    return [
        ["status", sweep],
        ["table", sweep],
        ["table", sweep, "--format", "csv"],
        ["report", sweep, "--no-pictures"],
        ["compare", "methods", sweep],
        ["compare", "recipes", sweep, sweep],
        ["evaluate", sweep],
        ["dashboard", sweep, "--dry-run"],
        ["logs", damaged],
        ["export", damaged, "--to", f"{sweep}/../export"],
    ]


def attempts(home: Path, on_kind: Callable[[], None]) -> tuple[list[str], list[str]]:
    """Damage a run of a sweep of two in every way; return the faults of commands, and of launches.

    A command must show the damaged run, go on with the other one if it concerns both, print no
    traceback, and end with 1. A launch must neither run nor count the damaged run.

    Args:
        home: An empty folder.
        on_kind: Called after each kind of damage.
    """
    point = points_in(home / "whole")
    points = [point("lora.rank=16"), point("lora.rank=4")]
    whole = [folder.path for folder in run_here(*points)]
    assert main(["evaluate", str(whole[0].parent)]) == 0
    wrong, counted = [], []
    for name, (harm, _) in DAMAGE.items():
        sweep = whole[0].parent
        saved = home / "saved"
        shutil.copytree(sweep, saved)
        harm(RunFolder(whole[0]))
        for command in commands(str(sweep), str(whole[0])):
            code, shown = _output(lambda command=command: main(command))
            if code != 1 or "damaged" not in shown or "Traceback" in shown:
                wrong.append(f"{name}: {' '.join(command[:2])}: exit code {code}")
        (status,) = read_statuses([RunFolder(whole[0])])
        code, shown = _output(lambda: launch(points))
        if code != 1 or "1 of 2 already done" not in shown or status.state is not State.damaged:
            counted.append(f"{name}: exit code {code}")
        shutil.rmtree(sweep)
        saved.rename(sweep)
        on_kind()
    return wrong, counted


def _output(call: Callable[[], int]) -> tuple[int | None, str]:
    """The exit code of a call and what it prints; no code if it ends with an error."""
    printed = io.StringIO()
    code = None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = call()
        except Exception:  # any error is a fault of the campaign, and counted
            traceback.print_exc()
    return code, printed.getvalue()
