"""The rule for errors in a pack: a run that fails is dropped, and the others continue."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from sae_lora.common.errors import is_gone, is_out_of_memory

Run = TypeVar("Run")


class Isolation(Generic[Run]):
    """Runs that train together. An error in one run drops this run, and the others continue.

    Args:
        runs: The runs.
        on_failure: Called with a dropped run and its error. `None` raises the error.
    """

    def __init__(
        self, runs: Iterable[Run], on_failure: Callable[[Run, Exception], None] | None = None
    ) -> None:
        self.runs = list(runs)
        """All runs, also those that are no longer active."""
        self.active = self.runs.copy()
        """The runs that have neither failed nor left."""
        self._on_failure = on_failure

    @contextmanager
    def only(self, run: Run) -> Iterator[None]:
        """Assign each error inside the block to this run only.

        Raises:
            Exception: If several runs are active and the error concerns the device that they share: out
                of memory, or a failed GPU; if another process is gone; if there is no `on_failure`.
        """
        try:
            yield
        except Exception as error:
            # The name of torch's class is compared, because this module does not import torch.
            is_of_device = is_out_of_memory(error) or type(error).__name__ == "AcceleratorError"
            if self._on_failure is None or is_gone(error) or (is_of_device and len(self.active) > 1):
                raise
            if run in self.active:
                self.active.remove(run)
            self._on_failure(run, error)

    def leave(self, run: Run) -> None:
        """Let a run end before the others, without an error."""
        self.active.remove(run)

    def each(self, action: Callable[[Run], object]) -> None:
        """Apply the action to each active run."""
        for run in self.active.copy():
            with self.only(run):
                action(run)
