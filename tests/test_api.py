"""Runs from Python, as in a notebook."""

from pathlib import Path

import pytest

import sae_lora
from sae_lora.common.errors import ConfigError, UserError
from tests.support.points import SMALL


@pytest.mark.slow
@pytest.mark.usefixtures("forked_jobs")
def test_launch_trains_a_sweep_and_returns_its_runs(tmp_path: Path) -> None:
    settings = [*SMALL, f"output_dir={tmp_path}/out puts", f"data.cache_dir={tmp_path}/cache"]
    overrides = [override for override in settings if "rank" not in override]
    runs = sae_lora.launch([*overrides, "lora.rank=1,2"])
    assert [run.config["lora"]["rank"] for run in runs] == [1, 2]
    first = runs[0]
    assert first.state == "done" and first.folder.parent == tmp_path / "out puts" / "main"
    curve = first.curve()
    assert curve["tokens"].tolist() == [0, 512, 1024]
    assert curve["ce_gap"].iloc[-1] == first.summary["ce_gap"]
    assert len(runs.plot().data) == 2
    assert first.adapted().generate("import os", 3).startswith("import os")
    summary = (first.folder / "summary.json").read_bytes()
    again = sae_lora.launch([*overrides, "lora.rank=1"])
    assert [run.folder for run in again] == [first.folder]
    assert (first.folder / "summary.json").read_bytes() == summary


@pytest.mark.slow
@pytest.mark.usefixtures("forked_jobs")
def test_the_summary_of_a_failed_run_raises_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_lora.launcher.launch._check_can_run", lambda config: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (run,) = sae_lora.launch([*SMALL, f"output_dir={tmp_path}", "train.device=cuda"])
    assert run.state == "failed"
    with pytest.raises(UserError, match="cuda"):
        _ = run.summary


@pytest.mark.parametrize("override", ["lora.rnk=3", "lora.rank=0", "lora=papr"])
def test_impossible_values_raise_an_error(override: str) -> None:
    with pytest.raises(UserError, match="nearest valid: lora"):
        sae_lora.launch([override])


def test_options_of_the_terminal_are_refused() -> None:
    with pytest.raises(ConfigError, match="group=option or key=value"):
        sae_lora.launch(["-m", "lora.rank=1,2"])
    with pytest.raises(ConfigError, match="a list of overrides"):
        sae_lora.launch("lora.rank=1,2")


@pytest.mark.slow
def test_a_dry_run_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = sae_lora.launch(["lora.rank=1,2", "launcher.dry_run=true", f"output_dir={tmp_path}/new"])
    assert len(runs) == 2 and all(run.state == "new" for run in runs)
    assert "2 runs: 2 new" in capsys.readouterr().out and not (tmp_path / "new").exists()
