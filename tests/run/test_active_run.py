"""A run in its own process is killed, stopped or fails, and resumes."""

import json
import signal
from pathlib import Path

import pytest

from sae_lora.common.errors import EXIT_FAILED, EXIT_HELD, EXIT_INTERRUPTED, EXIT_NOT_TOGETHER
from sae_lora.common.locks import held
from sae_lora.records.folder import RunFolder
from tests.support.attempts import attempt, frozen, killed, results

pytestmark = pytest.mark.slow

SMALL = (
    "train.train_tokens=1536 train.batch_size=1 train.eval_every_tokens=512 "
    "train.checkpoint_every_steps=3 data.validation_tokens=1024 lora.rank=2 lora.dropout=0.2"
).split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache of the text for all tests of the module."""
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: str) -> dict[str, object]:
    """Results of the run without interruption."""
    folder = frozen(tmp_path_factory.mktemp("whole"), *SMALL, cache)
    finished = attempt(folder)
    assert finished.returncode == 0, finished.stderr
    assert not folder.checkpoints.exists()
    return results(folder)


@pytest.fixture
def folder(tmp_path: Path, cache: str) -> RunFolder:
    return frozen(tmp_path, *SMALL, cache)


def resumed(folder: RunFolder, step: int) -> None:
    """Run the next attempt; it must succeed and resume from the step."""
    finished = attempt(folder)
    assert finished.returncode == 0, finished.stderr
    assert (f"resuming from step {step} of 12" in finished.stdout) is (step > 0), finished.stdout


@pytest.mark.parametrize(("step", "resumes_from"), [(2, 0), (-6, 3), (12, 9)])
def test_a_killed_run_loses_only_steps_after_the_checkpoint(
    folder: RunFolder, whole: dict[str, object], step: int, resumes_from: int
) -> None:
    assert killed(attempt(folder, step=step, what=signal.SIGKILL.value))
    assert not folder.is_finished
    resumed(folder, resumes_from)
    assert results(folder) == whole


def test_a_stopped_run_loses_nothing(folder: RunFolder, whole: dict[str, object]) -> None:
    """It finishes and saves the present step."""
    stopped = attempt(folder, step=5, what=signal.SIGUSR2.value)
    assert stopped.returncode == EXIT_INTERRUPTED, stopped.stderr
    assert not folder.has_failed
    resumed(folder, 5)
    assert results(folder) == whole


def test_a_failed_run_records_the_cause_and_can_resume(
    folder: RunFolder, whole: dict[str, object]
) -> None:
    assert attempt(folder, step=7, what="raise").returncode == EXIT_FAILED
    failure = json.loads(folder.failure.read_text())
    assert failure["message"] == "ZeroDivisionError: injected fault"
    assert "Traceback" in failure["details"]
    resumed(folder, 6)
    assert results(folder) == whole
    assert not folder.failure.exists()
    assert (folder.path / "unfinished-1/failure.json").exists()


def test_a_damaged_checkpoint_is_an_error(folder: RunFolder) -> None:
    assert killed(attempt(folder, step=8, what=signal.SIGKILL.value))
    for tensors in folder.checkpoints.glob("*/tensors.safetensors"):
        tensors.write_bytes(b"")
    refused = attempt(folder)
    assert refused.returncode == EXIT_FAILED
    assert "no checkpoint" in folder.failure.read_text()
    assert list(folder.checkpoints.glob("step-*"))


class TestTogether:
    """Two runs in one process."""

    @pytest.fixture
    def pair(self, folder: RunFolder, tmp_path: Path, cache: str) -> tuple[RunFolder, RunFolder]:
        """The run with known results, and another run."""
        return folder, frozen(tmp_path, *SMALL, cache, "lora.rank=3", "sae.l0=8", "layer.index=2")

    def test_each_gives_the_same_results_as_alone(self, pair, whole: dict[str, object]) -> None:
        finished = attempt(*pair)
        assert finished.returncode == 0, finished.stderr
        assert results(pair[0]) == whole
        assert all(folder.read_summary()["trained_together"] == 2 for folder in pair)

    def test_killed_runs_resume(self, pair, whole: dict[str, object]) -> None:
        assert killed(attempt(*pair, step=8, what=signal.SIGKILL.value))
        finished = attempt(*pair)
        assert finished.stdout.count("resuming from step 6 of 12") == 2
        assert results(pair[0]) == whole
        assert pair[1].is_finished

    @pytest.mark.parametrize("failing", [0, 1])
    def test_a_failed_run_does_not_end_the_other_run(self, pair, failing: int, whole) -> None:
        ordered = (pair[failing], pair[1 - failing])  # the first run fails
        assert attempt(*ordered, step=7, what="raise").returncode == EXIT_FAILED
        assert ordered[0].failure_message == "ZeroDivisionError: injected fault"
        assert ordered[1].is_finished
        assert attempt(ordered[0]).returncode == 0
        assert results(pair[0]) == whole

    def test_an_incomplete_step_is_repeated_from_the_checkpoint(self, pair, whole) -> None:
        """Out of memory inside the optimiser, with some weights already updated: they are not saved."""
        assert attempt(*pair, step=5, what="optimizer").returncode == EXIT_NOT_TOGETHER
        resumed(pair[0], 3)
        assert results(pair[0]) == whole

    def test_too_little_memory_for_both_fails_neither(self, pair, whole: dict[str, object]) -> None:
        failed = attempt(*pair, step=5, what="memory")
        assert failed.returncode == EXIT_NOT_TOGETHER, failed.stderr
        assert failed.stderr.splitlines()[-1].endswith("OutOfMemoryError: no room")
        assert not any(folder.has_failed for folder in pair)
        resumed(pair[0], 4)  # only the present step is lost
        assert results(pair[0]) == whole
        assert attempt(pair[1]).returncode == 0

    def test_a_run_that_another_process_holds_does_not_stop_the_other_run(self, pair, whole) -> None:
        with held(pair[1].path):
            assert attempt(*pair).returncode == EXIT_HELD
        assert results(pair[0]) == whole
        assert not pair[1].curve.exists()

    def test_an_error_of_both_runs_is_written_into_both_folders(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("")
        pair = frozen(tmp_path, *SMALL), frozen(tmp_path, *SMALL, "lora.rank=3")
        assert attempt(*pair).returncode == EXIT_FAILED
        for folder in pair:
            assert folder.failure_message.startswith("data.cache_dir: ")

    def test_different_text_is_refused(self, folder: RunFolder, tmp_path: Path, cache: str) -> None:
        """The runs have not failed: each can run alone."""
        different = frozen(tmp_path, *SMALL, cache, "data.seed=1")
        refused = attempt(folder, different)
        assert refused.returncode == EXIT_NOT_TOGETHER
        assert "model, data or batches of these runs differ" in refused.stderr
        assert not folder.has_failed

    def test_a_deleted_run_does_not_end_the_other_run(self, pair, whole) -> None:
        finished = attempt(*reversed(pair), step=5, what="delete")
        assert finished.returncode == EXIT_FAILED, finished.stderr
        assert "the folder of this run has been deleted" in finished.stderr
        assert not pair[1].path.exists()
        assert results(pair[0]) == whole
