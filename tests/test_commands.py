"""The commands of `sae-lora`: their names, help, options; the keys that `launch --help` describes."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from sae_lora.cli import main
from sae_lora.config.compose import points
from sae_lora.config.reference import documented_keys, groups
from sae_lora.config.schema import WRITTEN_BY_PLANNER
from sae_lora.config.serialize import keys
from tests.support.commands import launch, launch_in_this_process


def test_the_version_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sae_lora {version('sae_lora')}\n"


def test_help_has_three_groups_with_a_line_for_each_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"─ {group} ─") for group in ("Run", "Look", "Share")]
    assert places == sorted(places)
    for name in ("launch", "status", "table", "report", "evaluate", "compare", "export", "sync"):
        assert f"│ {name} " in text
    assert "reach" not in text and "budget" not in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("reach", "recipes"),
        ("budget", "methods"),
        ("time_to_ce", "time-to-ce"),
        ("saes", "saes"),
        ("groups", "groups"),
    ],
)
def test_an_old_name_says_the_new_one(old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([old, "outputs/a", "--to", "b"]) == 1
    assert f"`{old}` is called `sae-lora compare {new}` now" in capsys.readouterr().err


def test_an_option_takes_several_values_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = "none of these runs is finished"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    for suites in (["--suite", "core", "lora"], ["--suite", "core", "--suite", "lora"]):
        assert main(["evaluate", str(tmp_path), *suites, "--again"]) == 1
        assert none in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--suite", "core", "lroa"]) == 2
    assert "'lroa' is not one of core, mechanism, lora" in capsys.readouterr().err
    assert main(["benchmark", "--pack", "1", "7"]) == 2


@pytest.mark.parametrize(
    "arguments", [["tabel", "x"], ["table"], ["table", "x", "--sort"], ["compare", "x"]]
)
def test_a_command_that_cannot_be_read_is_exit_code_2(arguments: list[str]) -> None:
    assert main(arguments) == 2


def test_keys_are_described_but_those_of_the_planner() -> None:
    described = {key.name: key for key in documented_keys()}
    groups_of_keys = {name.rpartition(".")[0] for name in keys()}
    assert described.keys() == keys().keys() - WRITTEN_BY_PLANNER - groups_of_keys
    for key in described.values():
        assert key.text.endswith(".") and len(key.sentence) > 8, key.name


def test_launch_help_shows_groups_and_values_as_composed() -> None:
    text = launch_in_this_process("--help", "lora=paper").stdout
    assert "lora.dropout=0.1 " in text and "Rank r of every adapter" in text
    assert "lora.begun" not in text and "sae-lora --help" in text
    for group, options in groups().items():
        assert group in text and options[0] in text


def test_an_old_group_is_heard_and_named() -> None:
    asked = "experiment=methods", "arm=methods/lora", "train.seed=0"
    planned = launch_in_this_process("-m", *asked, "launcher.dry_run=true")
    assert planned.returncode == 0 and "1 run: 1 new" in planned.stdout
    assert "the config group `arm` is called `variant` now" in planned.stderr


def test_groups_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/mine.yaml").write_text("rank: 3\nalpha: 2r\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /lora: mine\nsweep: mine\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      train.seed: 1,2\n"
    )
    asked = [f"--config-dir={tmp_path}", "experiment=mine"]
    composed = points(asked, run_now=pytest.fail)
    assert [(point.lora.rank, point.train.seed, point.sweep) for point in composed] == [
        (3, 1, "mine"),
        (3, 2, "mine"),
    ]


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "sae_lora", "launch", "lora.rnk=3"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr == launch("lora.rnk=3").stderr
