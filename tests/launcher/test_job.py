"""A job: its runs end each for itself, and it can be stopped and go on."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from sae_lora.common import lazy_imports
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
        case "says":
            (folder / "failure.json").write_text(json.dumps({"message": "a reason", "details": ""}))
            code = 1
        case "slow":
            def stop(*_):
                (folder / "saved").write_text("")
                sys.exit(75)
            signal.signal(signal.SIGUSR2, stop)
            (folder / "ready").write_text("")
            time.sleep(60)
        case "deaf":
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            (folder / "ready").write_text("")
            time.sleep(60)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def runs_are_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m sae_lora.run.execute` is a script that does what the folder is named for."""
    package = tmp_path / "stand_in/sae_lora"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copy(lazy_imports.__file__, package)
    # What is started is a script, which ends its process as it is imported.
    (package / "run.py").write_text(RUN)


def job_of(tmp_path: Path, *names: str, time_s: float = 3600, answer_s: float = 30) -> Job:
    for name in names:
        (tmp_path / name).mkdir()
    environment = {"PYTHONPATH": str(tmp_path / "stand_in"), "PYTHONSAFEPATH": "1"}
    return Job([tmp_path / name for name in names], environment, time_s, answer_s)


def test_a_failed_run_hurts_no_other(tmp_path: Path) -> None:
    names = ["good-1", "exit-1", "kill-1", "says-1", "good-2"]
    with pytest.raises(RunFailedError) as raised:
        job_of(tmp_path, *names)()
    folders = {name: RunFolder(tmp_path / name) for name in names}
    assert folders["good-1"].is_finished
    assert folders["good-2"].is_finished
    assert folders["exit-1"].failure_message == "ended with exit code 3 and no error message"
    assert "about to leave" in folders["exit-1"].failure.read_text()
    assert folders["kill-1"].failure_message == "killed by SIGKILL (out of memory, or killed by hand)"
    assert folders["says-1"].failure_message == "a reason"
    for name in ("exit-1", "kill-1", "says-1"):
        assert name in str(raised.value)
    assert "good" not in str(raised.value)


def attempts(tmp_path: Path) -> list[list[str]]:
    """The runs of every attempt so far."""
    return [line.split() for line in (tmp_path / "attempts.txt").read_text().splitlines()]


def test_what_ends_a_pack_is_traced_to_the_run_whose_doing_it_is(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="kill-1: killed by SIGKILL"):
        job_of(tmp_path, "big-1", "kill-1", "good-1", "good-2")()
    assert attempts(tmp_path) == [
        ["big-1", "kill-1", "good-1", "good-2"],  # too many for the big one
        ["big-1", "kill-1"],
        ["kill-1"],
        ["good-1", "good-2"],
    ]
    assert "OutOfMemoryError: no room; going on with 2" in (tmp_path / "big-1/log.txt").read_text()
    assert "trains together with big-1" in (tmp_path / "good-2/log.txt").read_text()


def test_too_many_for_the_memory_go_on_as_fewer(tmp_path: Path) -> None:
    job_of(tmp_path, *(f"big-{number}" for number in range(5)))()
    assert [len(pack) for pack in attempts(tmp_path)] == [5, 3, 2, 1, 2]
    assert all(RunFolder(tmp_path / f"big-{number}").is_finished for number in range(5))


def test_what_another_process_has_is_no_failure(tmp_path: Path) -> None:
    job_of(tmp_path, "good-1", "elsewhere-1", "good-2")()
    assert len(attempts(tmp_path)) == 1
    assert not RunFolder(tmp_path / "elsewhere-1").has_failed


def test_a_pack_that_gets_nowhere_is_split(tmp_path: Path) -> None:
    one = job_of(tmp_path, "deaf-1", "good-1", time_s=0.06, answer_s=0.3)
    assert interrupted(one, tmp_path / "deaf-1/ready") is not None
    assert not RunFolder(tmp_path / "deaf-1").has_failed
    (tmp_path / "deaf-1/ready").unlink()
    assert interrupted(one, tmp_path / "deaf-1/ready") is not None  # it hangs; the other is left
    assert RunFolder(tmp_path / "deaf-1").has_failed
    with pytest.raises(RunFailedError, match="deaf-1: hangs"):
        one()
    assert RunFolder(tmp_path / "good-1").is_finished


def test_started_anew_without_a_word_it_repeats_nothing(tmp_path: Path) -> None:
    """As SLURM does after a node was lost: the pickle is that of the submission."""
    with pytest.raises(RunFailedError):
        job_of(tmp_path, "good-1", "exit-1")()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    again = Job([tmp_path / "good-1", tmp_path / "exit-1"], {}, 3600)
    with pytest.raises(RunFailedError, match="exit-1: ended with exit code 3"):
        again()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == before


class Requeued(Exception):
    """What stands for submitit's exit after it has requeued the job."""


def interrupted(one: Job, ready: Path) -> object:
    """Calls the job and, once its run is ready, sends the signal; returns what checkpoint() gave."""
    given = []

    def handler(number: int, frame: object) -> None:
        given.append(one.checkpoint())
        raise Requeued

    def send() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        threading.Thread(target=send).start()
        with pytest.raises(Requeued):
            one()
    finally:
        signal.signal(signal.SIGUSR2, before)
    return given[0]


def test_asked_to_stop_it_lets_the_run_save(tmp_path: Path) -> None:
    one = job_of(tmp_path, "good-1", "slow-1", "good-2")
    later = interrupted(one, tmp_path / "slow-1/ready")
    assert (tmp_path / "slow-1/saved").exists()
    assert later is not None
    assert not RunFolder(tmp_path / "good-2").is_finished
    assert not RunFolder(tmp_path / "slow-1").has_failed


def test_a_run_that_does_not_answer_and_gets_nowhere_hangs(tmp_path: Path) -> None:
    one = job_of(tmp_path, "deaf-1", time_s=0.06, answer_s=0.3)
    assert interrupted(one, tmp_path / "deaf-1/ready") is None
    message = RunFolder(tmp_path / "deaf-1").failure_message
    assert message is not None
    assert message.startswith("hangs after step 0")
    assert "no answer when asked to stop" in message


def test_a_run_that_answers_and_gets_nowhere_in_all_its_time_hangs(tmp_path: Path) -> None:
    one = job_of(tmp_path, "slow-1", time_s=0.06)
    assert interrupted(one, tmp_path / "slow-1/ready") is None
    assert RunFolder(tmp_path / "slow-1").has_failed


def test_a_run_that_gets_on_is_no_hang(tmp_path: Path) -> None:
    one = job_of(tmp_path, "deaf-1", time_s=0.06, answer_s=0.3)
    RunFolder(tmp_path / "deaf-1").write_progress(Progress("training", step=7, steps=9))
    assert interrupted(one, tmp_path / "deaf-1/ready") is not None
    (tmp_path / "deaf-1/ready").unlink()
    assert interrupted(one, tmp_path / "deaf-1/ready") is None  # the second time it got no further


@pytest.mark.parametrize("name", ["stopped-1", "unready-1"])
def test_a_run_that_was_asked_to_stop_has_not_failed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On SLURM the job waits: what asked its run, a preemption perhaps, comes to it too."""
    waited = []
    monkeypatch.setattr(Job, "_wait_for_the_end", lambda job: waited.append(attempts(tmp_path)))
    with pytest.raises(RunFailedError, match=f"{name}: stopped by a signal; good-1: stopped"):
        job_of(tmp_path, name, "good-1")()
    assert waited == [[[name, "good-1"]]]
    assert not RunFolder(tmp_path / name).has_failed


def test_preempted_before_its_first_step_it_does_not_hang(tmp_path: Path) -> None:
    one = job_of(tmp_path, "deaf-1", answer_s=0.3)
    assert interrupted(one, tmp_path / "deaf-1/ready") is not None
    assert not RunFolder(tmp_path / "deaf-1").has_failed


def test_exit_codes_in_words() -> None:
    assert how_it_ended(1, "Traceback\nImportError: no torch\n").endswith("1: ImportError: no torch")
    assert "SIGSEGV" in how_it_ended(-signal.SIGSEGV)
    assert "exit code 9" in how_it_ended(9)
