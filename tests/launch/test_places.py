"""Places on this machine: a GPU each, or a share of the cores."""

import os
from pathlib import Path

import pytest

from sae_lora.launch import packs as room
from sae_lora.launch.plan import Run, plan
from tests.support.points import points_in


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return plan([points_in(tmp_path)()]).runs


def places(runs: list[Run], **settings: int | None) -> list[dict[str, str]]:
    launcher = runs[0].config.launcher
    for name, value in settings.items():
        setattr(launcher, name, value)
    return room.places(runs, launcher)


def test_every_gpu_takes_one_run(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5,GPU-abc")
    found = [place["CUDA_VISIBLE_DEVICES"] for place in places(runs)]
    assert found == ["2", "5", "GPU-abc"]
    found = [place["CUDA_VISIBLE_DEVICES"] for place in places(runs, max_parallel=4)]
    assert found == ["2", "5", "GPU-abc", "2"]


def test_without_a_gpu_runs_go_one_after_another_with_all_cores(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert places(runs) == [{}]


def test_runs_at_the_same_time_share_the_cores(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    assert places(runs, max_parallel=3) == [{"OMP_NUM_THREADS": "5"}] * 3
    assert places(runs, max_parallel=3, cpus_per_task=2) == [{"OMP_NUM_THREADS": "2"}] * 3


def test_a_run_that_is_to_compute_on_the_cpu_takes_no_gpu(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    runs[0].config.train.device = type(runs[0].config.train.device).cpu
    assert places(runs) == [{}]
