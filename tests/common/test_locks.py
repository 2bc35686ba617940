"""A run has at most one holder, and a dead process holds no run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sae_lora.common import locks
from sae_lora.common.errors import UserError
from sae_lora.common.locks import HeldError, Holder, LostError, held, holder

ELSEWHERE = Holder("elsewhere", 1, "another machine", "0")


def write(folder: Path, number: int, process: Holder | None, age_s: float = 0.0) -> Path:
    """Write a lease of this process (`None`: a free one), last touched `age_s` seconds ago."""
    file = folder / ".lease" / f"{number:08d}"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(process and dataclasses.asdict(process)))
    touched = time.time() - age_s
    os.utime(file, (touched, touched))
    return file


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with held(tmp_path):
        assert holder(tmp_path) == Holder.this_process()
        with pytest.raises(HeldError, match=f"PID {os.getpid()} on"), held(tmp_path):
            pass
    assert holder(tmp_path) is None
    with held(tmp_path) as again:
        again.check()


def test_an_exception_frees_the_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        raise ZeroDivisionError
    assert holder(tmp_path) is None


@pytest.mark.parametrize(
    ("process", "age_s", "is_held"),
    [
        (ELSEWHERE, 0, True),
        (ELSEWHERE, locks.STALE_S + 5, False),
        (
            dataclasses.replace(Holder.this_process(), started="1"),
            0,
            False,
        ),  # a reused PID
        (dataclasses.replace(Holder.this_process(), pid=2**22 + 1), 0, False),
        (Holder.this_process(), locks.STALE_S + 5, True),  # not touched for long, but alive
        (None, 0, False),
    ],
)
def test_which_holders_count_as_alive(
    tmp_path: Path, process: Holder | None, age_s: float, is_held: bool
) -> None:
    write(tmp_path, 4, process, age_s)
    assert (holder(tmp_path) is not None) is is_held
    if is_held:
        with pytest.raises(HeldError), held(tmp_path):
            pass
    else:
        with held(tmp_path):
            assert [path.name for path in (tmp_path / ".lease").iterdir()] == ["00000005"]


def test_a_requeued_job_frees_its_earlier_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A requeued job can hold its run at once; another node of the same start cannot."""
    write(tmp_path, 1, dataclasses.replace(ELSEWHERE, slurm_job="77", slurm_restart=0))
    assert holder(tmp_path) is not None
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert holder(tmp_path) is not None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert holder(tmp_path) is None


def test_a_file_in_place_of_the_leases_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lease").write_text("")
    with (
        pytest.raises(UserError, match=r"\.lease must be a folder, and is a file: delete it"),
        held(tmp_path),
    ):
        pass


def test_a_folder_in_place_of_a_lease_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / ".lease/00000007").mkdir(parents=True)
    assert holder(tmp_path) is None
    with held(tmp_path):
        assert holder(tmp_path) == Holder.this_process()
    assert holder(tmp_path) is None and (tmp_path / ".lease/00000007").is_dir()


def test_an_empty_lease_file_counts_as_held(tmp_path: Path) -> None:
    write(tmp_path, 1, None).write_text("")
    assert holder(tmp_path) is not None


def test_a_process_notices_that_its_lease_was_taken_over(tmp_path: Path) -> None:
    with held(tmp_path, renew_s=0.01) as lease:
        lease.check()
        write(tmp_path, 2, ELSEWHERE)
        with pytest.raises(LostError):
            lease.check()
    assert holder(tmp_path) == ELSEWHERE


def test_the_holder_touches_its_lease(tmp_path: Path) -> None:
    with held(tmp_path, renew_s=0.01):
        (file,) = (tmp_path / ".lease").iterdir()
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_killed_process_frees_the_run(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from sae_lora.common.locks import held\n"
        "with held(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    current = holder(tmp_path)
    assert current is not None
    assert current.pid == process.pid
    process.send_signal(signal.SIGKILL)
    process.wait()
    with held(tmp_path):
        pass


@pytest.mark.parametrize("last_holder", ["none", "dead", "ended"])
def test_of_many_attempts_at_once_only_one_succeeds(tmp_path: Path, last_holder: str) -> None:
    inside: list[int] = []

    def attempt(number: int) -> int:
        try:
            with held(folder):
                inside.append(number)
                time.sleep(0.01)
                assert inside == [number]
                inside.clear()
                return 1
        except HeldError:
            return 0

    for round_ in range(40):
        folder = tmp_path / str(round_)
        folder.mkdir()
        if last_holder != "none":
            write(folder, 3, ELSEWHERE if last_holder == "dead" else None, age_s=locks.STALE_S + 60)
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(attempt, range(8))) >= 1
