"""The replay of halving on recorded sweeps."""

import json
import re
from itertools import permutations

import pytest

from scripts import halving
from scripts.halving import Rule, at_once, one_by_one
from tests.support.commands import REPOSITORY

PAGE = REPOSITORY / "docs/results/halving.md"


def recorded(*curves: list[float]) -> list[halving.Row]:
    """A bracket with these gaps at the evaluations, the first before training."""
    return [
        {
            "sweep": "s",
            "bracket": "b",
            "lr": number,
            "tokens": [100 * i for i in range(len(gaps))],
            "ce_gap": gaps,
        }
        for number, gaps in enumerate(curves)
    ]


CROSSING = recorded([1, 0.5, 0.4, 0.1], [1, 0.4, 0.3, 0.2], [1, 0.6, 0.6, 0.6], [1, 0.7, 0.7, 0.7])
HALF = Rule((1 / 3,), 0.5)


def test_a_bracket_whose_order_stays_keeps_its_best() -> None:
    outcome = at_once(CROSSING, HALF)
    assert outcome.kept and outcome.lost == 0
    assert outcome.saved == pytest.approx(2 * 200 / 1200)


def test_what_overtakes_later_is_lost() -> None:
    outcome = at_once(CROSSING, Rule((1 / 3,), 0.25))
    assert not outcome.kept and outcome.lost == pytest.approx(0.1)
    assert outcome.saved == pytest.approx(3 * 200 / 1200)


def test_the_best_at_every_rung_is_kept_in_any_order_of_arrival() -> None:
    sorted_curves = recorded(*([1, 0.5 + 0.1 * i, 0.4 + 0.1 * i, 0.3 + 0.1 * i] for i in range(4)))
    for keep in (0.25, 0.5):
        rule = Rule((1 / 3, 2 / 3), keep)
        for order in permutations(range(4)):
            assert one_by_one(sorted_curves, rule, order).kept
        worst_first = one_by_one(sorted_curves, rule, [3, 2, 1, 0])
        assert worst_first.saved == 0  # each run is the best so far


def test_the_tables_of_the_page_are_those_of_its_curves() -> None:
    rows = json.loads((PAGE.with_suffix("") / "curves.json").read_text())
    assert halving.with_tables(PAGE.read_text(), rows) == PAGE.read_text()
    assert {*re.findall(r"<!-- (\w+) -->", PAGE.read_text())} == {*halving.TABLES}
    assert len(halving.brackets(rows)) >= 20
