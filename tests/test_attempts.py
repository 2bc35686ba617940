"""A run in its own process: killed, asked to stop, or failed, and taken up again."""

import json
import signal
from pathlib import Path

import pytest

from sae_lora.errors import EXIT_FAILED, EXIT_HELD, EXIT_INTERRUPTED
from sae_lora.lease import held
from sae_lora.records import RunFolder
from tests.attempts import attempt, frozen, killed, results

pytestmark = pytest.mark.slow

SMALL = (
    "train.train_tokens=1536 train.batch_size=1 train.eval_every_tokens=512 "
    "train.checkpoint_every_steps=3 data.validation_tokens=1024 lora.rank=2 lora.dropout=0.2"
).split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the run finds when nothing befalls it."""
    folder = frozen(tmp_path_factory.mktemp("whole"), *SMALL)
    finished = attempt(folder)
    assert finished.returncode == 0, finished.stderr
    assert not folder.checkpoints.exists()
    return results(folder)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return frozen(tmp_path, *SMALL)


def resumed(folder: RunFolder, step: int) -> None:
    """The next attempt ends well and goes on from the step."""
    finished = attempt(folder)
    assert finished.returncode == 0, finished.stderr
    assert (f"going on from step {step} of 12" in finished.stdout) is (step > 0), finished.stdout


@pytest.mark.parametrize(("step", "goes_on_from"), [(2, 0), (-6, 3), (12, 9)])
def test_killed_it_loses_only_what_came_after_the_checkpoint(
    folder: RunFolder, whole: dict[str, object], step: int, goes_on_from: int
) -> None:
    assert killed(attempt(folder, step, signal.SIGKILL))
    assert not folder.is_finished
    resumed(folder, goes_on_from)
    assert results(folder) == whole


def test_asked_to_stop_it_loses_nothing(folder: RunFolder, whole: dict[str, object]) -> None:
    """The step under way is finished and saved."""
    stopped = attempt(folder, 5, signal.SIGUSR2)
    assert stopped.returncode == EXIT_INTERRUPTED, stopped.stderr
    assert not folder.has_failed
    resumed(folder, 5)
    assert results(folder) == whole


def test_failed_it_says_why_and_can_be_taken_up(folder: RunFolder, whole: dict[str, object]) -> None:
    assert attempt(folder, 7, "raise").returncode == EXIT_FAILED
    failure = json.loads(folder.failure.read_text())
    assert failure["message"] == "ZeroDivisionError: befallen"
    assert "Traceback" in failure["details"]
    resumed(folder, 6)
    assert results(folder) == whole
    assert not folder.failure.exists()
    assert (folder.path / "unfinished-1/failure.json").exists()


def test_a_damaged_checkpoint_is_no_silent_fresh_start(folder: RunFolder) -> None:
    assert killed(attempt(folder, 8, signal.SIGKILL))
    for tensors in folder.checkpoints.glob("*/tensors.safetensors"):
        tensors.write_bytes(b"")
    refused = attempt(folder)
    assert refused.returncode == EXIT_FAILED
    assert "no checkpoint" in folder.failure.read_text()
    assert list(folder.checkpoints.glob("step-*"))


def test_held_elsewhere_it_is_left_alone(folder: RunFolder) -> None:
    with held(folder.path):
        refused = attempt(folder)
    assert refused.returncode == EXIT_HELD
    assert "being run by another process" in refused.stderr
    assert not folder.failure.exists()
