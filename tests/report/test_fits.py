"""The fit over a factor: computed by hand, compared to scipy, and refused for too few values."""

import pandas
import pytest
from scipy import stats

from sae_lora.report.fits import Fit, fit, mean_and_margin


def frame(rows: list[tuple[float, int, float | None]]) -> pandas.DataFrame:
    return pandas.DataFrame(rows, columns=["rank", "block", "gap_closed"])


def test_a_straight_line_is_fitted_exactly() -> None:
    """Two groups, a common slope of 5 points per doubling, no error: the interval has no width."""
    rows = [(2.0**at, block, 0.1 * block + 0.05 * at) for at in range(4) for block in (1, 3)]
    fitted = fit(frame(rows), "rank", ["block"])
    assert isinstance(fitted, Fit)
    assert (fitted.per_doubling, fitted.low, fitted.high) == pytest.approx((0.05, 0.05, 0.05))
    assert fitted.intercepts == {("1",): pytest.approx(0.1), ("3",): pytest.approx(0.3)}
    assert fitted.at(("3",), 4) == pytest.approx(0.4)
    assert fitted.r_squared == pytest.approx(1)
    assert fitted.values == (1, 8) and fitted.runs == 8
    assert str(fitted).startswith("each doubling of rank closes 5.0 points more of the gap")


def test_the_fit_of_one_group_equals_scipys_regression() -> None:
    ranks, closed = [1, 4, 16, 64, 256], [0.1, 0.24, 0.29, 0.42, 0.45]
    fitted = fit(frame([(rank, 3, y) for rank, y in zip(ranks, closed, strict=True)]), "rank", [])
    expected = stats.linregress([0, 2, 4, 6, 8], closed)
    margin = stats.t.ppf(0.975, 3) * expected.stderr
    assert isinstance(fitted, Fit)
    assert fitted.per_doubling == pytest.approx(expected.slope)
    assert (fitted.low, fitted.high) == pytest.approx((expected.slope - margin, expected.slope + margin))
    assert fitted.intercepts[()] == pytest.approx(expected.intercept)
    assert fitted.r_squared == pytest.approx(expected.rvalue**2)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(1, 3, 0.1), (4, 3, 0.2)] * 4, "2 values in runs"),
        ([(1, 3, 0.1), (4, 3, 0.2), (16, 3, 0.3)], "3 runs in 1 groups; at least 4 are needed"),
        ([(rank, rank, 0.1) for rank in (1, 4, 16, 64)], "0 values in runs"),
        ([(1, 3, None), (4, 3, 0.2), (16, 3, None), (64, 3, 0.1)], "2 values in runs"),
        ([], "0 values in runs"),
    ],
)
def test_too_few_values_are_refused_with_a_reason(rows: list, reason: str) -> None:
    fitted = fit(frame(rows), "rank", ["block"])
    assert isinstance(fitted, str)
    assert reason in fitted


def test_a_factor_in_words_is_refused() -> None:
    words = pandas.DataFrame({"width": ["1024+2048"] * 4, "gap_closed": [0.1, 0.2, 0.3, 0.4]})
    assert isinstance(fit(words, "width", []), str)


def test_the_interval_of_a_mean_is_students() -> None:
    """For three values 0, 1, 2: the mean 1 and 4.303 / √3."""
    assert mean_and_margin([0, 1, 2]) == pytest.approx((1, 2.4841), abs=1e-4)
