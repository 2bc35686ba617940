"""The launcher on a real SLURM: array jobs, packs, failures, cancellation."""

import getpass
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from sae_lora.cli import main
from sae_lora.common.locks import holder
from sae_lora.config.serialize import load
from sae_lora.records.status import State, read_statuses
from tests.support.attempts import results
from tests.support.cluster import Cluster
from tests.support.commands import REPOSITORY
from tests.support.halving import with_sweeper
from tests.support.hub import COMMIT, serving
from tests.support.points import SMALL, folders_in, points_in, run_here
from tests.support.repositories import write_all
from tests.support.submission import (
    LONG,
    NEEDS_SLURM,
    ON_CLUSTER,
    go_on,
    halt,
    jobs,
    occupy,
    submitted,
    submitted_jobs,
    the_run,
    until,
)

pytestmark = NEEDS_SLURM


def ended(cluster: Cluster, job: str) -> str:
    """The final state of the job in SLURM's accounting."""
    until(
        lambda: job not in cluster.command("squeue", "--noheader", "--array", "--format=%i").split(), job
    )
    state = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=State", "--jobs", job]
    until(lambda: cluster.command(*state) not in ("", "RUNNING", "PENDING"), f"{job} is in the accounts")
    return cluster.command(*state)


def test_a_sweep_gives_the_same_results_as_on_this_machine(cluster: Cluster, tmp_path: Path) -> None:
    points = ["-m", "lora.rank=1,2", "layer.index=1,2", "launcher.max_array_size=1"]
    on_slurm, local = tmp_path / "slurm", tmp_path / "local"
    started = submitted(on_slurm, *points, "launcher.pack=2")
    assert started.returncode == 0, started.stderr
    assert "4 runs submitted to SLURM in 2 jobs" in started.stdout
    ids = [folder.job for folder in folders_in(on_slurm) if folder.job]
    assert len(ids) == 4
    assert len(set(ids)) == 2  # packs of two runs
    assert len({job.split("_")[0] for job in ids}) == 2  # arrays of one job
    point = points_in(local)
    run_here(
        *(point(f"lora.rank={rank}", f"layer.index={block}") for rank in (1, 2) for block in (1, 2))
    )
    until(lambda: all(folder.is_finished for folder in folders_in(on_slurm)), "the sweep")
    for folder, expected in zip(folders_in(on_slurm), folders_in(local), strict=True):
        assert folder.path.name == expected.path.name
        assert results(folder) == results(expected)
        assert {path.name for path in folder.path.iterdir()} == {
            path.name for path in expected.path.iterdir()
        } | {"job.json", "log.txt"}
    assert main(["status", str(on_slurm / "main")]) == 0
    again = submitted(on_slurm, *points)
    assert "4 of 4 already done" in again.stdout
    assert not jobs(cluster)


def test_points_with_init_are_submitted_when_their_sae_is_finished(
    cluster: Cluster, tmp_path: Path
) -> None:
    arms = "variant=time_to_ce/sae,time_to_ce/lora", "init_at=0.5,1", "train.seed=0"
    sweep = "experiment=time_to_ce", "sweep=main", *arms, "sae.width=64", "train.train_tokens=5120"
    started = submitted(tmp_path, *sweep)
    assert started.returncode == 0, started.stderr
    assert "2 points not submitted yet" in started.stdout
    sae = the_run(tmp_path)
    until(lambda: sae.is_finished, "the SAE")
    again = submitted(tmp_path, *sweep, "launcher.wait=true")
    assert again.returncode == 0, again.stderr
    assert "2 runs submitted to SLURM" in again.stdout
    lora = [folder for folder in folders_in(tmp_path) if folder.path != sae.path]
    assert len(lora) == 2
    at_the_end = [folder for folder in lora if load(folder.config.read_text()).init_at == 1]
    assert [folder.read_summary()["spliced_ce"] for folder in at_the_end] == [
        pytest.approx(sae.read_summary()["student_ce"], abs=1e-6)
    ]


def test_the_trials_of_an_adaptive_sweeper_are_jobs(cluster: Cluster, tmp_path: Path) -> None:
    """A batch is a pack, and the next batch waits for its results."""
    variables = with_sweeper(tmp_path / "plugins")
    swept = submitted(tmp_path, "-m", "hydra/sweeper=halving", **variables)
    assert swept.returncode == 0, swept.stderr
    folders = folders_in(tmp_path)
    assert all(folder.is_finished for folder in folders)
    rates = {load(folder.config.read_text()).train.lr: folder.job for folder in folders}
    first, second = rates.pop(1e-4), rates.pop(2e-3)
    assert first == second and len(rates) == 1 and first not in rates.values()
    assert "best of two" in swept.stdout and "3 trials by gap after" in swept.stdout
    again = submitted(tmp_path, "-m", "hydra/sweeper=halving", **variables)
    assert again.returncode == 0 and again.stdout.count("already done, skipped") == 2
    assert not jobs(cluster)


def test_a_job_stops_where_runs_of_other_jobs_are_ahead(cluster: Cluster, tmp_path: Path) -> None:
    halving = "launcher.halving=train.lr", "launcher.keep=0.5", "launcher.pack=off", "launcher.wait=true"
    assert submitted(tmp_path, "train.lr=4e-3", *halving).returncode == 0
    swept = submitted(tmp_path, "-m", "train.lr=4e-3,1e-5,1e-4", *halving)
    assert swept.returncode == 0, swept.stderr
    folders = {load(folder.config.read_text()).train.lr: folder for folder in folders_in(tmp_path)}
    statuses = dict(zip(folders, read_statuses([*folders.values()]), strict=True))
    assert statuses[4e-3].state is State.done and statuses[1e-5].state is State.outranked
    assert "stopped at 512 tokens, rank" in str(statuses[1e-5].note)
    assert f"halving stopped {sum(not run.is_finished for run in folders.values())} of 3" in swept.stdout
    job = folders[1e-5].job
    assert job is not None and ended(cluster, job) == "COMPLETED"
    assert main(["status", str(tmp_path / "main")]) == 0
    again = submitted(tmp_path, "-m", "train.lr=4e-3,1e-5,1e-4", "launcher.wait=true")
    assert again.returncode == 0, again.stderr
    assert all(folder.is_finished for folder in folders.values())


def test_each_job_has_its_own_gpu(cluster: Cluster, tmp_path: Path) -> None:
    options = "launcher.pack=off", "launcher.sbatch={nodelist: n1}", "launcher.gpus_per_node=1"
    assert submitted(tmp_path, "-m", "lora.rank=1,2", *options).returncode == 0
    folders = folders_in(tmp_path)
    until(lambda: all(folder.is_finished for folder in folders), "the sweep")
    gpus = {folder.read_summary()["environment"]["visible_gpus"] for folder in folders}
    assert gpus == {"0", "1"}


def test_a_queued_run_reads_only_the_config_in_its_folder(cluster: Cluster, tmp_path: Path) -> None:
    files = tmp_path / "conf/train"
    files.mkdir(parents=True)
    mine = files / "mine.yaml"
    mine.write_text("defaults: [default]\nlr: 1e-3\n")
    occupy(cluster, 60)
    options = f"--config-dir={tmp_path}/conf", "train=mine"
    assert submitted(tmp_path, *options).returncode == 0
    folder = the_run(tmp_path)
    assert read_statuses([folder])[0].state is State.queued
    mine.write_text("defaults: [default]\nlr: 1\n")
    config = folder.config.read_text()
    # Another run, since its learning rate differs; the config of the first run stays as it is.
    again = submitted(tmp_path, *options)
    assert again.returncode == 0
    assert folder.config.read_text() == config
    mine.unlink()
    cluster.command("scancel", "--partition=high", "--user", getpass.getuser())
    until(lambda: folder.is_finished, "the run")
    assert "lr: 0.001" in folder.config.read_text()


def test_files_are_fetched_once_before_the_jobs_start(cluster: Cluster, tmp_path: Path) -> None:
    """The hub of model, SAE and text no longer runs when the jobs start."""
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
        variables = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": None}
        started = submitted(tmp_path, "-m", *gemma, *tokens, "lora.rank=1,2", **variables)
        assert started.returncode == 0, started.stderr
        weights = [
            request
            for request in hub.requests
            if request.startswith("GET") and "model.safetensors" in request
        ]
    assert len(weights) == 1
    cluster.command("scancel", "--partition=high", "--user", getpass.getuser())
    folders = folders_in(tmp_path)
    until(lambda: all(folder.is_finished or folder.has_failed for folder in folders), "the sweep")
    assert [folder.failure_message for folder in folders] == [None, None]
    assert {folder.read_summary()["model"]["commit"] for folder in folders} == {COMMIT}
    assert all(load(folder.config.read_text()).model.commit == COMMIT for folder in folders)


def test_a_failed_run_fails_its_slurm_job(cluster: Cluster, tmp_path: Path, capsys) -> None:
    rates = "train.lr=1e-3,2e-3,1e30", "train.seed=0,1"
    waited = submitted(tmp_path, "-m", *rates, "launcher.pack=3", "launcher.wait=true")
    folders = folders_in(tmp_path)
    assert all(folder.is_finished or folder.has_failed for folder in folders)
    assert waited.returncode == 1
    assert "gap closed" in waited.stdout
    assert "2 failed" in waited.stderr
    rates_of_job: dict[str, list[float]] = defaultdict(list)
    for folder in folders:
        assert folder.job is not None
        rate = load(folder.config.read_text()).train.lr
        assert folder.has_failed is (rate > 1)
        rates_of_job[folder.job].append(rate)
    packs = sorted(sorted(rates) for rates in rates_of_job.values())
    assert packs == [[1e-3, 1e-3, 2e-3], [2e-3, 1e30, 1e30]]
    for job, trained in rates_of_job.items():
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


def test_a_cancelled_run_can_resume(cluster: Cluster, tmp_path: Path, capsys) -> None:
    """The other run in its job stops too."""
    assert submitted(tmp_path, "-m", "lora.rank=1,2", *LONG).returncode == 0
    folders = folders_in(tmp_path)
    pid = halt(*folders, step=15)
    assert main(["cancel", str(folders[0].path)]) == 0
    go_on(pid)
    printed = capsys.readouterr().out
    assert "1 job cancelled" in printed
    assert f"{folders[1].path.name} stops too: it trains in the same job" in printed
    assert folders[0].job is not None
    assert ended(cluster, folders[0].job).startswith("CANCELLED")
    until(lambda: not any(holder(folder.path) for folder in folders), "the runs are free")
    for status in read_statuses(folders):
        assert status.state is State.stopped
        assert "CANCELLED" in str(status.note)


def test_two_launches_at_once_submit_each_run_once(cluster: Cluster, tmp_path: Path) -> None:
    paths = f"output_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"
    command = [sys.executable, "launch.py", "-m", *SMALL, *ON_CLUSTER, *paths, "lora.rank=1,2,4"]
    command.append("launcher.pack=off")
    before = submitted_jobs(cluster)
    launches = [
        subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        for _ in range(2)
    ]
    assert [process.wait(180) for process in launches] == [0, 0]  # a busy machine takes a minute
    assert len(submitted_jobs(cluster) - before) == 3
    until(lambda: all(folder.is_finished for folder in folders_in(tmp_path)), "the sweep")


def test_a_partition_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refused = submitted(tmp_path, "launcher.partition=hihg")
    assert refused.returncode == 1
    assert "nearest valid: launcher.partition=high" in refused.stderr
    assert not folders_in(tmp_path)
