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
from sae_lora.launcher.launch import launch as launch_points
from sae_lora.launcher.plan import plan
from tests.support.commands import launch, launch_in_this_process
from tests.support.points import points_in, run_here
from tests.support.sweeps import MadeUp


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sae_lora {version('sae_lora')}\n"


def test_help_has_three_groups_with_a_line_for_each_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    positions = [text.index(f"─ {group} ─") for group in ("Run", "Look", "Share")]
    assert positions == sorted(positions)
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
def test_an_old_command_names_the_new_one(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([old, "outputs/a", "--to", "b"]) == 1
    assert f"`{old}` is now `sae-lora compare {new}`" in capsys.readouterr().err


def test_an_option_takes_several_values_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "none of these runs is finished"
    MadeUp(tmp_path).folder()
    for suites in (["--suite", "core", "lora"], ["--suite", "core", "--suite", "lora"]):
        assert main(["evaluate", str(tmp_path), *suites, "--again"]) == 1
        assert message in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--suite", "core", "lroa"]) == 2
    assert "'lroa' is not one of core, mechanism, lora" in capsys.readouterr().err
    assert main(["benchmark", "--pack", "1", "7"]) == 2


@pytest.mark.parametrize(
    "arguments", [["tabel", "x"], ["table"], ["table", "x", "--sort"], ["compare", "x"]]
)
def test_a_malformed_command_exits_with_code_2(arguments: list[str]) -> None:
    assert main(arguments) == 2


def test_all_keys_except_those_of_the_planner_are_described() -> None:
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


def test_an_old_group_works_and_names_the_new_one() -> None:
    overrides = "experiment=methods", "arm=methods/lora", "train.seed=0"
    planned = launch_in_this_process("-m", *overrides, "launcher.dry_run=true")
    assert planned.returncode == 0 and "1 run: 1 new" in planned.stdout
    assert "the config group `arm` is called `variant` now" in planned.stderr


def test_config_groups_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/mine.yaml").write_text("rank: 3\nalpha: 2r\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /lora: mine\nsweep: mine\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      train.seed: 1,2\n"
    )
    arguments = [f"--config-dir={tmp_path}", "experiment=mine"]
    composed = points(arguments)
    assert [(point.lora.rank, point.train.seed, point.sweep) for point in composed] == [
        (3, 1, "mine"),
        (3, 2, "mine"),
    ]


def test_python_m_sae_lora_is_the_same_command() -> None:
    command = [sys.executable, "-m", "sae_lora", "launch", "lora.rnk=3"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1 and finished.stderr == launch("lora.rnk=3").stderr


@pytest.mark.slow
def test_what_a_finished_run_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Suites that the command asks for, and text that another run was trained on."""
    point = points_in(tmp_path)
    (folder,) = run_here(point())
    assert launch_points([point("evaluation=core")]) == 0
    sweep = folder.path.parent
    assert f"`sae-lora evaluate {sweep} --suite core`" in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text("import os\n")
    sae = point("method=sae", "sae.width=64", "sae.l0=4")
    (source,) = run_here(sae)
    files = f"data.files={text}"
    (note,) = plan(
        [point(f"init={source.path}", "data=text_files", files, "data.context_length=128")]
    ).notes
    assert note.endswith(f"was trained on stdlib; this run reads {text}")
