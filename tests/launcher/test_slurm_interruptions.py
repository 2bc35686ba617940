"""What SLURM does to runs: preemption, time limits, dead nodes. They go on, and end the same."""

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
    """Tells jobs that it preempts by SIGTERM alone, as SLURM does by default."""
    with running(signal_on_preemption=False, grace_s=15) as started:
        yield started


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the long run finds on this machine when nothing befalls it."""
    point = points_in(tmp_path_factory.mktemp("uninterrupted"))
    (folder,) = run_here(point(*LONG))
    return results(folder)


def test_preempted_it_goes_on_and_ends_the_same(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, object]
) -> None:
    """The run, and another that trains with it."""
    two = "-m", "lora.rank=2,4", "launcher.partition=low"
    assert submitted(tmp_path, *LONG, *two).returncode == 0
    folders = folders_in(tmp_path)
    pid = halt(*folders, step=15)
    occupy(cluster, 3)
    until(lambda: is_asked_to_stop(pid), "a signal")
    go_on(pid)
    queued = [State.queued, State.queued]
    until(lambda: [one.state for one in read_statuses(folders)] == queued, "the runs wait again")
    until(lambda: all(one.is_finished or one.has_failed for one in folders), "the runs")
    assert [one.failure_message for one in folders] == [None, None]
    (folder,) = [one for one in folders if load(one.config.read_text()).lora.rank == 2]
    assert sum(one.log.read_text().count("going on from step") for one in folders) == 2
    assert results(folder) == uninterrupted


@pytest.mark.parametrize("nodes", [1, 2])
def test_preempted_with_sigterm_alone_it_goes_on(
    gentle: Cluster,
    tmp_path: Path,
    uninterrupted: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    nodes: int,
) -> None:
    """The run has saved long before its time of grace is over.

    On several nodes SLURM tells the processes of all, and those that the leader has started do not
    live on.
    """
    for name, value in gentle.environment.items():
        monkeypatch.setenv(name, value)
    over = f"launcher.nodes={nodes}", "launcher.processes_per_node=1", "launcher.signal_delay_s=5"
    assert submitted(tmp_path, *LONG, *over).returncode == 0
    folder = the_run(tmp_path)
    pid = halt(folder, step=15)
    occupy(gentle, 3)
    until(lambda: is_asked_to_stop(pid), "a signal")
    go_on(pid)
    until(lambda: folder.is_finished or folder.has_failed, "the run", 400)
    assert folder.is_finished, folder.failure_message
    assert "going on from step" in folder.log.read_text()
    if nodes == 1:  # several add up in another order
        assert results(folder) == uninterrupted


def test_a_time_limit_is_survived(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, object]
) -> None:
    # SLURM looks every 30 s, and may warn that much too early: the run is to be at work by then.
    limits = "launcher.timeout_min=2", "launcher.signal_delay_s=30"
    assert submitted(tmp_path, *LONG, *limits).returncode == 0
    folder = the_run(tmp_path)
    pid = halt(folder, step=15)
    until(lambda: is_asked_to_stop(pid), "the warning")
    go_on(pid)
    until(lambda: folder.is_finished or folder.has_failed, "the run", 400)
    assert folder.is_finished, folder.failure_message
    assert "going on from step" in folder.log.read_text()
    assert results(folder) == uninterrupted


def test_a_dead_node_costs_what_came_after_the_checkpoint(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, object]
) -> None:
    assert submitted(tmp_path, *LONG).returncode == 0
    folder = the_run(tmp_path)
    halt(folder, step=25)
    node = cluster.command("squeue", "--noheader", "--format=%N")
    reached = folder.read_progress()
    assert reached is not None
    cluster.kill_node(node)
    try:
        until(lambda: folder.is_finished or folder.has_failed, "the run", 300)
    finally:
        cluster.start_node(node)
    assert folder.is_finished, folder.failure_message
    (line,) = [line for line in folder.log.read_text().splitlines() if "going on from step" in line]
    assert int(line.split()[4]) >= reached.step - 10
    assert results(folder) == uninterrupted


def test_nodes_share_the_batches_of_a_pack(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """Four processes on two nodes find what one does; stopped, they go on."""
    two = "launcher.nodes=2", "launcher.processes_per_node=2"
    assert submitted(tmp_path / "two", *LONG, *two).returncode == 0
    folder = the_run(tmp_path / "two")
    pid = halt(folder, step=25)
    assert len(cluster.command("squeue", "--noheader", "--steps", "--format=%i").splitlines()) >= 2
    occupy(cluster, 5)  # asked to stop, they save, and begin again when the nodes are free
    until(lambda: is_asked_to_stop(pid), "a signal")
    go_on(pid)
    until(lambda: folder.is_finished or folder.has_failed, "the run", 400)
    assert folder.is_finished, folder.failure_message
    assert "going on from step" in folder.log.read_text()
    for one, other in zip(folder.read_curve(), uninterrupted["curve"], strict=True):
        assert one.student_ce == pytest.approx(other["student_ce"], rel=2e-3)
        assert one.base_ce == pytest.approx(other["base_ce"], rel=1e-6)
