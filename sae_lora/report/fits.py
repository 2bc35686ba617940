"""Growth of the gap closed with a factor: a slope over log2 of the factor, with confidence interval."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from sae_lora.records.factors import label, text

Frame = Any
"""A `pandas.DataFrame`; its type stubs leave most results of its operations open."""

CONFIDENCE = 0.95
_FEWEST_VALUES = 3
"""Smallest number of different values of the factor: a line fits any two points exactly."""
_FEWEST_TO_SPARE = 2
"""Smallest number of degrees of freedom: with fewer, the interval is too wide to be of use."""


@dataclass(frozen=True)
class Fit:
    """gap closed = intercept of the group + slope · log2(factor), by ordinary least squares."""

    factor: str
    per_doubling: float
    """The slope: share of the gap for each doubling of the factor."""
    low: float
    high: float
    """The slope's confidence interval, from Student's distribution."""
    intercepts: dict[tuple[str, ...], float]
    """Intercepts by group. A group is the runs with the same values of all factors except this factor
    and the seed; the key holds these values."""
    values: tuple[float, float]
    """The smallest and the largest value of the factor."""
    runs: int
    r_squared: float
    """Share of the variance within groups that the slope explains."""

    def at(self, group: tuple[str, ...], value: float) -> float:
        """The gap closed on the line of a group, at a value of the factor."""
        return self.intercepts[group] + self.per_doubling * math.log2(value)

    def __str__(self) -> str:
        more = "more" if self.per_doubling >= 0 else "less"
        n_groups = len(self.intercepts)
        groups = f", {n_groups} lines with the same slope" if n_groups > 1 else ""
        return (
            f"each doubling of {label(self.factor)} closes {100 * abs(self.per_doubling):.1f} points "
            f"{more} of the gap ({CONFIDENCE:.0%} interval {100 * self.low:+.1f} to "
            f"{100 * self.high:+.1f}; {self.runs} runs{groups}, R² {self.r_squared:.2f})"
        )


def fit(frame: Frame, factor: str, others: Sequence[str]) -> Fit | str:
    """A fit of the gap closed over the logarithm of a factor, or the reason why there is none.

    Args:
        frame: Finished runs, as `runs_frame` gives them.
        factor: Column of the factor.
        others: The other factors in which runs differ, without the seed.
    """
    numbers, closed = frame[factor].map(_number), frame["gap_closed"].map(_number)
    usable = numbers.gt(0) & closed.notna()
    groups = group_of(frame, others)
    # A group with one value fixes the height of its line, but not the slope.
    usable &= numbers.where(usable).groupby(groups).transform("nunique") > 1
    x, y, groups = numbers[usable].map(math.log2), closed[usable], groups[usable]
    refusal = f"no fit over {label(factor)}"
    if (values := x.nunique()) < _FEWEST_VALUES:
        equal = "in runs that are otherwise equal"
        return f"{refusal}: {values} values {equal}; at least {_FEWEST_VALUES} are needed"
    n_groups = groups.nunique()
    if (spare := len(x) - n_groups - 1) < _FEWEST_TO_SPARE:
        needed = n_groups + 1 + _FEWEST_TO_SPARE
        return f"{refusal}: {len(x)} runs in {n_groups} groups; at least {needed} are needed"
    mean_x, mean_y = x.groupby(groups).transform("mean"), y.groupby(groups).transform("mean")
    dx, dy = x - mean_x, y - mean_y
    slope = float((dx * dy).sum() / (dx**2).sum())
    residual = float(((dy - slope * dx) ** 2).sum())
    error = math.sqrt(residual / spare / float((dx**2).sum()))
    margin = _student(spare) * error
    total = float((dy**2).sum())
    intercepts = (y - slope * x).groupby(groups).mean()
    return Fit(
        factor=factor,
        per_doubling=slope,
        low=slope - margin,
        high=slope + margin,
        intercepts={group: float(value) for group, value in intercepts.items()},
        values=(float(numbers[usable].min()), float(numbers[usable].max())),
        runs=len(x),
        r_squared=1 - residual / total if total else 1.0,
    )


def mean_and_margin(values: Iterable[float]) -> tuple[float, float]:
    """The mean of two or more values, and half its confidence interval, from Student's distribution."""
    values = list(values)
    error = stdev(values) / math.sqrt(len(values))
    return mean(values), _student(len(values) - 1) * error


def _student(degrees: int) -> float:
    """Half of the confidence interval in standard errors, for these degrees of freedom."""
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))


def _number(value: object) -> float:
    """A value as a float; NaN if it is not a number."""
    return float(value) if isinstance(value, int | float) else math.nan


def group_of(frame: Frame, others: Sequence[str]) -> Any:
    """The values of factors as text, a tuple for each run."""
    import pandas  # slow to import, and tables in the terminal do without it

    rows = frame[list(others)].itertuples(index=False, name=None)
    return pandas.Series([tuple(map(text, row)) for row in rows], index=frame.index, dtype=object)
