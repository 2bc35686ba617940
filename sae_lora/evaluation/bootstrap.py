"""How far a mean over held-out text may be off: percentile intervals over resampled sequences."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

Resampled = np.ndarray
"""A measure `[1 + resamples]`: of the text as it is and, after that, of each resample of its sequences.

Arithmetic on two of them pairs them resample by resample, as a gap's two cross-entropies are paired.
"""


@dataclass(frozen=True)
class Interval:
    """A measure, and the bounds that it lies between; `None` where it is undefined."""

    value: float | None
    """On the text as it is."""
    low: float | None
    """Undefined where it is so in one of the resamples."""
    high: float | None


class Bootstrap:
    """The same resamples of a text's sequences for all that is measured on it.

    Sequences are drawn, not tokens: those of one sequence are alike.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval).

    Args:
        sequences: How many there are.
        resamples: How many are drawn.
        seed: Settles which.
        share: Of the resamples that lie within the bounds.
    """

    def __init__(self, sequences: int, resamples: int, seed: int = 0, share: float = 0.95) -> None:
        random = np.random.default_rng(seed)
        drawn = random.multinomial(sequences, [1 / sequences] * sequences, size=resamples)
        self._times = np.concatenate([np.ones((1, sequences)), drawn])
        """How often each sequence is in each resample."""
        self._share = share

    def mean(self, sums: Tensor, counts: Tensor | None = None) -> Resampled:
        """A mean that is weighted by tokens.

        Args:
            sums: Over the tokens of each sequence, `[sequence]`.
            counts: How many those are, `[sequence]`; by default as many in each.
        """
        tokens = np.ones(len(sums)) if counts is None else counts.double().cpu().numpy()
        return (self._times @ sums.double().cpu().numpy()) / (self._times @ tokens)

    def interval(self, measure: Resampled) -> Interval:
        """The measure with its bounds."""
        value = float(measure[0])
        if not np.isfinite(measure).all():
            return Interval(value if np.isfinite(value) else None, None, None)
        outside = (1 - self._share) / 2
        low, high = np.quantile(measure[1:], [outside, 1 - outside])
        return Interval(value, float(low), float(high))
