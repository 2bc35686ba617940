"""Stages of runs: in their folders, in the output, and after a request to stop."""

import contextlib
import io
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lora.common.console import PROGRESS_MARK
from sae_lora.common.errors import EXIT_FAILED, EXIT_INTERRUPTED
from sae_lora.config.enums import Suite
from sae_lora.evaluation import run_suites
from sae_lora.launcher.plan import plan
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import Progress
from sae_lora.run import evaluate, execute, progress
from sae_lora.saes.training.activation_buffer import ActivationBuffer
from sae_lora.train.checkpoint import Timer
from sae_lora.train.train_state import TrainState
from tests.support.attempts import results
from tests.support.points import run_here
from tests.support.subjects import quick_points_in

FEW = "train.eval_batch_tokens=256", "evaluation.suites=[core,mechanism]", "evaluation.resamples=5"
SAE = (
    *("method=sae", "sae.width=64", "method.buffer_tokens=2048", "train.train_tokens=4096"),
    "train.eval_every_tokens=1024",
)
"""Eight steps, four for each filling of the buffer."""


@contextlib.contextmanager
def reports() -> Iterator[dict[Path, list[Progress]]]:
    """Every report that is written inside the block, by run folder."""
    written: dict[Path, list[Progress]] = {}
    write = RunFolder.write_progress

    def note(folder: RunFolder, report: Progress) -> None:
        written.setdefault(folder.path, []).append(report)
        write(folder, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "_EVERY_S", 0.0)
        patch.setattr(RunFolder, "write_progress", note)
        yield written


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Path, list[Progress]], str]:
    """The reports of two runs that train together, and their output."""
    point = quick_points_in(tmp_path_factory.mktemp("pack"))
    with contextlib.redirect_stdout(io.StringIO()) as output, reports() as written:
        run_here(*(point(f"train.seed={seed}", *FEW) for seed in (0, 1)))
    return written, output.getvalue()


@pytest.mark.slow
@pytest.mark.case("C1")
def test_every_stage_of_a_run_is_in_its_folder(pack: tuple[dict[Path, list[Progress]], str]) -> None:
    written, _ = pack
    first, second = ([report.text for report in of_run] for of_run in written.values())
    assert first == second
    stages = list(dict.fromkeys(report.stage for report in next(iter(written.values()))))
    assert stages == [
        "loading text (text_files) and SAE (tiny)",
        "tokenising",
        "loading SAEs",
        "loading model (tiny) on cpu",
        "building runs",
        "training",
        "evaluating",
    ]
    assert {"building runs 1/2", "evaluating 0/4", "evaluating 3/4", "training 2/2"} < set(first)
    for folder in written:
        assert not RunFolder(folder).progress.exists()  # the runs are finished


def test_the_last_report_of_training_has_rate_and_time_left(
    pack: tuple[dict[Path, list[Progress]], str],
) -> None:
    for of_run in pack[0].values():
        middle = next(report for report in of_run if report.step == 1)
        assert middle.tokens_per_second and middle.seconds_left and middle.loss
        # During an evaluation, the step stays.
        assert any(report.stage == "evaluating" and report.step == 1 for report in of_run)


@pytest.mark.case("C1")
def test_a_pack_prints_a_stage_once(pack: tuple[dict[Path, list[Progress]], str]) -> None:
    lines = pack[1].splitlines()
    marked = [line.removeprefix(PROGRESS_MARK) for line in lines if line.startswith(PROGRESS_MARK)]
    assert [line for line in marked if line.startswith("evaluating 0/4")] == ["evaluating 0/4"]
    assert sum("student CE" in line for line in lines) == 6  # each run has its points


@pytest.mark.case("C4")
def test_suites_report_and_stop_between_batches(
    pack: tuple[dict[Path, list[Progress]], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Results of a finished suite are kept."""
    folder = RunFolder(next(iter(pack[0])))
    monkeypatch.setattr("sys.argv", ["evaluate", str(folder.path)])
    mechanism = run_suites._SUITES[Suite.mechanism]

    def stopped(subject: Any, config: Any) -> None:
        for number, _ in enumerate(subject.batches()):
            assert number < 2
            if number == 1:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, reports() as written:
        patch.setitem(run_suites._SUITES, Suite.mechanism, mechanism._replace(measure=stopped))
        assert evaluate.main() == EXIT_INTERRUPTED
    texts = [report.text for report in written[folder.path]]
    assert texts[:2] == ["loading model", "evaluating suite core"]
    assert "evaluating suite mechanism" in texts
    assert (folder.evaluation / "core.json").exists()
    assert not folder.progress.exists()
    assert "finished suites are kept; not done: mechanism" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.case("C4")
def test_a_run_resumes_exactly_from_wherever_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the buffer is filled, or after a checkpoint by time in the middle of a buffer."""
    point = quick_points_in(tmp_path)
    (whole,) = run_here(point(*SAE))
    (run,) = plan([point(*SAE, f"output_dir={tmp_path}/stopped")]).runs
    run.freeze()
    append, take_step = ActivationBuffer._append, TrainState.take_step
    batches = 0

    def stop_at(batch: int) -> Any:
        def appended(*arguments: Any) -> None:
            nonlocal batches
            batches += 1
            append(*arguments)
            if batches == batch:
                signal.raise_signal(signal.SIGTERM)
                pytest.fail("the request to stop was not heard")

        return appended

    monkeypatch.setattr(ActivationBuffer, "_append", stop_at(2))
    assert execute.attempt([run.folder]) == EXIT_INTERRUPTED
    assert "nothing to save yet, because no step was taken" in capsys.readouterr().err
    assert not run.folder.checkpoints.exists()
    batches = 0
    monkeypatch.setattr(ActivationBuffer, "_append", stop_at(6))
    assert execute.attempt([run.folder]) == EXIT_INTERRUPTED
    assert "step 4 is saved, the same command resumes from there" in capsys.readouterr().err
    monkeypatch.setattr(ActivationBuffer, "_append", append)

    def crash_at_step_7(training: TrainState, batch: torch.Size) -> None:
        assert training.step < 6
        take_step(training, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Timer, "is_due", lambda timer, step, config: step == 6)
        patch.setattr(TrainState, "take_step", crash_at_step_7)
        assert execute.attempt([run.folder]) == EXIT_FAILED
    assert run.folder.checkpoint_step == 6
    run.folder.clear_failure()
    assert execute.attempt([run.folder]) == 0
    assert "resuming from step 6 of 8" in capsys.readouterr().out
    assert results(run.folder) == results(whole)
