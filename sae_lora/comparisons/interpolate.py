"""Values between the points of a curve, by linear interpolation. Imports no torch."""

import bisect
import itertools
import math
from collections.abc import Sequence

from sae_lora.records.metrics import METRICS
from sae_lora.records.schema import CurvePoint


def value_at(curve: Sequence[CurvePoint], over: str, amount: float, field: str) -> float:
    """The value of a field at the point where another field, which grows along the curve, is an amount.

    Args:
        curve: Points in order.
        over: The growing field: `tokens`, `train_seconds` or `train_flops`.
        amount: The amount. Beyond the last point, the last point is read.
        field: The field to read; a missing value counts as zero.
    """
    index = bisect.bisect_left([_value(point, over) for point in curve], amount)
    left, right = curve[max(0, index - 1)], curve[min(index, len(curve) - 1)]
    return _between(left, right, over, amount, field)


def first_reached(curve: Sequence[CurvePoint], measure: str, value: float, field: str) -> float | None:
    """The value of a field when a measure first reaches a value; `None` if it never does.

    Args:
        curve: Points in order.
        measure: A metric with a better direction; points without a value of it are left out.
        value: The value to reach.
        field: The field to read; a missing value counts as zero.
    """
    sign = 1 if METRICS[measure].better == "higher" else -1
    known = [point for point in curve if getattr(point, measure) is not None]
    if known and sign * _value(known[0], measure) >= sign * value:
        return _value(known[0], field)
    for left, right in itertools.pairwise(known):
        if sign * _value(right, measure) >= sign * value:
            return _between(left, right, measure, value, field)
    return None


def speedup(reference: float, amount: float) -> float:
    """The reference divided by an amount; infinite if the amount is zero."""
    return reference / amount if amount else math.inf


def _between(left: CurvePoint, right: CurvePoint, over: str, amount: float, field: str) -> float:
    span = _value(right, over) - _value(left, over)
    share = min(1.0, max(0.0, (amount - _value(left, over)) / span)) if span else 1.0
    start, end = _value(left, field), _value(right, field)
    return start + share * (end - start)


def _value(point: CurvePoint, name: str) -> float:
    return getattr(point, name) or 0.0
