"""Runs that go on together, of which each fails alone: the one policy for errors in a pack."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from sae_lora.common.errors import is_out_of_memory

Run = TypeVar("Run")


def concerns_all(error: BaseException) -> bool:
    """Return whether an error concerns the device and not one run: out of memory, or a failed GPU."""
    # torch's by its name, for what works without torch.
    return is_out_of_memory(error) or type(error).__name__ == "AcceleratorError"


class Isolation(Generic[Run]):
    """Runs that go on together. An error in one of them leaves it out, and the others go on.

    Args:
        runs: All of them.
        on_failure: Called with a run that is left out and its error. `None` raises the error.
    """

    def __init__(
        self, runs: Iterable[Run], on_failure: Callable[[Run, Exception], None] | None = None
    ) -> None:
        self.runs = list(runs)
        """All of them, also those that have failed."""
        self.left = self.runs.copy()
        """The runs that have not failed."""
        self._on_failure = on_failure

    @contextmanager
    def only(self, run: Run) -> Iterator[None]:
        """Assign each error inside the block to this run alone.

        Raises:
            Exception: Where it concerns all of several runs, or no `on_failure` was given.
        """
        try:
            yield
        except Exception as error:
            if self._on_failure is None or (concerns_all(error) and len(self.left) > 1):
                raise
            if run in self.left:
                self.left.remove(run)
            self._on_failure(run, error)

    def each(self, action: Callable[[Run], object]) -> None:
        """Does it for each run that is left."""
        for run in self.left.copy():
            with self.only(run):
                action(run)
