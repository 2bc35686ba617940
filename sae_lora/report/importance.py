"""Which factors of a sweep matter for a measure, by a random forest. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from sae_lora.records.factors import by_value
from sae_lora.report.fits import Frame

FEWEST_RUNS = 8
"""Smallest number of runs: a forest of fewer says little."""
_TREES = 300
_SHUFFLES = 30


@dataclass(frozen=True)
class Importance:
    """The importance of one factor for a measure."""

    factor: str
    share: float
    """Its part of what the forest's predictions lose when the values of a factor are shuffled."""
    correlation: float | None
    """Spearman's correlation between the factor and the measure; `None` for words."""


def importances(frame: Frame, factors: Sequence[str], measure: str) -> list[Importance]:
    """The importance of each factor, the largest first; empty if there are too few runs or factors.

    A random forest predicts the measure from the factors. The importance of a factor is the loss of its
    predictions (R²) when the values of this factor are shuffled among the runs; all sum to 1. It holds
    for these runs: an adaptive sweeper tries some values often and others rarely.

    Args:
        frame: Finished runs.
        factors: The columns in which they may differ.
        measure: The column of the measure.
    """
    rows = frame[frame[measure].notna()]
    factors = [name for name in factors if len({repr(value) for value in rows[name]}) > 1]
    if len(factors) < 2 or len(rows) < FEWEST_RUNS or rows[measure].nunique() < 2:
        return []
    from sklearn.ensemble import RandomForestRegressor  # slow to import
    from sklearn.inspection import permutation_importance

    values = {name: list(rows[name]) for name in factors}
    codes = {name: _codes(of_factor) for name, of_factor in values.items()}
    x = list(zip(*codes.values(), strict=True))
    y = rows[measure].astype(float).to_numpy()
    forest = RandomForestRegressor(_TREES, random_state=0).fit(x, y)
    shuffled: Any = permutation_importance(forest, x, y, n_repeats=_SHUFFLES, random_state=0)
    losses = [max(0.0, float(loss)) for loss in shuffled.importances_mean]
    total = sum(losses) or 1.0
    every = [
        Importance(
            name,
            loss / total,
            _correlation(codes[name], y) if _is_number(values[name]) else None,
        )
        for name, loss in zip(factors, losses, strict=True)
    ]
    return sorted(every, key=lambda each: -each.share)


def _correlation(values: Sequence[float], measure: Any) -> float:
    from scipy import stats

    spearman: Any = stats.spearmanr(values, measure)
    return float(spearman.statistic)


def _is_number(values: Sequence[object]) -> bool:
    """True if all values are numbers."""
    return all(
        isinstance(value, Real) and not isinstance(value, bool) and value == value for value in values
    )


def _codes(values: Sequence[object]) -> list[float]:
    """The values as numbers: numbers stay, words get their place in the order of display."""
    if _is_number(values):
        return [float(value) for value in values]  # pyright: ignore[reportArgumentType]
    distinct = sorted({repr(value): value for value in values}.values(), key=by_value)
    places = {repr(value): place for place, value in enumerate(distinct)}
    return [float(places[repr(value)]) for value in values]
