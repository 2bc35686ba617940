"""Compatibility with the version before the rooms: its runs resume, and its queued jobs run.

Commit 36e1319, when the package was one folder, wrote `tests/fixtures/before_rooms/`: a finished run, a
run that was stopped at step 16 of 64, and a run that waits as a pickle in SLURM's queue.
"""

import shlex
import shutil
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from sae_lora.cli import main
from sae_lora.config.overrides import command
from sae_lora.launcher.job import Job
from sae_lora.launcher.plan import plan
from sae_lora.records.folder import RunFolder
from sae_lora.records.status import State, read_statuses
from sae_lora.run import execute
from tests.support.composing import composed

FIXTURE = Path(__file__).parents[1] / "fixtures" / "before_rooms"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunFolder]:
    """The finished, the stopped and the queued run, in a copy; their paths are relative to it."""
    shutil.copytree(FIXTURE, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    copies = [RunFolder(path) for path in Path("outputs/main").iterdir()]
    return sorted(copies, key=lambda folder: folder.read_config()["train"]["seed"])


def test_their_states_are_read(folders: list[RunFolder]) -> None:
    expected = [State.done, State.resumable, State.new]
    assert [status.state for status in read_statuses(folders)] == expected


def test_the_same_points_are_planned_into_the_same_folders(folders: list[RunFolder]) -> None:
    commands = [command(folder.read_config()) for folder in folders]
    points = [composed(*shlex.split(words)[2:]) for words in commands if words is not None]
    assert [run.folder.path for run in plan(points).runs] == [folder.path for folder in folders]


@pytest.mark.slow
def test_a_stopped_run_resumes(folders: list[RunFolder], capsys: pytest.CaptureFixture[str]) -> None:
    stopped = folders[1]
    old = stopped.curve.read_text().splitlines()
    assert execute.attempt([stopped]) == 0
    assert stopped.is_finished
    new = stopped.curve.read_text().splitlines()
    assert new[: len(old)] == old and len(new) > len(old)
    assert "resuming from step 16 of 64" in capsys.readouterr().out


def test_a_finished_run_is_reported_evaluated_and_exported(folders: list[RunFolder]) -> None:
    done = str(folders[0].path)
    assert main(["report", "outputs/main", "--no-pictures"]) == 0
    assert folders[0].path.name in Path("outputs/main/report/runs.csv").read_text()
    assert main(["evaluate", done, "--suite", "core"]) == 0
    assert main(["export", done, "--to", "exported"]) == 0
    assert Path("exported/adapter_model.safetensors").exists()


@pytest.mark.slow  # starts a process
def test_a_queued_job_runs(folders: list[RunFolder]) -> None:
    submission = DelayedSubmission.load("submitted.pkl")
    assert isinstance(submission.function, Job)
    submission.result()
    assert folders[2].is_finished
