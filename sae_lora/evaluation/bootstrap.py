"""Percentile intervals of means over held-out text, from resampled sequences."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

Resampled = np.ndarray
"""A measure `[1 + resamples]`: on the text itself, then on each resample of its sequences.

Arithmetic on two measures pairs them resample by resample.
"""


@dataclass(frozen=True)
class Interval:
    """A measure and its bounds; `None` if undefined."""

    value: float | None
    """On the text itself."""
    low: float | None
    """Undefined if the measure is undefined in one of the resamples."""
    high: float | None


class Bootstrap:
    """The same resamples of a text's sequences for all measures on it.

    Sequences are drawn instead of tokens, because the tokens of a sequence are not independent.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """

    def __init__(self, sequences: int, resamples: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        draws = random.multinomial(sequences, [1 / sequences] * sequences, size=resamples)
        self._times = np.concatenate([np.ones((1, sequences)), draws])
        """Number of times that each sequence is in each resample, `[1 + resamples, sequence]`."""

    def mean(self, sums: Tensor, counts: Tensor) -> Resampled:
        """Mean over tokens, from their sum and their number in each sequence, `[sequence]`."""
        total, tokens = (self._times @ values.double().cpu().numpy() for values in (sums, counts))
        return total / tokens


def interval(measure: Resampled, share: float = 0.95) -> Interval:
    """A measure, with bounds that contain this share of its resamples."""
    value = float(measure[0])
    if not np.isfinite(measure).all():
        return Interval(value if np.isfinite(value) else None, None, None)
    outside = (1 - share) / 2
    low, high = np.quantile(measure[1:], [outside, 1 - outside])
    return Interval(value, float(low), float(high))
