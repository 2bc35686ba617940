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

import pytest

from tests.support.cluster import Cluster, running
from tests.support.families import FAMILIES, small_model
from tests.support.submission import jobs, until


def pytest_collection() -> None:
    """What is imported stays, and is not searched for garbage."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with more slow tests begin sooner, or one of them is worked through alone at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: files stay together, tests in their order


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


@pytest.fixture
def model(family: str):
    """A small random model of each family in turn."""
    return small_model(family)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A SLURM of the module's own."""
    with running() as started:
        yield started


@pytest.fixture
def empty_queue(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SLURM's commands talk to the cluster, and what the test leaves there is cancelled at its end."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield
    cluster.command("scancel", "--signal=KILL", "--full", *jobs(cluster), check=False)
    cluster.command("scancel", *jobs(cluster), check=False)
    until(lambda: not jobs(cluster), "the queue is empty")
