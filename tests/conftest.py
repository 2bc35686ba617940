"""Fixtures shared by the tests."""

import gc
import os

# Nothing in the tests may reach the network: what needs a hub gets one of its own on loopback.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["WANDB_MODE"] = "offline"
# Test processes share the cores: with more threads than those, torch's wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # imported where they are used: the process that hands out tests needs none of it
    from sae_lora.models.language_model import LanguageModel
    from tests.support.cluster import Cluster
    from tests.support.points import Point


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes that run tests. Slow tests wait much for processes of their own, others little."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, 1 + cores * (1 if config.option.markexpr == "not slow" else 2))


def pytest_collection() -> None:
    """What is imported stays, and is not searched for garbage."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin sooner, or one of them is worked through alone at the end."""
    seconds: Counter[Path] = Counter()
    for item in items:
        if item.get_closest_marker("slow"):
            seconds[item.path] += 50 if "cluster" in getattr(item, "fixturenames", ()) else 10
    items.sort(key=lambda item: -seconds[item.path])  # stable: files stay together, tests in order


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for a `family`, or for a `model`, is run with each, unless it names some."""
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
    """Composes small points whose runs land in the test's own folder."""
    from tests.support.points import points_in

    return points_in(tmp_path)


@pytest.fixture(scope="module")
def cluster() -> Iterator["Cluster"]:
    """A SLURM of the module's own."""
    from tests.support.cluster import running

    with running() as started:
        yield started


@pytest.fixture
def empty_queue(cluster: "Cluster", monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SLURM's commands talk to the cluster, and what the test leaves there is cancelled at its end."""
    from tests.support.submission import jobs, until

    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield
    cluster.command("scancel", "--signal=KILL", "--full", *jobs(cluster), check=False)
    cluster.command("scancel", *jobs(cluster), check=False)
    until(lambda: not jobs(cluster), "the queue is empty")
