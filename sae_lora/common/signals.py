"""A request to stop, by signal, becomes an exception at a moment when nothing is half done."""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""SLURM's warning before a preemption or the time limit (as submitit sets it), a kill, Ctrl-C, a
terminal that is closed."""


class Interrupted(BaseException):
    """The run was asked to stop; it can go on from where it stands."""


class Interruption:
    """Turn the first of `SIGNALS` into `Interrupted`, except inside `held()`."""

    def __init__(self) -> None:
        self.asked = False
        """True once the request has come."""
        self._raised = False
        self._held = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Listen inside the block only; must be entered in the main thread."""
        with handling(SIGNALS, self._ask):
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make a request wait until the block has ended: what it does must not be left half done."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        self._raise_if_asked()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._raise_if_asked()

    def _raise_if_asked(self) -> None:
        # Once is enough: SLURM and submitit send several signals, and the way out must not be cut short.
        if self.asked and not self._held and not self._raised:
            self._raised = True
            raise Interrupted


@contextmanager
def unheard() -> Iterator[None]:
    """Processes that are started inside the block never get any of `SIGNALS`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def handling(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Inside the block the handler gets these signals, but for those that are ignored (`nohup`)."""
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
