"""The command line for a user: exit codes, one message, a traceback only on request."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sae_lora.records.folder import RunFolder
from tests.support.commands import REPOSITORY, launch, launch_in_this_process, session
from tests.support.halving import with_sweeper
from tests.support.points import SMALL
from tests.support.refusals import WRONG, fault_of, prepare
from tests.support.submission import until


@pytest.mark.slow
@pytest.mark.parametrize(("command", "words"), WRONG, ids=[command for command, _ in WRONG])
def test_wrong_commands_are_refused_with_one_message(
    command: str, words: list[str], tmp_path: Path
) -> None:
    """And a dry run with the value that the message suggests works, or has another message."""
    prepare(tmp_path)
    refused: list[subprocess.CompletedProcess[str]] = []

    def by(*arguments: str) -> subprocess.CompletedProcess[str]:
        refused.append(launch_in_this_process(*arguments))
        return refused[0]

    assert fault_of(command, words, tmp_path, by) is None
    first = refused[0].stderr
    given = command.replace("{home}", str(tmp_path)).split()
    common = ["launcher.dry_run=true", f"output_dir={tmp_path}/outputs"]
    common = [word for word in common if word.partition("=")[0] not in command]
    hint = re.search(r"nearest valid: (\S+=.*)|write (\S+=\S+)", first)
    if hint is None or "value" in hint.group():
        return
    corrected = shlex.split(hint[1] or hint[2])
    if any(word.startswith("experiment=") for word in corrected):
        common += ["lora.rank=1", "layer.index=3", "sae.l0=4"]  # one point of the experiment
    keys = {word.partition("=")[0] for word in corrected}
    kept = [word for word in given if word.lstrip("+-~").partition("=")[0] not in keys]
    if given[0].startswith("--"):  # a key with dashes, and its value
        kept = []
    second = launch_in_this_process(*kept, *corrected, *common)
    assert second.stderr.splitlines()[:1] != first.splitlines()[:1]
    assert "Traceback" not in second.stderr


def test_hydra_full_error_shows_the_traceback() -> None:
    assert "Traceback" in launch("lora.rank=0", HYDRA_FULL_ERROR="1").stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--info", "defaults"]])
def test_help_is_not_an_error(arguments: list[str]) -> None:
    result = launch_in_this_process(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("forked_jobs")
def test_a_sweep_from_the_terminal(tmp_path: Path) -> None:
    small = ["train.train_tokens=1024", "data.validation_tokens=1024", "tracking=disabled"]
    swept = launch_in_this_process(
        "-m", "lora.rank=1,2", "layer.index=1,2", *small, f"output_dir={tmp_path}"
    )
    assert swept.returncode == 0, swept.stderr
    assert len(list(tmp_path.glob("main/*/summary.json"))) == 4
    assert swept.stdout.count("done  tiny") == 4
    assert "gap closed" in swept.stdout
    assert "Traceback" not in swept.stderr
    # Hydra writes no folders.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["main"]


def halving(home: Path) -> list[str]:
    """A sweep of three trials in two batches, with outputs in this folder."""
    paths = [f"output_dir={home}/outputs", f"data.cache_dir={home}/cache"]
    more = ["train.train_tokens=8192", "train.eval_every_tokens=8192"]
    return ["-m", "hydra/sweeper=halving", *SMALL, *more, *paths]


@pytest.mark.slow
def test_a_stopped_adaptive_sweep_goes_on_without_a_trial_twice(tmp_path: Path) -> None:
    """As in Optuna, the next point depends on the results of earlier points. A batch is a pack."""
    command, variables = halving(tmp_path), with_sweeper(tmp_path / "plugins")

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/main/*/summary.json")}

    with session(**variables) as commands:
        planned = commands.launch(*command, "launcher.dry_run=true")
        process = subprocess.Popen(
            [sys.executable, "launch.py", *command],
            cwd=REPOSITORY,
            env=os.environ | variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with process:
            until(lambda: len(written()) == 2, "the first batch")
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 130
        first = written()
        swept = commands.launch(*command)
        again = commands.launch(*command)
    assert planned.returncode == 0 and "2 runs: 2 new" in planned.stdout
    assert swept.returncode == 0, swept.stderr
    assert "2 of 2 already done, skipped" in swept.stdout
    assert len(written()) == 3 and first.items() <= written().items()
    runs = [RunFolder(path.parent) for path in written()]
    summaries = {run.read_config()["train"]["lr"]: run.read_summary() for run in runs}
    gaps = {rate: summary["ce_gap"] for rate, summary in summaries.items()}
    better = min(1e-4, 2e-3, key=gaps.__getitem__)
    last = 0.75 * better
    assert f"best of two {better} then {last} [{gaps[last]}]" in swept.stdout
    together = {rate: summary["trained_together"] for rate, summary in summaries.items()}
    assert together == {1e-4: 2, 2e-3: 2, last: 1}
    best = min(gaps, key=gaps.__getitem__)
    assert "3 trials by gap after" in swept.stdout and f"train.lr={best}" in swept.stdout
    assert again.returncode == 0 and again.stdout.count("already done, skipped") == 2
    assert f"best of two {better} then {last} [{gaps[last]}]" in again.stdout
