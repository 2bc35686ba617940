"""The pace of a training: its tokens per second, and the time until its end."""

import math
from collections import deque

_RECENT_S = 30.0
"""Steps of this many last seconds give the duration of a step."""


class Pace:
    """Measured durations of the parts of a training, in seconds of wall time.

    Args:
        steps_per_fill: Steps that one filling of the activation buffer serves; 0 without a buffer.
    """

    def __init__(self, steps_per_fill: int = 0) -> None:
        self._per_fill = steps_per_fill
        self._fill_seconds = 0.0
        self._served_until = 0
        """The step that the next filling is for."""
        self.evaluation_seconds: float | None = None
        """Duration of the last evaluation; `None` before the first."""
        self.is_unusual = False
        """True before a step that takes longer than others, because blocks are compiled."""
        self._recent: deque[float] = deque()
        self._recent_sum = 0.0

    def note_fill(self, step: int, seconds: float) -> None:
        """Record the duration of a filling that serves this step."""
        self._fill_seconds = seconds
        self._served_until = step - step % self._per_fill + self._per_fill

    def note_step(self, seconds: float) -> float:
        """Record the duration of a step without filling.

        Returns:
            The duration with an equal part of the filling that serves the step. Over all steps that a
            filling serves, its sum is the time that the filling and the steps took.
        """
        if self.is_unusual:
            self.is_unusual = False
            return seconds + self._fill_share
        self._recent.append(seconds)
        self._recent_sum += seconds
        while self._recent_sum - self._recent[0] > _RECENT_S:
            self._recent_sum -= self._recent.popleft()
        return seconds + self._fill_share

    @property
    def step_seconds(self) -> float | None:
        """Mean duration of the last steps, with an equal part of the filling; `None` before a step."""
        return None if not self._recent else self._mean + self._fill_share

    def seconds_left(
        self, step: int, steps: int, evaluations: float, filled: float = 0.0
    ) -> float | None:
        """Expected time until the end; `None` before a step.

        Args:
            step: Steps taken.
            steps: Total number of steps.
            evaluations: Number of evaluations to come. They count as soon as one was measured.
            filled: Share that is done of a filling in progress.
        """
        if not self._recent:
            return None
        fills = 0.0
        if self._per_fill:
            begin = max(step - step % self._per_fill, self._served_until)
            fills = max(0.0, math.ceil((steps - begin) / self._per_fill) - filled)
        return (
            (steps - step) * self._mean
            + fills * self._fill_seconds
            + evaluations * (self.evaluation_seconds or 0.0)
        )

    @property
    def _mean(self) -> float:
        return self._recent_sum / len(self._recent)

    @property
    def _fill_share(self) -> float:
        return self._fill_seconds / self._per_fill if self._per_fill else 0.0
