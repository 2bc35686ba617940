"""The first time that a gap is reached, computed by hand, and two sweeps compared run by run."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from sae_lora.cli import main
from sae_lora.common.errors import UserError
from sae_lora.comparisons.interpolate import first_reached
from sae_lora.comparisons.recipes import savings
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint
from tests.support.sweeps import curve_point, finished, summed_up


def curve(*closed: float) -> list[CurvePoint]:
    """Points a hundred tokens and two seconds apart."""
    return [
        dataclasses.replace(
            curve_point(step), tokens=100 * step, train_seconds=2.0 * step, gap_closed=share
        )
        for step, share in enumerate(closed)
    ]


def run(home: Path, rank: int, seed: int, closed: tuple[float, ...]) -> RunFolder:
    folder = finished(home, f"r{rank}-s{seed}", rank, 3, closed[-1])
    config = folder.read_config()
    config["train"]["seed"] = seed
    folder.config.write_text(yaml.safe_dump(config))
    points = curve(*closed)
    folder.curve.unlink()
    for point in points:
        folder.append_point(point)
    last = points[-1]
    return summed_up(folder, train_tokens=last.tokens, train_seconds=last.train_seconds)


def test_the_first_time_counts_and_is_interpolated_between_evaluations() -> None:
    def at(value: float, *closed: float) -> list[float | None]:
        points = curve(*closed)
        return [first_reached(points, "gap_closed", value, name) for name in ("tokens", "train_seconds")]

    assert at(0.25, 0.0, 0.5, 0.25, 0.75) == [50, 1.0]
    assert at(0.625, 0.0, 0.5, 0.25, 0.75) == [275, 5.5]
    assert at(0.2, 0.0, 0.2) == [100, 2.0]
    assert at(0.3, 0.0, 0.2) == [None, None]


def test_each_run_is_compared_with_its_counterpart(tmp_path: Path) -> None:
    slow = [run(tmp_path / "slow", 4, seed, (0.0, 0.1, 0.2)) for seed in (0, 1, 2)]
    slow.append(run(tmp_path / "slow", 16, 0, (0.0, 0.5)))
    quick = [
        run(tmp_path / "quick", 4, 0, (0.0, 0.4)),  # half way: 50 tokens instead of 200
        run(tmp_path / "quick", 4, 1, (0.0, 0.2, 0.3)),
        run(tmp_path / "quick", 4, 2, (0.0, 0.1)),  # never reaches it
        run(tmp_path / "quick", 4, 3, (0.0, 0.9)),  # without a counterpart
    ]
    (saving,) = savings(slow, quick)
    assert saving.factors["rank"] == "4"
    assert (saving.tokens, saving.seconds, saving.seeds) == ([4.0, 2.0], [4.0, 2.0], 3)
    assert saving.gap_closed == pytest.approx(0.2)
    assert saving.gap_closed_here == pytest.approx((0.4 + 0.3 + 0.1) / 3)
    with pytest.raises(UserError, match="has a counterpart in the other"):
        savings(slow[3:], quick)


def test_the_command_prints_a_table_and_writes_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "slow", 4, 0, (0.0, 0.1, 0.2))
    run(tmp_path / "quick", 4, 0, (0.0, 0.4))
    record = tmp_path / "docs" / "reach.json"
    assert (
        main(
            ["compare", "recipes", str(tmp_path / "slow"), str(tmp_path / "quick"), "--to", str(record)]
        )
        == 0
    )
    assert "4.0 (4.0–4.0)" in capsys.readouterr().out
    assert json.loads(record.read_text())[0]["tokens"] == [4.0]
