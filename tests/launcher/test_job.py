"""A job: a failed run does not stop other runs, and a stopped job can continue."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from sae_lora.common import lazy_imports
from sae_lora.common.locks import held
from sae_lora.launcher.job import Job, RunFailedError, how_it_ended
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import Progress

RUN = """
import json, os, pathlib, signal, sys, time
folders = [pathlib.Path(path) for path in sys.argv[1:]]
with open(folders[0].parent / "attempts.txt", "a") as file:
    print(*(folder.name for folder in folders), file=file)
if len(folders) > 2 and any("big" in folder.name for folder in folders):
    sys.exit(print("OutOfMemoryError: no room", flush=True) or 74)
code = 0
for folder in folders:
    match folder.name.split("-")[0]:
        case "good" | "big":
            (folder / "summary.json").write_text("{}")
        case "exit":
            print("about to leave", flush=True)
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            sys.exit(75)
        case "unready":
            os.kill(os.getpid(), signal.SIGTERM)
        case "elsewhere":
            code = 73
        case "fails":
            (folder / "failure.json").write_text(json.dumps({"message": "a reason", "details": ""}))
            code = 1
        case "slow":
            def stop(*_):
                (folder / "saved").write_text("")
                sys.exit(75)
            signal.signal(signal.SIGUSR2, stop)
            (folder / "ready").write_text("")
            time.sleep(60)
        case "hangs":
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            (folder / "ready").write_text("")
            time.sleep(60)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def runs_are_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m sae_lora.run.execute` becomes a script whose action is the name of the folder."""
    package = tmp_path / "stand_in/sae_lora"
    for room in ("common", "run"):
        (package / room).mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copy(lazy_imports.__file__, package / "common")
    # The script ends its process when it is imported.
    (package / "run/execute.py").write_text(RUN)


def job_of(tmp_path: Path, *names: str, time_s: float = 3600, answer_s: float = 30) -> Job:
    for name in names:
        (tmp_path / name).mkdir()
    environment = {"PYTHONPATH": str(tmp_path / "stand_in"), "PYTHONSAFEPATH": "1"}
    return Job([tmp_path / name for name in names], environment, time_s, answer_s)


def test_a_failed_run_does_not_stop_other_runs(tmp_path: Path) -> None:
    names = ["good-1", "exit-1", "kill-1", "fails-1", "good-2"]
    with pytest.raises(RunFailedError) as raised:
        job_of(tmp_path, *names)()
    folders = {name: RunFolder(tmp_path / name) for name in names}
    assert folders["good-1"].is_finished
    assert folders["good-2"].is_finished
    assert folders["exit-1"].failure_message == "exited with code 3 and no error message"
    assert "about to leave" in folders["exit-1"].failure.read_text()
    assert folders["kill-1"].failure_message == "killed by SIGKILL (out of memory, or killed by hand)"
    assert folders["fails-1"].failure_message == "a reason"
    for name in ("exit-1", "kill-1", "fails-1"):
        assert name in str(raised.value)
    assert "good" not in str(raised.value)


def attempts(tmp_path: Path) -> list[list[str]]:
    """The names of the runs of each attempt."""
    return [line.split() for line in (tmp_path / "attempts.txt").read_text().splitlines()]


def test_a_pack_is_split_until_the_failing_run_is_isolated(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="kill-1: killed by SIGKILL"):
        job_of(tmp_path, "big-1", "kill-1", "good-1", "good-2")()
    assert attempts(tmp_path) == [
        ["big-1", "kill-1", "good-1", "good-2"],  # the big run does not fit with three others
        ["big-1", "kill-1"],
        ["kill-1"],
        ["good-1", "good-2"],
    ]
    log = (tmp_path / "big-1/log.txt").read_text()
    assert "OutOfMemoryError: no room; continuing in a pack of 2" in log
    assert "trains together with big-1" in (tmp_path / "good-2/log.txt").read_text()


def test_a_pack_that_is_too_large_for_memory_is_split(tmp_path: Path) -> None:
    job_of(tmp_path, *(f"big-{number}" for number in range(5)))()
    assert [len(pack) for pack in attempts(tmp_path)] == [5, 3, 2, 1, 2]
    assert all(RunFolder(tmp_path / f"big-{number}").is_finished for number in range(5))


def test_a_run_that_another_process_holds_has_not_failed(tmp_path: Path) -> None:
    job_of(tmp_path, "good-1", "elsewhere-1", "good-2")()
    assert len(attempts(tmp_path)) == 1
    assert not RunFolder(tmp_path / "elsewhere-1").has_failed


def test_a_pack_without_progress_is_split(tmp_path: Path) -> None:
    job = job_of(tmp_path, "hangs-1", "good-1", time_s=0.06, answer_s=0.3)
    assert interrupted(job, tmp_path / "hangs-1/ready") is not None
    assert not RunFolder(tmp_path / "hangs-1").has_failed
    (tmp_path / "hangs-1/ready").unlink()
    assert interrupted(job, tmp_path / "hangs-1/ready") is not None  # it hangs; the other run remains
    assert RunFolder(tmp_path / "hangs-1").has_failed
    with pytest.raises(RunFailedError, match="hangs-1: hangs"):
        job()
    assert RunFolder(tmp_path / "good-1").is_finished


def test_a_job_that_restarts_after_a_lost_node_repeats_no_run(tmp_path: Path) -> None:
    """SLURM then starts the pickle of the submission again."""
    with pytest.raises(RunFailedError):
        job_of(tmp_path, "good-1", "exit-1")()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    again = Job([tmp_path / "good-1", tmp_path / "exit-1"], {}, 3600)
    with pytest.raises(RunFailedError, match="exit-1: exited with code 3"):
        again()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == times


class Requeued(Exception):
    """Stand-in for submitit's exit after it has requeued the job."""


def interrupted(job: Job, ready: Path) -> object:
    """Call the job, send the signal when its run is ready, and return the result of checkpoint()."""
    results = []

    def handler(number: int, frame: object) -> None:
        results.append(job.checkpoint())
        raise Requeued

    def send() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    previous = signal.signal(signal.SIGUSR2, handler)
    try:
        threading.Thread(target=send).start()
        with pytest.raises(Requeued):
            job()
    finally:
        signal.signal(signal.SIGUSR2, previous)
    return results[0]


def test_a_stopped_job_lets_its_run_save(tmp_path: Path) -> None:
    job = job_of(tmp_path, "good-1", "slow-1", "good-2")
    requeued = interrupted(job, tmp_path / "slow-1/ready")
    assert (tmp_path / "slow-1/saved").exists()
    assert requeued is not None
    assert not RunFolder(tmp_path / "good-2").is_finished
    assert not RunFolder(tmp_path / "slow-1").has_failed


def test_a_run_without_progress_that_does_not_stop_hangs(tmp_path: Path) -> None:
    job = job_of(tmp_path, "hangs-1", time_s=0.06, answer_s=0.3)
    assert interrupted(job, tmp_path / "hangs-1/ready") is None
    message = RunFolder(tmp_path / "hangs-1").failure_message
    assert message is not None
    assert message.startswith("hangs after step 0")
    assert "no response to the request to stop" in message


def test_a_run_without_progress_in_its_whole_time_hangs(tmp_path: Path) -> None:
    job = job_of(tmp_path, "slow-1", time_s=0.06)
    assert interrupted(job, tmp_path / "slow-1/ready") is None
    assert RunFolder(tmp_path / "slow-1").has_failed


def test_a_run_with_progress_does_not_hang(tmp_path: Path) -> None:
    job = job_of(tmp_path, "hangs-1", time_s=0.06, answer_s=0.3)
    RunFolder(tmp_path / "hangs-1").write_progress(Progress("training", step=7, steps=9))
    assert interrupted(job, tmp_path / "hangs-1/ready") is not None
    (tmp_path / "hangs-1/ready").unlink()
    assert interrupted(job, tmp_path / "hangs-1/ready") is None  # no progress in the second attempt


@pytest.mark.parametrize("name", ["stopped-1", "unready-1"])
def test_a_run_that_was_stopped_has_not_failed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On SLURM the job waits: the preemption that stopped its run will also stop the job."""
    waited = []
    monkeypatch.setattr(Job, "_wait_until_stopped", lambda job: waited.append(attempts(tmp_path)))
    with pytest.raises(RunFailedError, match=f"{name}: stopped by a signal; good-1: stopped"):
        job_of(tmp_path, name, "good-1")()
    assert waited == [[[name, "good-1"]]]
    assert not RunFolder(tmp_path / name).has_failed


def test_a_run_preempted_before_its_first_step_does_not_hang(tmp_path: Path) -> None:
    job = job_of(tmp_path, "hangs-1", answer_s=0.3)
    assert interrupted(job, tmp_path / "hangs-1/ready") is not None
    assert not RunFolder(tmp_path / "hangs-1").has_failed


def test_exit_codes_are_described() -> None:
    assert how_it_ended(1, "Traceback\nImportError: no torch\n").endswith("1: ImportError: no torch")
    assert "SIGSEGV" in how_it_ended(-signal.SIGSEGV)
    assert "code 9" in how_it_ended(9)


def test_a_run_that_another_launch_has_taken_up_is_left_to_it(tmp_path: Path) -> None:
    """Such as one that was outranked in this job."""
    job = job_of(tmp_path, "good-1", "stopped-2")
    with held(tmp_path / "stopped-2"):
        job()
    assert attempts(tmp_path) == [["good-1"]]
