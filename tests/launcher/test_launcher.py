"""The launcher on this machine: submitit runs each pack in its own process."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import submitit

from sae_lora.cli import main
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.locks import held
from sae_lora.config import compose
from sae_lora.config.execution import LauncherConfig
from sae_lora.launcher import expected_time
from sae_lora.launcher import launch as launcher
from sae_lora.launcher.plan import Pack, plan
from sae_lora.records.status import State, read_statuses
from tests.support.attempts import results
from tests.support.commands import REPOSITORY
from tests.support.forked_jobs import forked_jobs
from tests.support.points import SMALL, Point, folders_in, points_in
from tests.support.sweeps import summed_up

pytestmark = pytest.mark.slow


def test_a_sweep_runs_each_point_once_and_shows_a_table(point: Point, tmp_path: Path, capsys) -> None:
    points = [point(f"lora.rank={rank}") for rank in (1, 2)]
    assert launcher.launch([*points, points[0]]) == 0
    folders = folders_in(tmp_path)
    assert len(folders) == 2
    printed = capsys.readouterr().out
    assert "is named twice and runs only once" in printed
    assert "gap closed" in printed
    times = {path: path.stat().st_mtime_ns for folder in folders for path in folder.path.rglob("*")}
    assert launcher.launch(points) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "2 of 2 already done" in capsys.readouterr().out


@pytest.mark.usefixtures("forked_jobs")
def test_a_single_run_is_evaluated_and_shows_its_table(point: Point, tmp_path: Path, capsys) -> None:
    assert launcher.launch([point("evaluation=core", "evaluation.resamples=10")]) == 0
    printed = capsys.readouterr().out
    (folder,) = folders_in(tmp_path)
    assert (folder.evaluation / "core.json").exists()
    for words in ("base CE", "spliced CE", "student CE", "gap closed", "run folder"):
        assert words in printed


@pytest.mark.usefixtures("forked_jobs")
def test_a_failed_run_does_not_stop_other_runs_and_can_be_retried(
    point: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(launcher, "_check_can_run", lambda config: None)  # as where a GPU was lost
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    broken = "train.device=cuda"  # the device is not part of the identity of a run
    points = [point(f"lora.rank={rank}", *([broken] if rank == 2 else [])) for rank in (1, 2, 3)]
    assert launcher.launch(points) == 1
    planned = plan(points)
    ranks = [run.config.lora.rank for run in planned.runs]
    states = [status.state for status in read_statuses([run.folder for run in planned.runs])]
    assert dict(zip(ranks, states, strict=True)) == {1: State.done, 2: State.failed, 3: State.done}
    (failed,) = [folder for folder in folders_in(tmp_path) if folder.has_failed]
    assert failed.failure_message in capsys.readouterr().err
    # With the same settings, it is retried only on request.
    assert launcher.launch(points) == 1
    assert "launcher.retry_failed=true" in capsys.readouterr().err
    asked = [replace(each, launcher=replace(each.launcher, retry_failed=True)) for each in points]
    assert launcher.launch(asked) == 1
    assert len(list(failed.path.glob("unfinished-*/failure.json"))) == 1
    # With other settings, which its hash does not hold, it runs at once.
    assert launcher.launch([point(f"lora.rank={rank}") for rank in (1, 2, 3)]) == 0
    printed = capsys.readouterr().err
    assert "with train.device=cuda; running again with the present settings" in printed
    assert all(folder.is_finished for folder in folders_in(tmp_path))
    assert len(list(failed.path.glob("unfinished-*/failure.json"))) == 2


@pytest.mark.case("B11")
def test_a_launch_waits_for_a_run_that_another_process_holds(point: Point, capsys) -> None:
    """Then it says how the run ended, here without a result."""
    (planned,) = plan([point()]).runs
    planned.freeze()
    with ExitStack() as lease:
        lease.enter_context(held(planned.folder.path))
        timer = threading.Timer(1.5, lease.close)
        timer.start()
        assert launcher.launch([point()]) == 1
        timer.join()
    printed = capsys.readouterr()
    assert "is running, by process" in printed.out and "waiting for 1 run of" in printed.out
    assert "not finished" in printed.err
    assert not planned.folder.failure.exists() and not planned.folder.log.exists()


@pytest.mark.case("B11")
def test_two_launches_of_one_command_train_once(tmp_path: Path) -> None:
    """The second one waits, says what was done, and writes nothing into the log of the first."""
    small = [*SMALL, f"output_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"]
    command = [sys.executable, "-m", "sae_lora", "launch", "-m", *small, "lora.rank=1,2"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("gap closed" in text for text in printed)
    assert sum("waiting for 2 runs of another launch" in text for text in printed) == 1
    folders = folders_in(tmp_path)
    logs = [folder.log.read_text() for folder in folders]
    assert sum(len(re.findall("training .* weights", log)) for log in logs) == 1  # one pack
    assert [folder.read_summary()["trained_together"] for folder in folders] == [2, 2]
    assert not any("another process" in log for log in logs)


@pytest.mark.case("B12")
def test_a_full_disk_of_the_launcher_is_named_and_stops_the_runs(
    point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(submitit.LocalExecutor, "submit", full)
    with pytest.raises(UserError, match=r"output_dir: cannot write to .*No space left on device"):
        launcher.launch([point()])


def test_dry_run_writes_nothing(point: Point, tmp_path: Path, capsys) -> None:
    dry = "launcher.dry_run=true"
    assert launcher.launch([point(dry), point(dry, "lora.rank=4")]) == 0
    assert not folders_in(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("new") == 3  # two runs, and their number
    assert "block_3-width_1024-l0_4" in printed
    assert "2 runs in 1 pack" in printed
    assert "training FLOPs" in printed


@pytest.mark.usefixtures("forked_jobs")
def test_dry_run_shows_the_packs(point: Point, capsys) -> None:
    assert launcher.launch([point()]) == 0
    again = [
        point(*overrides, "launcher.dry_run=true")
        for overrides in ((), ("lora.rank=4",), ("lora.rank=8",), ("data.seed=1",), ("train.seed=1",))
    ]
    capsys.readouterr()
    assert launcher.launch(again) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("tiny")]
    # After the name, the columns of rank, data.seed and seed: what varies.
    assert [(state, pack) for _, _, _, _, state, _, pack, *_ in table] == [
        ("done", "–"),
        ("new", "1"),
        ("new", "1"),
        ("new", "2"),
        ("new", "1"),
    ]


@pytest.mark.usefixtures("forked_jobs")
def test_packing_does_not_change_results(point: Point, tmp_path: Path) -> None:
    runs = [(f"lora.rank={rank}", "lora.dropout=0.1") for rank in (1, 2, 4)]
    measured = {}
    for pack in ("auto", "2"):
        options = f"output_dir={tmp_path}/{pack}", f"launcher.pack={pack}"
        assert launcher.launch([point(*overrides, *options) for overrides in runs]) == 0
        folders = folders_in(tmp_path / pack)
        measured[pack] = {folder.path.name: results(folder) for folder in folders}
        sizes = sorted(folder.read_summary()["trained_together"] for folder in folders)
        assert sizes == {"auto": [3, 3, 3], "2": [1, 2, 2]}[pack]
    assert measured["auto"] == measured["2"]
    assert len(measured["2"]) == 3


def test_a_pack_that_is_too_large_for_memory_continues_in_parts(point: Point, tmp_path: Path) -> None:
    """Each process may use 3.3 GB; one run needs less than 3.0 GB, two runs need more than 3.6 GB."""
    large = "lora.blocks=all", "train.batch_size=64", "train.train_tokens=8192"
    with forked_jobs(3_300_000_000):
        assert launcher.launch([point(*large, f"train.seed={seed}") for seed in range(2)]) == 0
    folders = folders_in(tmp_path)
    assert len(folders) == 2
    assert not any(folder.has_failed for folder in folders)
    assert all(folder.read_summary()["trained_together"] == 1 for folder in folders)
    logs = "".join(folder.log.read_text() for folder in folders)
    assert "can't allocate memory" in logs
    assert "continuing alone" in logs


@pytest.mark.parametrize("ctrl_c", [True, False], ids=["Ctrl-C", "SIGTERM in a script's background"])
def test_a_stopped_run_saves_and_can_resume(tmp_path: Path, ctrl_c: bool) -> None:
    """A background process of a script ignores Ctrl-C."""
    handler = signal.default_int_handler if ctrl_c else signal.SIG_IGN
    small = [*SMALL, "train.train_tokens=100000", f"output_dir={tmp_path}"]
    command = [sys.executable, "launch.py", *small, f"data.cache_dir={tmp_path}/cache"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        # A stop before the first step has nothing to save, and the first row is of the untrained run.
        if any(len(folder.read_curve()) > 1 for folder in folders_in(tmp_path)):
            break
        time.sleep(0.1)
    if ctrl_c:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    assert process.wait(60) == 130
    (folder,) = folders_in(tmp_path)
    planned = plan([points_in(tmp_path)("train.train_tokens=100000")])
    assert planned.runs[0].folder.path == folder.path
    assert read_statuses([folder])[0].state is State.stopped


@pytest.mark.parametrize("others", [False, True])
def test_a_stop_while_suites_run_names_the_command_that_runs_them(
    point: Point, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    """The same command would leave out finished runs."""

    def stopped(packs: Sequence[Pack], settings: LauncherConfig, folder: Path) -> None:
        summed_up(packs[0][0].folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(expected_time, "run_here", stopped)
    points = [point(f"lora.rank={rank}", "evaluation=core") for rank in ((1, 2) if others else (1,))]
    with pytest.raises(KeyboardInterrupt) as stop:
        launcher.launch(points)
    assert "sae-lora evaluate" in str(stop.value) and "--suite core" in str(stop.value)
    assert ("repeat the command" in str(stop.value)) is others


def test_sigterm_while_a_launch_is_planned_is_a_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compose, "check", lambda _: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["launch"]) == 130
    assert "stopped: repeat the command to continue" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_package_that_is_missing_is_named_before_anything_runs(point: Point, tmp_path: Path) -> None:
    if find_spec("flash_attn") or find_spec("kernels"):
        pytest.skip("the package is installed")
    for overrides in ((), ("launcher.dry_run=true",)):
        with pytest.raises(ConfigError, match="flash_attn is not installed"):
            launcher.launch([point("model.attention=flash_attention_2", *overrides)])
    assert not folders_in(tmp_path)
