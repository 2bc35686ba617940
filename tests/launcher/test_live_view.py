"""The view of runs: a table for 80 columns, and lines where the output is no terminal."""

import dataclasses
import io
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.table import Table

from sae_lora.cli import main
from sae_lora.common.console import PROGRESS_MARK, Spacing
from sae_lora.common.locks import held
from sae_lora.evaluation import suite_records
from sae_lora.evaluation.suite_records import Record
from sae_lora.launcher import live_view
from sae_lora.launcher.live_view import Watch
from sae_lora.launcher.status_tables import live_table, status_rows
from sae_lora.records.factors import differences_of
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import Progress
from tests.support.clock import Clock
from tests.support.sweeps import MadeUp

TRAINING = Progress(
    *("training", 12_345, 40_000, 12_345, 40_000, 1_580_160, 5_120_000),
    loss=0.5,
    tokens_per_second=1234.0,
    seconds_left=7_620,
)
FILLING = dataclasses.replace(TRAINING, stage="filling buffer", done=52, total=128)


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    """Four runs: two ranks and two seeds."""
    sweep = MadeUp(tmp_path)
    return [sweep.begun(points=2, rank=rank, seed=seed) for rank in (1, 64) for seed in (0, 1)]


def lines_of(table: Table, width: int) -> list[str]:
    drawing = Console(file=io.StringIO(), width=width)
    drawing.print(table)
    assert isinstance(drawing.file, io.StringIO)
    return drawing.file.getvalue().splitlines()


def hold(stack: ExitStack, runs: Sequence[RunFolder]) -> None:
    """Let this process hold the runs until the end of the block."""
    for run in runs:
        stack.enter_context(held(run.path))


@pytest.mark.case("C5")
def test_the_live_table_fits_80_columns(runs: list[RunFolder]) -> None:
    """The longest stage, step and ETA, beside two factors."""
    with ExitStack() as stack:
        hold(stack, runs)
        for run in runs:
            run.write_progress(FILLING)
        table = live_table(status_rows(runs), differences_of(runs))
    header, first, *_ = lines_of(table, 80)
    assert header.split() == ["rank", "seed", "state", "step", "gap", "ETA"]
    words = first.split()
    assert words[:2] == ["1", "0"]
    assert words[2:5] == ["filling", "buffer", "41%"]
    assert words[5] == "12,345/40,000"
    assert words[-4:] == ["2", "h", "07", "min"]


def test_a_long_value_leaves_room_for_step_gap_and_eta(runs: list[RunFolder]) -> None:
    with ExitStack() as stack:
        hold(stack, runs)
        runs[0].write_progress(FILLING)
        varying = {"path": ["a/very/long/path/of/an/sae/that/somebody/has/trained"] * 4}
        _, first, *_ = lines_of(live_table(status_rows(runs), varying), 80)
    assert "…" in first and "12,345/40,000" in first and first.endswith("2 h 07 min")


def test_status_shows_stages_and_what_varies(
    runs: list[RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        hold(stack, runs[:2])
        runs[0].write_progress(TRAINING)
        runs[1].write_progress(FILLING)
        os.utime(runs[1].progress, (0, 0))  # a process that reports nothing any more
        assert main(["status", str(runs[0].path.parent)]) == 0
    header, first, second, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["rank", "seed", "state"]
    assert "training 31%" in first and "1,234" in first and "2 h 07 min" in first
    assert "filling buffer 41%" in second and "last report" in second


def test_status_shows_the_suite_that_is_measured(tmp_path: Path) -> None:
    """Unless the report is old, because its process was killed."""
    folder = MadeUp(tmp_path).finished()
    folder.write_progress(Progress("evaluating suite mechanism", 2, 8))
    (row,) = status_rows([folder])
    assert row.stage == row.note == "evaluating suite mechanism 2/8"
    os.utime(folder.progress, (0, 0))
    (row,) = status_rows([folder])
    assert row.stage == "done" and row.note.endswith("ago")


def test_status_names_the_suites_that_a_run_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = MadeUp(tmp_path).finished()
    asked = folder.read_config() | {"evaluation": {"suites": ["core", "mechanism"]}}
    folder.write_config(yaml.safe_dump(asked))
    folder.evaluation.mkdir()
    record = Record("core", settings={}, results={}, environment={}, seconds=1.0)
    suite_records.write(folder, record)
    assert main(["status", str(folder.path)]) == 0
    assert "lacks suites: mechanism" in capsys.readouterr().out
    suite_records.write(folder, dataclasses.replace(record, suite="mechanism"))
    assert main(["status", str(folder.path)]) == 0
    assert "lacks suites" not in capsys.readouterr().out


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the view's lines."""
    clock = Clock()
    monkeypatch.setattr(live_view, "Spacing", lambda: Spacing(clock))
    return clock


def test_a_pack_has_one_line_for_each_stage_and_evaluation(
    runs: list[RunFolder], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(progress: Progress) -> list[str]:
        for run in runs:
            run.write_progress(progress)
        watch.update()
        return capsys.readouterr().out.splitlines()

    with ExitStack() as stack:
        hold(stack, runs)
        watch = stack.enter_context(Watch(runs))
        (first,) = lines(FILLING)
        names = "4 runs  rank=1,64  seed=0,1"
        assert first.startswith(f"{PROGRESS_MARK}{names}  filling buffer 41%  gap +0.")
        assert first.endswith("1,234 tokens/s  ETA 2 h 07 min")
        assert lines(dataclasses.replace(FILLING, done=60)) == []
        (second,) = lines(TRAINING)
        assert "training 31%" in second
        assert lines(FILLING) == []  # a stage that comes again
        clock.advance(11)
        assert len(lines(FILLING)) == 1
        for number, run in enumerate(runs):
            last = run.read_curve()[-1]
            run.append_point(dataclasses.replace(last, step=last.step + 1))
            # The evaluation is complete when the last run has its point.
            assert len(lines(FILLING)) == (number == len(runs) - 1)


def test_the_end_of_a_run_names_what_varies(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = MadeUp(tmp_path)
    runs = [sweep.finished(lr=1e-3, seed=0), sweep.finished(lr=2e-3, seed=1)]
    with Watch(runs):
        pass
    for line, label in zip(capsys.readouterr().out.splitlines(), ("0.001", "0.002"), strict=True):
        assert line.split()[0] == "done" and f"lr={label}" in line and "gap closed" in line


def test_lines_of_progress_in_a_log_are_left_out_of_a_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = MadeUp(tmp_path).begun()
    for has_view in (False, True):
        with Watch([folder]) as watch:
            monkeypatch.setattr(Watch, "_has_view", has_view)
            monkeypatch.setattr(watch, "_show_in_cell", lambda view: None)
            with folder.log.open("a") as log:
                log.write(f"{PROGRESS_MARK}evaluating 3/16\nan evaluation\n")
        printed = capsys.readouterr().out
        assert "an evaluation" in printed
        assert (f"{PROGRESS_MARK}evaluating 3/16" in printed) is not has_view
