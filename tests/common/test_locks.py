"""A run has one holder, and none once that holder is dead."""

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
from sae_lora.common.locks import HeldError, Holder, LostError, held, holder

ELSEWHERE = Holder("elsewhere", 1, "another machine", "0")


def write(folder: Path, number: int, of: Holder | None, age_s: float = 0.0) -> Path:
    file = folder / ".lease" / f"{number:08d}"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(of and dataclasses.asdict(of)))
    then = time.time() - age_s
    os.utime(file, (then, then))
    return file


def test_one_at_a_time(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with held(tmp_path):
        assert holder(tmp_path) == Holder.here()
        with pytest.raises(HeldError, match=f"number {os.getpid()} on"), held(tmp_path):
            pass
    assert holder(tmp_path) is None
    with held(tmp_path) as again:
        again.check()


def test_it_ends_with_an_exception_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        raise ZeroDivisionError
    assert holder(tmp_path) is None


@pytest.mark.parametrize(
    ("of", "age_s", "is_held"),
    [
        (ELSEWHERE, 0, True),
        (ELSEWHERE, locks.STALE_S + 5, False),
        (dataclasses.replace(Holder.here(), started="1"), 0, False),  # the number was given out anew
        (dataclasses.replace(Holder.here(), pid=2**22 + 1), 0, False),
        (Holder.here(), locks.STALE_S + 5, True),  # slow, but seen to be alive
        (None, 0, False),
    ],
)
def test_who_counts_as_alive(tmp_path: Path, of: Holder | None, age_s: float, is_held: bool) -> None:
    write(tmp_path, 4, of, age_s)
    assert (holder(tmp_path) is not None) is is_held
    if is_held:
        with pytest.raises(HeldError), held(tmp_path):
            pass
    else:
        with held(tmp_path):
            assert [path.name for path in (tmp_path / ".lease").iterdir()] == ["00000005"]


def test_what_slurm_cut_off_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A requeued job takes its own run up at once; another node of the same start does not."""
    write(tmp_path, 1, dataclasses.replace(ELSEWHERE, slurm_job="77", slurm_restart=0))
    assert holder(tmp_path) is not None
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert holder(tmp_path) is not None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert holder(tmp_path) is None


def test_a_lease_that_is_not_yet_written_counts(tmp_path: Path) -> None:
    write(tmp_path, 1, None).write_text("")
    assert holder(tmp_path) is not None


def test_who_was_taken_for_dead_notices(tmp_path: Path) -> None:
    with held(tmp_path, renew_s=0.01) as mine:
        mine.check()
        write(tmp_path, 2, ELSEWHERE)
        with pytest.raises(LostError):
            mine.check()
    assert holder(tmp_path) == ELSEWHERE


def test_it_is_renewed(tmp_path: Path) -> None:
    with held(tmp_path, renew_s=0.01):
        (file,) = (tmp_path / ".lease").iterdir()
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_killed_holder_leaves_it_free(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from sae_lora.common.locks import held\n"
        "with held(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    found = holder(tmp_path)
    assert found is not None
    assert found.pid == process.pid
    process.send_signal(signal.SIGKILL)
    process.wait()
    with held(tmp_path):
        pass


@pytest.mark.parametrize("after", ["nobody", "a dead one", "one that has ended"])
def test_of_many_at_once_one_has_it(tmp_path: Path, after: str) -> None:
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
        if after != "nobody":
            write(folder, 3, ELSEWHERE if after == "a dead one" else None, age_s=locks.STALE_S + 60)
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(attempt, range(8))) >= 1
