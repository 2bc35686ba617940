"""The launcher on a real SLURM: array jobs, preemption, time limits, dead nodes, cancellation."""

import contextlib
import getpass
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_lora.__main__ import main
from sae_lora.conversion import load
from sae_lora.lease import holder
from sae_lora.records import RunFolder
from sae_lora.standing import State, standings
from tests.attempts import results
from tests.cluster import Cluster, missing_programs, running
from tests.commands import REPOSITORY, launch
from tests.hub import COMMIT, serving
from tests.points import SMALL, folders_in
from tests.repositories import write_all

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_programs()), reason=f"SLURM is not installed: {missing_programs()}"),
]

LONG = ("train.train_tokens=60000", "train.eval_every_tokens=20000", "train.checkpoint_every_steps=10")
ON_CLUSTER = (
    "launcher=slurm",
    "launcher.timeout_min=30",
    "launcher.gpus_per_node=0",
    "launcher.cpus_per_task=1",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running() as started:
        yield started


@pytest.fixture(autouse=True)
def empty_queue(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield
    cluster.command("scancel", "--signal=KILL", "--full", *jobs(cluster), check=False)
    cluster.command("scancel", *jobs(cluster), check=False)
    until(lambda: not jobs(cluster), "the queue is empty")


def jobs(cluster: Cluster) -> list[str]:
    return cluster.command("squeue", "--noheader", "--array", "--format=%i").split()


def occupy(cluster: Cluster, seconds: int) -> None:
    """A job of higher rank takes both nodes."""
    whole = "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"
    cluster.command("sbatch", *whole, f"--wrap=sleep {seconds}")


def until(there: Callable[[], object], what: str, limit_s: float = 180) -> None:
    deadline = time.monotonic() + limit_s
    while not there():
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:g} s"
        time.sleep(0.2)


def submitted(
    home: Path, *arguments: str, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    options = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if argument not in options]
    here = f"output_dir={home}", f"data.cache_dir={home}/cache"
    return launch(*options, *SMALL, *ON_CLUSTER, *here, *overrides, **environment)


def the_run(home: Path) -> RunFolder:
    (folder,) = folders_in(home)
    return folder


def at_step(folder: RunFolder, step: int) -> bool:
    progress = folder.read_progress()
    return progress is not None and progress.step >= step


def ended(cluster: Cluster, job: str) -> str:
    """How SLURM's accounting says that the job ended."""
    until(
        lambda: job not in cluster.command("squeue", "--noheader", "--array", "--format=%i").split(), job
    )
    state = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=State", "--jobs", job]
    until(lambda: cluster.command(*state) not in ("", "RUNNING", "PENDING"), f"{job} is in the accounts")
    return cluster.command(*state)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the long run finds on this machine when nothing befalls it."""
    home = tmp_path_factory.mktemp("uninterrupted")
    here = f"output_dir={home}", f"data.cache_dir={home}/cache", "launcher.cpus_per_task=1"
    assert launch(*SMALL, *LONG, *here).returncode == 0
    return results(the_run(home))


def test_a_sweep_gives_what_it_gives_on_this_machine(cluster: Cluster, tmp_path: Path) -> None:
    points = ["-m", "lora.rank=1,2", "layer.index=1,2", "launcher.max_array_size=1"]
    there, here = tmp_path / "there", tmp_path / "here"
    started = submitted(there, *points, "launcher.pack=2")
    assert started.returncode == 0, started.stderr
    assert "4 submitted to SLURM in 2 jobs" in started.stdout
    ids = [one.job.id for one in folders_in(there) if one.job]
    assert len(ids) == 4
    assert len(set(ids)) == 2  # packs of 2
    assert len({job.split("_")[0] for job in ids}) == 2  # in arrays of one
    places = f"output_dir={here}", f"data.cache_dir={there}/cache"
    cores = "launcher.cpus_per_task=1", "launcher.max_parallel=2", "launcher.pack=off"
    assert launch("-m", *SMALL, *points[1:], *places, *cores).returncode == 0
    until(lambda: all(one.is_finished for one in folders_in(there)), "the sweep")
    assert [one.path.name for one in folders_in(there)] == [one.path.name for one in folders_in(here)]
    for one, other in zip(folders_in(there), folders_in(here), strict=True):
        assert results(one) == results(other)
        assert {path.name for path in one.path.iterdir()} == {
            path.name for path in other.path.iterdir()
        } | {"job.json"}
    assert main(["status", str(there / "main")]) == 0
    again = submitted(there, *points)
    assert "4 of 4 done before" in again.stdout
    assert not jobs(cluster)


def test_what_begins_with_another_is_submitted_once_that_is_done(
    cluster: Cluster, tmp_path: Path
) -> None:
    arms = "arm=time_to_ce/sae,time_to_ce/lora", "init_at=0.5,1", "train.seed=0"
    sweep = "experiment=time_to_ce", "sweep=main", *arms, "sae.width=64", "train.train_tokens=5120"
    started = submitted(tmp_path, *sweep)
    assert started.returncode == 0, started.stderr
    assert "2 more begin with what these make; the same command submits them" in started.stdout
    sae = the_run(tmp_path)
    until(lambda: sae.is_finished, "the SAE")
    again = submitted(tmp_path, *sweep, "launcher.wait=true")
    assert again.returncode == 0, again.stderr
    assert "2 submitted to SLURM" in again.stdout
    around = [folder for folder in folders_in(tmp_path) if folder.path != sae.path]
    assert len(around) == 2
    at_its_end = [f for f in around if load(f.config.read_text()).init_at == 1]
    assert [folder.read_summary()["spliced_ce"] for folder in at_its_end] == [
        pytest.approx(sae.read_summary()["student_ce"], abs=1e-6)
    ]


def test_preempted_it_goes_on_and_ends_the_same(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, object]
) -> None:
    """The run, and another that trains with it."""
    two = "-m", "lora.rank=2,4", "launcher.partition=low"
    assert submitted(tmp_path, *LONG, *two).returncode == 0
    folders = folders_in(tmp_path)
    until(lambda: all(at_step(one, 15) for one in folders), "the runs are at work")
    occupy(cluster, 3)
    queued = [State.queued, State.queued]
    until(lambda: [one.state for one in standings(folders)] == queued, "the runs wait again")
    until(lambda: all(one.is_finished or one.has_failed for one in folders), "the runs")
    assert [one.failure_message for one in folders] == [None, None]
    (folder,) = [one for one in folders if load(one.config.read_text()).lora.rank == 2]
    assert sum(one.log.read_text().count("going on from step") for one in folders) == 2
    assert results(folder) == uninterrupted


def test_preempted_with_sigterm_alone_it_goes_on(
    tmp_path: Path, uninterrupted: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SLURM does by default. The run has saved long before its time of grace is over."""
    with running(signal_on_preemption=False, grace_s=15) as other:
        for name, value in other.environment.items():
            monkeypatch.setenv(name, value)
        assert submitted(tmp_path, *LONG, "launcher.signal_delay_s=5").returncode == 0
        folder = the_run(tmp_path)
        until(lambda: at_step(folder, 15), "the run is at work")
        occupy(other, 3)
        until(lambda: folder.is_finished or folder.has_failed, "the run")
    assert folder.is_finished, folder.failure_message
    assert "going on from step" in folder.log.read_text()
    assert results(folder) == uninterrupted


def test_a_time_limit_is_survived(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, object]
) -> None:
    limits = "launcher.timeout_min=1", "launcher.signal_delay_s=45"
    assert submitted(tmp_path, *LONG, *limits).returncode == 0
    folder = the_run(tmp_path)
    until(lambda: at_step(folder, 15), "the run is at work")
    at_work = holder(folder.path)
    assert at_work is not None
    os.kill(at_work.pid, signal.SIGSTOP)  # SLURM's clock ticks in minutes, and the run is quicker
    until(lambda: is_pending(signal.SIGUSR2, at_work.pid), "the warning")
    with contextlib.suppress(ProcessLookupError):
        os.kill(at_work.pid, signal.SIGCONT)
    until(lambda: folder.is_finished or folder.has_failed, "the run", 400)
    assert folder.is_finished, folder.failure_message
    assert "going on from step" in folder.log.read_text()
    assert results(folder) == uninterrupted


def is_pending(number: signal.Signals, pid: int) -> bool:
    """Whether the signal has been sent to the stopped process, or whatever stopped it has let it go."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    (pending,) = [line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd")]
    return bool(int(pending, 16) >> (number - 1) & 1)


def test_a_dead_node_costs_what_came_after_the_checkpoint(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, object]
) -> None:
    assert submitted(tmp_path, *LONG).returncode == 0
    folder = the_run(tmp_path)
    until(lambda: at_step(folder, 25), "the run is at work")
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


def test_each_job_has_its_own_gpu(cluster: Cluster, tmp_path: Path) -> None:
    apart = "launcher.pack=off", "launcher.sbatch={nodelist: n1}", "launcher.gpus_per_node=1"
    assert submitted(tmp_path, "-m", "lora.rank=1,2", *apart).returncode == 0
    folders = folders_in(tmp_path)
    until(lambda: all(one.is_finished for one in folders), "the sweep")
    gpus = {one.read_summary()["environment"]["visible_gpus"] for one in folders}
    assert gpus == {"0", "1"}


def test_nodes_share_the_batches_of_a_pack(
    cluster: Cluster, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """Four processes on two nodes find what one does; stopped, they go on."""
    two = "launcher.nodes=2", "launcher.processes_per_node=2"
    assert submitted(tmp_path / "two", *LONG, *two).returncode == 0
    folder = the_run(tmp_path / "two")
    until(lambda: at_step(folder, 25), "the run is at work")
    assert len(cluster.command("squeue", "--noheader", "--steps", "--format=%i").splitlines()) >= 2
    occupy(cluster, 5)  # asked to stop, they save, and begin again when the nodes are free
    until(lambda: folder.is_finished or folder.has_failed, "the run", 400)
    assert folder.is_finished, folder.failure_message
    assert "going on from step" in folder.log.read_text()
    for one, other in zip(folder.read_curve(), uninterrupted["curve"], strict=True):
        assert one.student_ce == pytest.approx(other["student_ce"], rel=2e-3)
        assert one.base_ce == pytest.approx(other["base_ce"], rel=1e-6)


def test_several_nodes_with_sigterm_alone_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM tells the processes of all nodes, and those that the leader has started do not live on."""
    with running(signal_on_preemption=False, grace_s=15) as other:
        for name, value in other.environment.items():
            monkeypatch.setenv(name, value)
        two = "launcher.nodes=2", "launcher.processes_per_node=1", "launcher.signal_delay_s=5"
        assert submitted(tmp_path, *LONG, *two).returncode == 0
        folder = the_run(tmp_path)
        until(lambda: at_step(folder, 15), "the run is at work")
        occupy(other, 3)
        until(lambda: folder.is_finished or folder.has_failed, "the run", 400)
    assert folder.is_finished, folder.failure_message
    assert "going on from step" in folder.log.read_text()


def test_a_queued_run_reads_its_own_config_alone(cluster: Cluster, tmp_path: Path) -> None:
    files = tmp_path / "conf/train"
    files.mkdir(parents=True)
    mine = files / "mine.yaml"
    mine.write_text("defaults: [default]\nlr: 1e-3\n")
    occupy(cluster, 60)
    mine_too = f"--config-dir={tmp_path}/conf", "train=mine"
    assert submitted(tmp_path, *mine_too).returncode == 0
    folder = the_run(tmp_path)
    assert standings([folder])[0].state is State.queued
    mine.write_text("defaults: [default]\nlr: 1\n")
    before = folder.config.read_text()
    again = submitted(
        tmp_path, *mine_too
    )  # another run, since its rate differs; the first stays as it is
    assert again.returncode == 0
    assert folder.config.read_text() == before
    mine.unlink()
    cluster.command("scancel", "--partition=high", "--user", getpass.getuser())
    until(lambda: folder.is_finished, "the run")
    assert "lr: 0.001" in folder.config.read_text()


def test_all_is_fetched_before_and_once(cluster: Cluster, tmp_path: Path) -> None:
    """Model, SAE and text come from a hub that is gone before the jobs begin."""
    write_all(tmp_path / "hub")
    occupy(cluster, 100)
    gemma = (
        "model=gemma2_2b",
        "sae=gemma_scope",
        "sae.width=16k",
        "sae.l0=82",
        "layer.index=12",
        "data=pile",
    )
    tokens = "data.context_length=32", "data.validation_tokens=128", "train.train_tokens=128"
    with serving(tmp_path / "hub") as hub:
        places = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": None}
        started = submitted(tmp_path, "-m", *gemma, *tokens, "lora.rank=1,2", **places)
        assert started.returncode == 0, started.stderr
        weights = [one for one in hub.requests if one.startswith("GET") and "model.safetensors" in one]
    assert len(weights) == 1
    cluster.command("scancel", "--partition=high", "--user", getpass.getuser())
    folders = folders_in(tmp_path)
    until(lambda: all(one.is_finished or one.has_failed for one in folders), "the sweep")
    assert [one.failure_message for one in folders] == [None, None]
    assert {one.read_summary()["model"]["commit"] for one in folders} == {COMMIT}
    assert all(load(one.config.read_text()).model.commit == COMMIT for one in folders)


def test_slurm_sees_that_a_run_has_failed(cluster: Cluster, tmp_path: Path, capsys) -> None:
    rates = "train.lr=1e-3,2e-3,1e30", "train.seed=0,1"
    waited = submitted(tmp_path, "-m", *rates, "launcher.pack=3", "launcher.wait=true")
    folders = folders_in(tmp_path)
    assert all(one.is_finished or one.has_failed for one in folders)
    assert waited.returncode == 1
    assert "gap closed" in waited.stdout
    assert "2 failed" in waited.stderr
    of_job: dict[str, list[float]] = defaultdict(list)
    for folder in folders:
        assert folder.job is not None
        rate = load(folder.config.read_text()).train.lr
        assert folder.has_failed is (rate > 1)
        of_job[folder.job.id].append(rate)
    assert sorted(sorted(rates) for rates in of_job.values()) == [[1e-3, 1e-3, 2e-3], [2e-3, 1e30, 1e30]]
    for job, trained in of_job.items():
        assert ended(cluster, job) == ("FAILED" if max(trained) > 1 else "COMPLETED")
    capsys.readouterr()
    assert main(["status", str(tmp_path / "main")]) == 1
    assert "2 failed, 4 done" in capsys.readouterr().out
    (failed, _) = [folder for folder in folders if folder.has_failed]
    assert main(["logs", str(failed.path)]) == 0
    printed = capsys.readouterr().out
    assert "trains together with" in printed
    assert "failed: " in printed
    assert "Traceback" in printed


def test_cancelled_it_can_go_on(cluster: Cluster, tmp_path: Path, capsys) -> None:
    """A run whose job is cancelled, and with it another that trains there."""
    assert submitted(tmp_path, "-m", "lora.rank=1,2", *LONG).returncode == 0
    folders = folders_in(tmp_path)
    until(lambda: all(at_step(one, 15) for one in folders), "the runs are at work")
    assert main(["cancel", str(folders[0].path)]) == 0
    printed = capsys.readouterr().out
    assert "1 jobs cancelled" in printed
    assert f"{folders[1].path.name} trains there too, and stops" in printed
    assert folders[0].job is not None
    assert ended(cluster, folders[0].job.id).startswith("CANCELLED")
    until(lambda: not any(holder(one.path) for one in folders), "the runs are free")
    for standing in standings(folders):
        assert standing.state is State.resumable
        assert "CANCELLED" in str(standing.note)


def test_two_launches_at_once_submit_each_run_once(cluster: Cluster, tmp_path: Path) -> None:
    here = f"output_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"
    command = [sys.executable, "launch.py", "-m", *SMALL, *ON_CLUSTER, *here, "lora.rank=1,2,4"]
    command.append("launcher.pack=off")
    both = [
        subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        for _ in range(2)
    ]
    assert [one.wait(60) for one in both] == [0, 0]
    assert len(jobs(cluster)) == 3
    until(lambda: all(one.is_finished for one in folders_in(tmp_path)), "the sweep")


def test_a_partition_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused = submitted(tmp_path, "launcher.partition=hihg")
    assert refused.returncode == 1
    assert "nearest valid: launcher.partition=high" in refused.stderr
    assert not folders_in(tmp_path)
