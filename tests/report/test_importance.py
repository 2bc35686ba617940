"""Importance of the factors of a sweep for a measure."""

from pathlib import Path
from typing import Any

import pandas
import pytest

from sae_lora.report.importance import FEWEST_RUNS, importances
from sae_lora.report.page import Report, page
from sae_lora.report.sweep import load_sweep
from tests.support.sweeps import MadeUp


def grid(effect: dict[str, float]) -> pandas.DataFrame:
    """Runs of a grid whose gap is a sum of effects of a number, a word and a factor without any."""
    rows: list[dict[str, Any]] = [
        {"lr": lr, "blocks": blocks, "seed": seed, "state": "done"}
        for lr in (1e-3, 2e-3, 4e-3)
        for blocks in ("after", "all")
        for seed in (0, 1, 2)
    ]
    for row in rows:
        row["ce_gap"] = 1 + effect["lr"] * row["lr"] / 4e-3 + effect["blocks"] * (row["blocks"] == "all")
    return pandas.DataFrame(rows)


@pytest.mark.parametrize(
    ("effect", "first"), [({"lr": 0.9, "blocks": 0.1}, "lr"), ({"lr": -0.1, "blocks": 0.9}, "blocks")]
)
def test_what_changes_the_measure_most_comes_first(effect: dict[str, float], first: str) -> None:
    frame = grid(effect)
    every = importances(frame, ["lr", "blocks", "seed"], "ce_gap")
    shares = {each.factor: each.share for each in every}
    assert every[0].factor == first and sum(shares.values()) == pytest.approx(1)
    assert shares["seed"] < 0.05 and every == sorted(every, key=lambda each: -each.share)
    correlations = {each.factor: each.correlation for each in every}
    assert correlations["blocks"] is None
    assert correlations["lr"] is not None and correlations["lr"] * effect["lr"] > 0
    assert importances(frame, ["lr", "blocks", "seed"], "ce_gap") == every  # the same at every call


def test_too_little_says_nothing() -> None:
    frame = grid({"lr": 1, "blocks": 1})
    assert importances(frame, ["lr", "blocks"], "ce_gap")
    assert not importances(frame, ["lr"], "ce_gap")
    assert not importances(frame[: FEWEST_RUNS - 1], ["lr", "blocks"], "ce_gap")
    assert not importances(frame.assign(ce_gap=1.0), ["lr", "blocks"], "ce_gap")
    unknown = frame.assign(ce_gap=[None] * 12 + [1.0] * 6)
    assert not importances(unknown, ["lr", "blocks"], "ce_gap")


def test_values_of_several_types_and_missing_ones_are_words() -> None:
    frame = grid({"lr": 1, "blocks": 1}).assign(mixed=["2+5", 3, None] * 6)
    (mixed,) = [each for each in importances(frame, ["lr", "mixed"], "ce_gap") if each.factor == "mixed"]
    assert mixed.correlation is None


def test_lists_are_words_and_constant_factors_are_left_out() -> None:
    frame = grid({"lr": 1, "blocks": 1}).assign(shares=[[], [0.5], [0.1, 0.5]] * 6, same=[[1]] * 18)
    every = importances(frame, ["lr", "shares", "same"], "ce_gap")
    assert {each.factor for each in every} == {"lr", "shares"}
    assert not importances(frame, ["lr", "same"], "ce_gap")


def test_the_report_shows_them(tmp_path: Path) -> None:
    MadeUp(tmp_path / "grid").grid(ranks=(1, 4, 16, 64), blocks=(1, 3))
    report = Report(load_sweep(tmp_path / "grid"))
    assert report.measure == "ce_gap"
    assert {each.factor for each in report.importances} == {"rank", "block"}
    text = page(report, [], tmp_path / "report")
    assert "What matters" in text and report.summary()["importances"]["ce_gap"]["rank"] > 0
    few = Report(load_sweep(*list((tmp_path / "grid").iterdir())[:3]))
    assert not few.importances and "What matters" not in page(few, [], tmp_path / "report")
