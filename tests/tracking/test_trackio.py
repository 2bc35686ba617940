"""Trackio shows exactly the rows of the curve, on this machine, also after a run was stopped."""

import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
from trackio.sqlite_storage import SQLiteStorage

from sae_lora.common.errors import ConfigError
from sae_lora.config.serialize import load
from sae_lora.records.folder import RunFolder
from sae_lora.tracking.tracker import Tracker
from tests.support.attempts import frozen
from tests.support.points import points_in
from tests.support.sweeps import curve_point


def run_in(home: Path, *overrides: str) -> RunFolder:
    """A run in a project of this test."""
    return frozen(home, "tracking=trackio", f"tracking.project={home.name}", *overrides)


def attempt(folder: RunFolder, points: int, *, will_resume: bool) -> Tracker:
    """Track the first `points` of the curve, and end the run."""
    tracker = Tracker(load(folder.config.read_text()), folder, {})
    tracker.show(points)
    tracker.finish(None, will_resume=will_resume)
    return tracker


def rows(project: str) -> dict[str, list[dict[str, object]]]:
    """The rows of each run, as Trackio's page gets them."""
    return {name: SQLiteStorage.get_logs(project, name) for name in SQLiteStorage.get_runs(project)}


def test_a_stopped_run_goes_on_and_has_each_row_once(tmp_path: Path) -> None:
    folder = run_in(tmp_path)
    for step in (0, 50, 100):
        folder.append_point(curve_point(step))
    attempt(folder, 2, will_resume=True)  # the third point is in no checkpoint
    folder.cut_curve(2)
    for step in (100, 150):
        folder.append_point(curve_point(step))
    tracker = attempt(folder, 4, will_resume=False)
    assert tracker.place == f"trackio show --project {tmp_path.name}"
    ((name, shown),) = rows(tmp_path.name).items()
    assert name == "tiny-l3-w1024-l0_4-r16-after-s0 main-83de1517"
    assert [row["step"] for row in shown] == [0, 50, 100, 150]
    for row, point in zip(shown, folder.read_curve(), strict=True):
        values = {key: value for key, value in vars(point).items() if isinstance(value, float)}
        assert {key: row[key] for key in values} == values
    config = SQLiteStorage.get_run_config(tmp_path.name, name)
    assert config is not None and config["lora"]["rank"] == 16


def test_another_command_that_names_the_run_in_another_way_goes_on_with_it(tmp_path: Path) -> None:
    for number, name in enumerate(("rank=16 a", "lr=0.0045 b")):
        folder = run_in(tmp_path, f'tracking.name="{name}"')
        folder.append_point(curve_point(50 * number))
        attempt(folder, number + 1, will_resume=True)
    ((name, shown),) = rows(tmp_path.name).items()
    assert name.startswith("rank=16 a ")
    assert [row["step"] for row in shown] == [0, 50]


def test_without_trackio_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sae_lora\[trackio\]'"):
        points_in(tmp_path)("tracking=trackio")


@pytest.mark.slow
def test_the_runs_of_a_pack_are_shown_beside_each_other(tmp_path: Path) -> None:
    small = "train.train_tokens=1024 train.eval_every_tokens=512 data.validation_tokens=1024".split()
    home = [f"output_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"]
    project = f"tracking.project={tmp_path.name}"
    command = [sys.executable, "-m", "sae_lora", "launch", "-m", "lora.rank=1,2", *small, *home]
    subprocess.run([*command, "tracking=trackio", project], check=True, capture_output=True)
    shown = {name.partition(" ")[0]: of_run for name, of_run in rows(tmp_path.name).items()}
    assert sorted(shown) == ["rank=1", "rank=2"]
    for folder in tmp_path.glob("main/*/curve.jsonl"):
        run = RunFolder(folder.parent)
        rank = run.read_config()["lora"]["rank"]
        assert [row["ce_gap"] for row in shown[f"rank={rank}"]] == [p.ce_gap for p in run.read_curve()]
