"""Signals are raised as one exception, when no step is half done."""

import signal
from collections.abc import Iterator

import pytest

from sae_lora.common.signals import Interrupted, Interruption, interrupted_once


@pytest.fixture
def interruption() -> Iterator[Interruption]:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    interruption = Interruption()
    with interruption.watching():
        yield interruption
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_raised_at_once(interruption: Interruption, number: int) -> None:
    with pytest.raises(Interrupted):
        signal.raise_signal(number)


def test_a_held_signal_is_raised_at_the_end_of_the_block(interruption: Interruption) -> None:
    ended = []
    with pytest.raises(Interrupted), interruption.held():
        with interruption.held():
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGTERM)
        ended.append(True)
    assert ended == [True]


def test_signals_are_raised_only_once(interruption: Interruption) -> None:
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGUSR2)
    signal.raise_signal(signal.SIGTERM)  # the clean-up is not interrupted


def test_handlers_are_restored() -> None:
    previous = signal.getsignal(signal.SIGTERM)
    with Interruption().watching():
        assert signal.getsignal(signal.SIGTERM) != previous
    assert signal.getsignal(signal.SIGTERM) == previous


def test_a_second_ctrl_c_does_not_interrupt_the_clean_up() -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    with interrupted_once((signal.SIGINT, signal.SIGTERM)) as listen_again:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        listen_again()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.signal(signal.SIGINT, previous) is signal.default_int_handler
