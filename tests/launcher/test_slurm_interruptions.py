"""Preemption, time limits and dead nodes on SLURM: runs resume and give the same results."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_lora.config.serialize import load
from sae_lora.records.status import State, read_statuses
from tests.support.attempts import results
from tests.support.cluster import Cluster, running
from tests.support.points import folders_in, points_in, run_here
from tests.support.submission import (
    LONG,
    NEEDS_SLURM,
    go_on,
    halt,
    is_asked_to_stop,
    occupy,
    submitted,
    the_run,
    until,
)

pytestmark = NEEDS_SLURM


@pytest.fixture(scope="module")
def gentle() -> Iterator[Cluster]:
    """A cluster that sends only SIGTERM to preempted jobs, as SLURM does by default."""
    with running(signal_on_preemption=False, grace_s=15) as started:
        yield started


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Results of the long run on this machine without interruption."""
    point = points_in(tmp_path_factory.mktemp("uninterrupted"))
    (folder,) = run_here(point(*LONG))
    return results(folder)


def test_a_preempted_run_resumes_with_the_same_results(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, object]
) -> None:
    """With another run in the same pack."""
    two = "-m", "lora.rank=2,4", "launcher.partition=low"
    assert submitted(tmp_path, *LONG, *two).returncode == 0
    folders = folders_in(tmp_path)
    pid = halt(*folders, step=15)
    occupy(cluster, 3)
    until(lambda: is_asked_to_stop(pid), "a signal")
    go_on(pid)
    queued = [State.queued, State.queued]
    until(lambda: [status.state for status in read_statuses(folders)] == queued, "the runs wait again")
    until(lambda: all(folder.is_finished or folder.has_failed for folder in folders), "the runs")
    assert [folder.failure_message for folder in folders] == [None, None]
    (folder,) = [each for each in folders if load(each.config.read_text()).lora.rank == 2]
    assert sum(each.log.read_text().count("resuming from step") for each in folders) == 2
    assert results(folder) == uninterrupted


def test_a_run_preempted_with_only_sigterm_resumes(
    gentle: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run saves long before the end of its grace period.

    It is on two nodes: SLURM signals the processes on both, and the worker ends too.
    """
    for name, value in gentle.environment.items():
        monkeypatch.setenv(name, value)
    options = "launcher.nodes=2", "launcher.processes_per_node=1", "launcher.signal_delay_s=5"
    assert submitted(tmp_path, *LONG, *options).returncode == 0
    folder = the_run(tmp_path)
    pid = halt(folder, step=15)
    occupy(gentle, 3)
    until(lambda: is_asked_to_stop(pid), "a signal")
    go_on(pid)
    until(lambda: folder.is_finished or folder.has_failed, "the run", 400)
    assert folder.is_finished, folder.failure_message
    assert "resuming from step" in folder.log.read_text()


def test_a_run_resumes_after_a_time_limit(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, object]
) -> None:
    # SLURM checks every 30 s and may warn 30 s too early; the run must already train at that time.
    limits = "launcher.timeout_min=2", "launcher.signal_delay_s=30"
    assert submitted(tmp_path, *LONG, *limits).returncode == 0
    folder = the_run(tmp_path)
    pid = halt(folder, step=15)
    until(lambda: is_asked_to_stop(pid), "the warning")
    go_on(pid)
    until(lambda: folder.is_finished or folder.has_failed, "the run", 400)
    assert folder.is_finished, folder.failure_message
    assert "resuming from step" in folder.log.read_text()
    assert results(folder) == uninterrupted


def test_a_dead_node_loses_only_steps_after_the_checkpoint(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, object]
) -> None:
    assert submitted(tmp_path, *LONG).returncode == 0
    folder = the_run(tmp_path)
    halt(folder, step=25)
    node = cluster.command("squeue", "--noheader", "--format=%N")
    progress = folder.read_progress()
    assert progress is not None
    cluster.kill_node(node)
    try:
        until(lambda: folder.is_finished or folder.has_failed, "the run", 300)
    finally:
        cluster.start_node(node)
    assert folder.is_finished, folder.failure_message
    (resumed_at,) = re.findall(r"resuming from step (\d+) of", folder.log.read_text())
    assert int(resumed_at) >= progress.step - 10
    assert results(folder) == uninterrupted


def test_nodes_share_the_batches_of_a_pack(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """Four processes on two nodes divide the model and give the results of one, also after a stop."""
    two = "launcher.nodes=2", "launcher.processes_per_node=2", "launcher.shard=on"
    assert submitted(tmp_path / "two", *LONG, *two).returncode == 0
    folder = the_run(tmp_path / "two")
    pid = halt(folder, step=25)
    assert len(cluster.command("squeue", "--noheader", "--steps", "--format=%i").splitlines()) >= 2
    occupy(cluster, 5)  # the processes save and stop, and start again when the nodes are free
    until(lambda: is_asked_to_stop(pid), "a signal")
    go_on(pid)
    until(lambda: folder.is_finished or folder.has_failed, "the run", 400)
    assert folder.is_finished, folder.failure_message
    assert "resuming from step" in folder.log.read_text()
    for point, expected in zip(folder.read_curve(), uninterrupted["curve"], strict=True):
        assert point.student_ce == pytest.approx(expected["student_ce"], rel=2e-3)
        assert point.base_ce == pytest.approx(expected["base_ce"], rel=1e-6)
