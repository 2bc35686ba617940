"""Data frames of a sweep, for run folders in any state."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sae_lora
from sae_lora.common.errors import UserError
from sae_lora.config.overrides import command
from sae_lora.config.serialize import as_dict
from sae_lora.report.frames import factors
from sae_lora.report.sweep import load_sweep
from tests.support.points import folders_in, points_in, run_here
from tests.support.sweeps import MadeUp, summed_up


def test_a_row_per_run_in_the_order_of_the_factors(tmp_path: Path) -> None:
    MadeUp(tmp_path / "grid").grid(ranks=(16, 1), blocks=(3, 1))
    frame = load_sweep(tmp_path / "grid").frame()
    assert factors(frame) == ["block", "rank"]
    assert list(zip(frame["block"], frame["rank"], strict=True)) == [(1, 1), (1, 16), (3, 1), (3, 16)]
    assert set(frame["sweep"]) == {"grid"} and set(frame["state"]) == {"done"}
    closed = frame["gap_closed"] / frame["trainable_parameters"] * 1e6
    assert list(frame["closed_per_million_parameters"]) == pytest.approx(list(closed))
    assert list(frame["closed_per_minute"]) == pytest.approx(
        list(frame["gap_closed"] / frame["train_seconds"] * 60)
    )


def test_unfinished_runs_show_their_progress(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "half")
    sweep.finished(rank=1)
    sweep.folder(rank=2)
    begun = sweep.begun(3, rank=4)
    failed = sweep.begun(2, rank=8)
    failed.write_failure("out of memory", "…")
    frame = load_sweep(tmp_path / "half").frame().set_index("rank")
    assert dict(frame["state"]) == {1: "done", 2: "new", 4: "new", 8: "failed"}
    assert frame.loc[8, "note"] == "out of memory"
    assert frame.loc[4, "train_tokens"] == begun.read_curve()[-1].tokens
    assert frame.loc[4, "ce_gap"] == begun.read_curve()[-1].ce_gap
    assert frame["gap_closed"].isna().to_dict() == {1: False, 2: True, 4: False, 8: False}


def test_a_factor_that_is_determined_by_another_is_not_listed(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    for rank, seed in ((1, 0), (4, 1)):
        sweep.finished(rank=rank, seed=seed, lr=0.1 * rank)
    frame = load_sweep(tmp_path / "sweep").frame()
    assert factors(frame) == ["rank", "seed"]  # the seed is always listed
    assert list(frame["train.lr"]) == pytest.approx([0.1, 0.4])
    sweep.finished(rank=4, seed=2, lr=0.1)
    assert factors(load_sweep(tmp_path / "sweep").frame()) == ["rank", "train.lr", "seed"]


def test_the_hook_of_the_saes_is_a_factor(tmp_path: Path) -> None:
    """Runs of an older version have no hook in their config; it is resid_post."""
    sweep = MadeUp(tmp_path / "hooks")
    for rank, hook in ((1, "mlp_out"), (2, "resid_post"), (4, None)):
        folder = sweep.finished(rank=rank)
        config = yaml.safe_load(folder.config.read_text())
        config["layer"] |= {"hook": hook}
        (used,) = config["sae"]["used"]
        del used["hook"]
        if hook is not None:
            used["hook"] = hook
        folder.write_config(yaml.safe_dump(config))
        summed_up(folder)
    frame = load_sweep(tmp_path / "hooks").frame()
    assert dict(zip(frame["rank"], frame["hook"], strict=True)) == {
        1: "mlp_out",
        2: "resid_post",
        4: "resid_post",
    }
    assert factors(frame) == ["hook", "rank"]
    assert "layer.hook" not in frame


def test_curves_have_the_points_of_all_folders(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    folders = [sweep.begun(points, rank=points) for points in (2, 3)]
    curves = load_sweep(tmp_path / "sweep").curves()
    assert len(curves) == 5
    expected = [point.student_ce for folder in folders for point in folder.read_curve()]
    assert list(curves["student_ce"]) == expected


def test_several_sweeps_single_runs_and_none(tmp_path: Path) -> None:
    for name in ("one", "two"):
        MadeUp(tmp_path / name).grid(ranks=(1, 4), blocks=(3,))
    sweeps = load_sweep(tmp_path / "one", str(tmp_path / "two"))
    assert len(sweeps) == 4 and len(load_sweep(sweeps.folders[0].path)) == 1
    assert sorted(sweeps.frame()["sweep"]) == ["one", "one", "two", "two"]
    with pytest.raises(UserError, match="holds no runs"):
        load_sweep(tmp_path / "none")


def test_the_frame_of_a_trained_run(tmp_path: Path) -> None:
    point = points_in(tmp_path)()
    run_here(point)
    (run,) = load_sweep(*(folder.path for folder in folders_in(tmp_path))).frame().to_dict("records")
    assert run["state"] == "done"
    assert run["train_flops"] > 6 * run["trainable_parameters"] * run["train_tokens"]
    assert (run["block"], run["width"], run["l0"], run["rank"]) == (3, 1024, 4.0, 2)
    assert run["command"] == command(as_dict(point))


def test_load_sweep_imports_no_torch() -> None:
    assert sae_lora.load_sweep is load_sweep
    code = "import sys, sae_lora; sae_lora.load_sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
