"""Fixtures shared by the tests."""

import os

# Nothing in the tests may reach the network: what needs a hub gets one of its own on loopback.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["WANDB_MODE"] = "offline"

import pytest

from tests.families import FAMILIES, small_model


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


@pytest.fixture
def model(family: str):
    """A small random model of each family in turn."""
    return small_model(family)
