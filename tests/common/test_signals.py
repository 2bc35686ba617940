"""Signals become one exception, at a moment when nothing is half done."""

import signal
from collections.abc import Iterator

import pytest

from sae_lora.common.signals import Interrupted, Interruption


@pytest.fixture
def interruption() -> Iterator[Interruption]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background
    interruption = Interruption()
    with interruption.watching():
        yield interruption
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_at_once_where_nothing_is_held(interruption: Interruption, number: int) -> None:
    with pytest.raises(Interrupted):
        signal.raise_signal(number)


def test_held_back_to_the_end_of_the_block(interruption: Interruption) -> None:
    ended = []
    with pytest.raises(Interrupted), interruption.held():
        with interruption.held():
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGTERM)
        ended.append(True)
    assert ended == [True]


def test_only_once(interruption: Interruption) -> None:
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGUSR2)
    signal.raise_signal(signal.SIGTERM)  # the way out is not cut short


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption().watching():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
