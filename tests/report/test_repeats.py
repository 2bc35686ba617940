"""Runs that differ only in seeds are one group; nothing else is ever averaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_lora.cli import main
from sae_lora.common.errors import UserError
from sae_lora.records.factors import finished_runs
from sae_lora.records.folder import RunFolder
from sae_lora.report.repeats import check_repeats, mean_of, repeats
from tests.support.sweeps import MadeUp, summed_up


def with_config(folder: RunFolder, **values: Any) -> RunFolder:
    """The finished run with other values in its config, by group."""
    config = folder.read_config()
    for group, changed in values.items():
        if isinstance(changed, dict):
            config[group] |= changed
        else:
            config[group] = changed
    folder.write_config(yaml.safe_dump(config))
    return summed_up(folder)


def test_seeds_are_one_group_and_everything_else_is_not(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    folders = [sweep.finished(rank=rank, seed=seed) for rank in (1, 4) for seed in (0, 1, 2)]
    with_config(folders[2], data={"seed": 7})  # the seed of the text is a seed, too
    runs = finished_runs(folders)
    groups = repeats(runs)
    assert [(group.factors["rank"], len(group.runs)) for group in groups] == [(1, 3), (4, 3)]
    assert "seed" not in groups[0].factors
    for name, changed in (
        ("train", {"lr": 1e-3}),
        ("model", {"dtype": "bfloat16"}),
        ("data", {"context_length": 64}),
        ("sae", {"dtype": "bfloat16"}),
    ):
        other = with_config(sweep.finished(rank=1, seed=3), **{name: changed})
        assert len(repeats(finished_runs([*folders, other]))) == 3, name
        with pytest.raises(UserError, match="means are taken over seeds only"):
            check_repeats(finished_runs([*folders[:3], other]), "these runs")
    check_repeats(finished_runs(folders[:3]), "these runs")


def test_the_same_run_in_two_sweeps_counts_once(tmp_path: Path) -> None:
    folders = [MadeUp(tmp_path / name).finished(rank=1) for name in ("one", "two")]
    (group,) = repeats(finished_runs(folders))
    assert len(group.runs) == 1


def test_runs_that_begin_with_other_runs_are_grouped_by_the_settings_of_these(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")

    def after(rank: int, seed: int) -> RunFolder:
        first = sweep.finished(rank=rank, seed=seed)
        folder = sweep.finished(rank=64, block=5, seed=seed, lr=1e-4 * rank)
        folder.path.rename(sweep.home / f"after-{rank}-{seed}")
        folder = RunFolder(sweep.home / f"after-{rank}-{seed}")
        used = folder.read_config()["sae"]["used"][0] | {"path": str(first.path)}
        return with_config(folder, init=str(first.path), train={"lr": 1e-3}, sae={"used": [used]})

    folders = [after(rank, seed) for rank in (1, 4) for seed in (0, 1)]
    groups = repeats(finished_runs(folders))
    assert [len(group.runs) for group in groups] == [2, 2]


def test_a_mean_over_a_missing_value_is_missing() -> None:
    assert mean_of([1.0, None]).value is None
    assert mean_of([2.0]).margin is None
    assert mean_of([1.0, 2.0]).written("{:.2f}".format) == "1.50 ± 6.35"
    assert mean_of([1.0, 1.0]).written(str) == "1.0"


def test_the_table_has_a_row_for_each_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    for rank in (1, 4):
        for seed in (0, 1, 2):
            sweep.finished(rank=rank, seed=seed)
    home = str(sweep.home)
    assert main(["table", home, "--format", "json", "--sort", "gap_closed"]) == 0
    best, worst = json.loads(capsys.readouterr().out)
    assert (best["rank"], worst["rank"]) == (4, 1)
    closed = [0.06 * 3 + 0.03 - 0.04 + 0.005 * seed for seed in (0, 1, 2)]
    assert best["gap_closed"] == pytest.approx(sum(closed) / 3 * (1 - 0.049787), rel=1e-3)
    assert best["gap_closed_margin"] > 0 and len(best["run"]) == 3
    assert main(["table", home, "--each-seed", "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert main(["table", home]) == 0
    printed = capsys.readouterr().out
    assert "±" in printed and "* closes the largest share" in printed and "3 seeds" in printed
