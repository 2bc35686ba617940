"""Optuna's sweeper: trials in packs, a storage in the sweep's folder, and the same trials again."""

from pathlib import Path

import pytest

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.locks import held
from sae_lora.launcher.command import launch_command
from sae_lora.records.folder import RunFolder
from tests.support.points import SMALL, folders_in

optuna = pytest.importorskip("optuna")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_jobs")]

SEARCH = ("lora.blocks=choice(after,all)", "train.lr=tag(log,interval(1e-3,1e-2))")
TRIALS = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", *SEARCH)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return [*TRIALS, *SMALL, f"output_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"]


def studies(home: Path) -> list[optuna.Study]:
    storage = f"sqlite:///{home}/main/optuna.db"
    every = optuna.get_all_study_summaries(storage)
    return [optuna.load_study(study_name=each.study_name, storage=storage) for each in every]


def trials(home: Path) -> dict[tuple[str, float], RunFolder]:
    runs = {}
    for folder in folders_in(home):
        config = folder.read_config()
        runs[config["lora"]["blocks"], config["train"]["lr"]] = folder
    return runs


def ended(home: Path) -> dict[Path, int]:
    """When each run has ended."""
    return {folder.path: folder.summary.stat().st_mtime_ns for folder in folders_in(home)}


def test_trials_share_packs_and_the_same_command_repeats_none(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch_command(command)[0] == 0
    printed = capsys.readouterr().out
    runs = trials(tmp_path)
    assert {folder.read_summary()["trained_together"] for folder in runs.values()} == {2}
    assert "4 trials by gap after" in printed and "1. sae-lora launch" in printed
    (study,) = studies(tmp_path)
    values = {
        (trial.params["lora.blocks"], trial.params["train.lr"]): trial.value for trial in study.trials
    }
    assert values == {trial: folder.read_summary()["ce_gap"] for trial, folder in runs.items()}
    before = ended(tmp_path)
    assert launch_command([*command, "launcher.pack=off"])[0] == 0
    assert capsys.readouterr().out.count("2 of 2 already done, skipped") == 2
    assert before == ended(tmp_path)
    (again,) = studies(tmp_path)  # written anew
    assert [trial.params for trial in again.trials] == [trial.params for trial in study.trials]
    assert launch_command([*command, "hydra.sweeper.n_trials=2"])[0] == 0
    assert sorted(len(each.trials) for each in studies(tmp_path)) == [2, 4]


def test_a_storage_of_ones_own_goes_on(command: list[str], tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/mine.db"
    mine = [
        *command,
        "hydra.sweeper.n_trials=2",
        f"hydra.sweeper.storage='{storage}'",
        "hydra.sweeper.study_name=mine",
    ]
    for number in (2, 4):
        assert launch_command(mine)[0] == 0
        assert len(optuna.load_study(study_name="mine", storage=storage).trials) == number
    assert not (tmp_path / "main/optuna.db").exists()


def test_a_search_for_the_worst_is_refused_before_anything_runs(
    command: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.direction = 'maximize'"):
        launch_command([*command, "hydra.sweeper.direction=maximize"])
    with pytest.raises(ConfigError, match="allowed: maximize"):
        launch_command([*command, "objective=gap_closed"])
    with pytest.raises(ConfigError, match="adaptive sweeper"):
        launch_command([*command, "launcher.halving=train.lr"])
    assert not folders_in(tmp_path)


def test_a_dry_run_writes_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for word in ("launcher.dry_run=true", "launcher.dry_run=True", "++launcher.dry_run=true"):
        assert launch_command([*command, word])[0] == 0
        assert "2 runs: 2 new" in capsys.readouterr().out
        assert not (tmp_path / "main").exists()


def test_the_same_search_does_not_run_twice_at_once(command: list[str], tmp_path: Path) -> None:
    assert launch_command([*command, "hydra.sweeper.n_trials=2"])[0] == 0
    (leases,) = (tmp_path / "main").glob(".optuna-*")
    with held(leases), pytest.raises(UserError, match=r"is running already \(PID \d+ on .*wait"):
        launch_command([*command, "hydra.sweeper.n_trials=2"])
    assert launch_command([*command, "hydra.sweeper.n_trials=2"])[0] == 0


def test_a_storage_that_cannot_be_used_is_named(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    (tmp_path / "main/optuna.db").write_text(
        "nothing of Optuna's, but long enough to be read as one" * 100
    )
    with pytest.raises(UserError, match=r"optuna\.db cannot be used for the trials: .*; move it away"):
        launch_command(command)
