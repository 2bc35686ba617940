"""Runs that go on together, and each fails alone: the one policy for errors in a pack."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from sae_lora.common.errors import is_out_of_memory

Run = TypeVar("Run")


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
        self.active = self.runs.copy()
        """The runs that have not failed."""
        self._on_failure = on_failure

    @contextmanager
    def only(self, run: Run) -> Iterator[None]:
        """Assign each error inside the block to this run alone.

        Raises:
            Exception: Where it concerns the device, and so all of several runs: out of memory, or a
                failed GPU. Also where no `on_failure` was given.
        """
        try:
            yield
        except Exception as error:
            # torch's error is known by its name, because this module works without torch.
            is_of_device = is_out_of_memory(error) or type(error).__name__ == "AcceleratorError"
            if self._on_failure is None or (is_of_device and len(self.active) > 1):
                raise
            if run in self.active:
                self.active.remove(run)
            self._on_failure(run, error)

    def each(self, action: Callable[[Run], object]) -> None:
        """Apply the action to each run that has not failed."""
        for run in self.active.copy():
            with self.only(run):
                action(run)
