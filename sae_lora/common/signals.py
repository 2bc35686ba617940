"""Signals that ask a process to stop, as an exception that is raised when no step is half done."""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""SLURM's warning before preemption or the time limit (as submitit sets it), `kill`, Ctrl-C, and the end
of the terminal."""


class Interrupted(BaseException):
    """The process was asked to stop; its runs can resume later."""


class Interruption:
    """Turn the first of `SIGNALS` into `Interrupted`, except inside `held()`."""

    def __init__(self) -> None:
        self.asked = False
        """True after the request to stop."""
        self._raised = False
        self._held = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Receive the signals inside the block only. Enter it in the main thread."""
        with handling(SIGNALS, self._ask):
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delay a request until the block ends, for work that must not be interrupted."""
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
        # Only once: SLURM and submitit send several signals, and the clean-up must not be interrupted.
        if self.asked and not self._held and not self._raised:
            self._raised = True
            raise Interrupted


@contextmanager
def interrupted_once(numbers: Iterable[signal.Signals]) -> Iterator[Callable[[], None]]:
    """Raise `KeyboardInterrupt` at the first of these signals inside the block; ignore the next ones.

    So a second Ctrl-C cannot interrupt the clean-up after the first one. After a call of the function
    that this yields, the next signal counts again.
    """
    is_heard = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_heard
        if not is_heard:
            is_heard = True
            raise KeyboardInterrupt

    def listen_again() -> None:
        nonlocal is_heard
        is_heard = False

    with handling(numbers, interrupt):
        yield listen_again


@contextmanager
def unheard() -> Iterator[None]:
    """Block `SIGNALS` for processes that are started inside the block."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextmanager
def handling(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Handle these signals inside the block, except signals that are ignored already (`nohup`)."""
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)
