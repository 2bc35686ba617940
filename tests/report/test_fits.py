"""The fit over a factor: worked by hand, against scipy, and refused where there is too little."""

import pandas
import pytest
from scipy import stats

from sae_lora.report.fits import Fit, fit


def frame(rows: list[tuple[float, int, float | None]]) -> pandas.DataFrame:
    return pandas.DataFrame(rows, columns=["rank", "block", "gap_closed"])


def test_a_straight_line_is_found_exactly() -> None:
    """Two groups, one slope of 5 points a doubling, no error: the interval has no width."""
    rows = [(2.0**at, block, 0.1 * block + 0.05 * at) for at in range(4) for block in (1, 3)]
    found = fit(frame(rows), "rank", ["block"])
    assert isinstance(found, Fit)
    assert (found.per_doubling, found.low, found.high) == pytest.approx((0.05, 0.05, 0.05))
    assert found.intercepts == {("1",): pytest.approx(0.1), ("3",): pytest.approx(0.3)}
    assert found.at(("3",), 4) == pytest.approx(0.4)
    assert found.r_squared == pytest.approx(1)
    assert found.values == (1, 8) and found.runs == 8
    assert str(found).startswith("each doubling of rank closes 5.0 points more of the gap")


def test_one_group_is_the_regression_of_scipy() -> None:
    ranks, closed = [1, 4, 16, 64, 256], [0.1, 0.24, 0.29, 0.42, 0.45]
    found = fit(frame([(rank, 3, y) for rank, y in zip(ranks, closed, strict=True)]), "rank", [])
    expected = stats.linregress([0, 2, 4, 6, 8], closed)
    margin = stats.t.ppf(0.975, 3) * expected.stderr
    assert isinstance(found, Fit)
    assert found.per_doubling == pytest.approx(expected.slope)
    assert (found.low, found.high) == pytest.approx((expected.slope - margin, expected.slope + margin))
    assert found.intercepts[()] == pytest.approx(expected.intercept)
    assert found.r_squared == pytest.approx(expected.rvalue**2)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(1, 3, 0.1), (4, 3, 0.2)] * 4, "2 values of it"),
        ([(1, 3, 0.1), (4, 3, 0.2), (16, 3, 0.3)], "3 runs in 1 groups, and 4 needed"),
        ([(rank, rank, 0.1) for rank in (1, 4, 16, 64)], "0 values of it"),
        ([(1, 3, None), (4, 3, 0.2), (16, 3, None), (64, 3, 0.1)], "2 values of it"),
        ([], "0 values of it"),
    ],
)
def test_too_little_is_refused_with_a_reason(rows: list, reason: str) -> None:
    found = fit(frame(rows), "rank", ["block"])
    assert isinstance(found, str)
    assert reason in found


def test_a_factor_in_words_is_refused() -> None:
    words = pandas.DataFrame({"width": ["1024+2048"] * 4, "gap_closed": [0.1, 0.2, 0.3, 0.4]})
    assert isinstance(fit(words, "width", []), str)
