"""Fast computations that prove themselves before they are used: a plain one serves where they fail.

Kernels depend on the device, its driver and the versions of libraries, and no test has seen them all.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

from sae_lora.common.console import complain
from sae_lora.common.errors import is_out_of_memory

Result = TypeVar("Result")
PROOF_TOKENS = 256
"""Tokens on which a fast computation proves itself, at most."""


class FastPath:
    """A fast computation, and the kinds of inputs for which it gave the results of the plain one.

    Args:
        name: Its name, for messages.
        plain: The name of the plain computation.
        for_all: True if a failure for one kind of input is one for all.
    """

    def __init__(self, name: str, plain: str, *, for_all: bool = False) -> None:
        self._name, self._plain = name, plain
        self._for_all, self._has_failed = for_all, False
        self._is_proven: dict[Hashable, bool] = {}

    def take(
        self,
        kind: Hashable,
        fast: Callable[[], Result],
        plain: Callable[[], Result],
        difference: Callable[[], float],
        tolerance: float,
    ) -> Result:
        """The result of the fast computation; that of the plain one if the fast one fails or differs.

        Args:
            kind: The kind of input. The first call for a kind also calls `difference`, and waits for the
                device.
            fast, plain: The two computations.
            difference: Computes both for a few tokens, with gradients, and returns the largest relative
                difference.
            tolerance: The largest difference that rounding explains.
        """
        if self._for_all and self._has_failed:
            return plain()
        if kind not in self._is_proven:
            self._is_proven[kind] = self._proves(difference, tolerance)
        if self._is_proven[kind]:
            try:
                return fast()
            except Exception as error:  # a kernel may come from any library, with errors of its own
                self._is_proven[kind] = False
                self._note(error)
        return plain()

    def _proves(self, difference: Callable[[], float], tolerance: float) -> bool:
        try:
            differs_by = difference()
        except Exception as error:  # as in `take`
            self._note(error)
            return False
        if differs_by <= tolerance:  # false for NaN
            return True
        self._tell(f"the results differ by {differs_by:.2g}, and rounding explains {tolerance:.2g}")
        return False

    def _note(self, error: Exception) -> None:
        if is_out_of_memory(error):
            raise error
        self._tell(f"{type(error).__name__}: {error}".splitlines()[0])

    def _tell(self, because: str) -> None:
        self._has_failed = True
        complain("note", f"{self._plain} serves in place of {self._name}: {because}")
