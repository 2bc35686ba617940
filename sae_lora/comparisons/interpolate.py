"""Readings between the points of a curve, on straight lines. Imports no torch."""

import bisect
import itertools
from collections.abc import Sequence

from sae_lora.records.schema import CurvePoint


def value_at(curve: Sequence[CurvePoint], over: str, amount: float, wanted: str) -> float:
    """A measure where another has come to an amount.

    Args:
        curve: Points, by what they are read over.
        over: That: `tokens`, `train_seconds` or `train_flops`.
        amount: Of it; beyond the last point, that of the last.
        wanted: The measure, another field of a point.
    """
    after = bisect.bisect_left([_read(point, over) for point in curve], amount)
    first, second = curve[max(0, after - 1)], curve[min(after, len(curve) - 1)]
    return _between(first, second, over, amount, wanted)


def reaching(curve: Sequence[CurvePoint], ce: float, cost: str) -> float:
    """What a training had taken when its student first got down to a cross-entropy.

    Args:
        curve: Its points, of which one is as low.
        ce: In nats per token.
        cost: `tokens`, `train_seconds` or `train_flops`.
    """
    if curve[0].student_ce <= ce:
        return _read(curve[0], cost)
    for first, second in itertools.pairwise(curve):
        if second.student_ce <= ce:
            return _between(first, second, "student_ce", ce, cost)
    raise ValueError(f"the curve never gets down to {ce}")


def _between(first: CurvePoint, second: CurvePoint, over: str, value: float, wanted: str) -> float:
    span = _read(second, over) - _read(first, over)
    share = min(1.0, max(0.0, (value - _read(first, over)) / span)) if span else 1.0
    return _read(first, wanted) + share * (_read(second, wanted) - _read(first, wanted))


def _read(point: CurvePoint, name: str) -> float:
    return getattr(point, name) or 0.0
