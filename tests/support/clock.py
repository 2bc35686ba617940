"""A clock that tests advance."""


class Clock:
    """A function that returns a time in seconds; it stands still until `advance`."""

    def __init__(self) -> None:
        self._now = 1000.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let this time pass."""
        self._now += seconds
