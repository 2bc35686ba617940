"""Readings between the points of a curve, on straight lines. Imports no torch."""

import bisect
import itertools
from collections.abc import Sequence

from sae_lora.records.metrics import METRICS
from sae_lora.records.schema import CurvePoint


def value_at(curve: Sequence[CurvePoint], over: str, amount: float, wanted: str) -> float:
    """The value of a field where another field, which grows along the curve, reaches an amount.

    Args:
        curve: Points in order.
        over: The growing field: `tokens`, `train_seconds` or `train_flops`.
        amount: Amount of it; beyond the last point, the last point is read.
        wanted: The field to read; a point that does not know it counts as zero.
    """
    after = bisect.bisect_left([_value(point, over) for point in curve], amount)
    first, second = curve[max(0, after - 1)], curve[min(after, len(curve) - 1)]
    return _between(first, second, over, amount, wanted)


def first_reached(curve: Sequence[CurvePoint], measure: str, value: float, wanted: str) -> float | None:
    """The value of a field where a measure is first as good as a value; `None` where it never is.

    Args:
        curve: Points in order.
        measure: A metric with a better direction; points at which it is undefined are left out.
        value: The value to reach.
        wanted: The field to read; a point that does not know it counts as zero.
    """
    sign = 1 if METRICS[measure].better == "higher" else -1
    known = [point for point in curve if getattr(point, measure) is not None]
    if known and sign * _value(known[0], measure) >= sign * value:
        return _value(known[0], wanted)
    for before, after in itertools.pairwise(known):
        if sign * _value(after, measure) >= sign * value:
            return _between(before, after, measure, value, wanted)
    return None


def _between(before: CurvePoint, after: CurvePoint, over: str, amount: float, wanted: str) -> float:
    span = _value(after, over) - _value(before, over)
    share = min(1.0, max(0.0, (amount - _value(before, over)) / span)) if span else 1.0
    first, second = _value(before, wanted), _value(after, wanted)
    return first + share * (second - first)


def _value(point: CurvePoint, name: str) -> float:
    return getattr(point, name) or 0.0
