"""Fixtures shared by the tests."""

import gc
import os
import tempfile
from pathlib import Path

# No test may reach the network: tests that need a hub start one on loopback.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["WANDB_MODE"] = "offline"
# Trackio reads the folder of its database once per process. pytest's processes share this one.
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trackio-"))
# Without a GPU, kernels run in Triton's interpreter. Triton reads this when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Test processes share the cores: with more threads than cores, threads of torch wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # fixtures import these; the process that distributes tests does not need them
    from sae_lora.models.language_model import LanguageModel
    from tests.support.cluster import Cluster
    from tests.support.points import Point


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Number of test processes; more for slow tests, which mostly wait for child processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, 1 + cores * (1 if config.option.markexpr == "not slow" else 2))


def pytest_collection() -> None:
    """Imported objects stay alive, so the garbage collector need not search them."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start slow files first, so that no slow file runs alone at the end."""
    seconds: Counter[Path] = Counter()
    for item in items:
        if item.get_closest_marker("slow"):
            seconds[item.path] += 50 if "cluster" in getattr(item, "fixturenames", ()) else 10
    items.sort(key=lambda item: -seconds[item.path])  # stable: files stay together, tests in order


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with a `family` or `model` fixture for each family, unless it lists families."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "family" in metafunc.fixturenames and not any("family" in mark.args[0] for mark in marks):
        from tests.support.families import FAMILIES

        metafunc.parametrize("family", sorted(FAMILIES))


@pytest.fixture
def model(family: str) -> "LanguageModel":
    """A small random model of each family in turn."""
    from tests.support.families import small_model

    return small_model(family)


@pytest.fixture
def point(tmp_path: Path) -> "Point":
    """A function that composes small points whose runs are in the test's folder."""
    from tests.support.points import points_in

    return points_in(tmp_path)


@pytest.fixture
def forked_jobs() -> Iterator[None]:
    """Jobs of this machine are forked processes."""
    from tests.support import forked_jobs

    with forked_jobs.forked_jobs():
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator["Cluster"]:
    """A SLURM cluster for the module."""
    from tests.support.cluster import running

    with running() as started:
        yield started


@pytest.fixture
def empty_queue(cluster: "Cluster", monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SLURM commands use the cluster; at the end of the test all jobs are cancelled."""
    from tests.support.submission import jobs, until

    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield
    cluster.command("scancel", "--signal=KILL", "--full", *jobs(cluster), check=False)
    cluster.command("scancel", *jobs(cluster), check=False)
    until(lambda: not jobs(cluster), "the queue is empty")
