"""The state of a run, from its folder and from SLURM."""

import shutil
from pathlib import Path

import pytest

from sae_lora.cli import main
from sae_lora.common.errors import UserError
from sae_lora.common.locks import held
from sae_lora.launcher.plan import plan
from sae_lora.launcher.status_tables import status_rows
from sae_lora.records import slurm
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import Progress
from sae_lora.records.status import State, finished, progress_of, read_statuses, what_is_saved
from tests.support.points import Point
from tests.support.sweeps import MadeUp, summed_up


def test_the_state_of_a_run_follows_from_its_folder(
    point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = plan([point()]).runs
    folder = run.folder

    def state() -> State:
        return read_statuses([folder])[0].state

    assert state() is State.new
    run.freeze()
    assert state() is State.new
    with held(folder.path):
        assert state() is State.running
    folder.checkpoints.mkdir()
    assert state() is State.resumable
    folder.write_failure("a reason", "and all of it")
    assert state() is State.failed
    folder.write_job("11")
    run.freeze()  # a retry moves the failure away and forgets the job
    assert state() is State.resumable
    assert folder.job is None
    folder.write_job("12_3")
    monkeypatch.setattr(slurm, "queue", lambda: {"12_3": "PENDING"})
    assert state() is State.queued
    monkeypatch.setattr(slurm, "queue", lambda: {"12_4": "PENDING"})
    monkeypatch.setattr(slurm, "ends", lambda jobs: dict.fromkeys(jobs, "NODE_FAIL"))
    assert state() is State.resumable
    assert "12_3 has left the SLURM queue: NODE_FAIL" in str(read_statuses([folder])[0].note)
    folder.failure.unlink(missing_ok=True)
    summed_up(folder)
    assert state() is State.done


def test_a_submitted_run_counts_as_queued_if_slurm_does_not_answer(
    point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = plan([point()]).runs
    run.freeze()
    run.folder.write_job("12")
    monkeypatch.setenv("PATH", "")
    (status,) = read_statuses([run.folder])
    assert status.state is State.queued
    assert status.note is not None
    assert "no SLURM on this machine" in status.note


@pytest.mark.case("B14")
def test_a_job_that_never_began_says_why(
    point: Point, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """submitit's own log has the cause; the run has none, because its process did not start."""
    (run,) = plan([point()]).runs
    run.freeze()
    run.folder.write_job("12_3")
    logs = run.folder.path.parent / ".submitit/vm-1"
    logs.mkdir(parents=True)
    (logs / "12_3_0_log.err").write_text("a line\nFileNotFoundError: 'scontrol'\n\n")
    (logs / "12_31_0_log.err").write_text("of another job\n")
    monkeypatch.setattr(slurm, "queue", dict)
    monkeypatch.setattr(slurm, "ends", lambda jobs: dict.fromkeys(jobs, "FAILED"))
    (status,) = read_statuses([run.folder])
    assert status.note == "job 12_3 has left the SLURM queue: FAILED; FileNotFoundError: 'scontrol'"
    assert main(["logs", str(run.folder.path)]) == 0
    assert "job 12_3: FileNotFoundError: 'scontrol'" in capsys.readouterr().out


@pytest.mark.parametrize("reported", [12, 24])
def test_a_stopped_run_has_the_step_that_it_resumes_from(tmp_path: Path, reported: int) -> None:
    folder = MadeUp(tmp_path).folder()
    folder.write_progress(Progress("training", reported, 32, reported, 32, reported * 8, 256, loss=0.5))
    (folder.checkpoints / "step-00000020").mkdir(parents=True)
    progress = progress_of(folder, State.resumable)
    assert progress is not None
    assert (progress.step, progress.tokens, progress.loss) == (20, 160, None)
    with pytest.raises(UserError, match="it is resumable, at step 20 of 32"):
        finished(folder.path)
    (row,) = status_rows([folder])
    assert row.steps == "20/32"
    with held(folder.path):
        (row,) = status_rows([folder])
        assert row.steps == f"{reported}/32"
    shutil.rmtree(folder.checkpoints)
    (row,) = status_rows([folder])
    assert (row.state, row.steps) == (State.new, "0/32")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([None], "nothing to save yet, because no step was taken"),
        ([40], "step 40 is saved, the same command resumes from there"),
        (
            [40, 1038, None],
            "2 runs: steps 40 to 1,038 are saved, the same command resumes from there; "
            "1 run: nothing to save yet, because no step was taken",
        ),
    ],
)
def test_a_stop_says_what_is_saved(steps: list[int | None], message: str, tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / str(number)) for number in range(len(steps))]
    for folder, step in zip(folders, steps, strict=True):
        if step is not None:
            (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
            (folder.checkpoints / "step-00000002").mkdir()
            (folder.checkpoints / ".step-99999999.host.1").mkdir()  # not finished
    assert what_is_saved(folders) == message
