"""Fixtures shared by the tests."""

import gc
import os

# Nothing in the tests may reach the network: what needs a hub gets one of its own on loopback.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["WANDB_MODE"] = "offline"
# Test processes share the cores: with more threads than those, torch's wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, running
from tests.families import FAMILIES, small_model
from tests.submission import jobs, until

LONGEST = [
    *(
        "test_slurm_interruptions",
        "test_slurm",
        "test_saebench",
        "test_launcher",
        "test_hub",
        "test_workers",
        "test_attempts",
        "test_embedded",
    ),
    *("test_tracking", "test_benchmark", "test_export", "test_cli", "test_methods", "test_waiting"),
    *("test_layer_groups", "test_report", "test_estimate", "test_sae_descent", "test_learning"),
    *("test_paper", "test_core", "test_harness", "test_steering", "test_generation"),
]


def pytest_collection() -> None:
    """What is imported stays, and is not searched for garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left alone with one of them at the end."""

    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


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
