"""The W&B workspace of a sweep, as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sae_lora.cli import main
from tests.support.attempts import frozen


def panels(workspace: dict[str, Any]) -> list[dict[str, Any]]:
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def test_panels_show_the_sweep_by_rank_width_l0_and_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (1, 4):
        frozen(tmp_path, f"lora.rank={rank}", "tracking.project=mine", "tracking.entity=me", "sweep=s")
    assert main(["dashboard", str(tmp_path / "s"), "--dry-run"]) == 0
    workspace = json.loads(capsys.readouterr().out)
    assert (workspace["entity"], workspace["project"]) == ("me", "mine")
    (runs,) = workspace["spec"]["section"]["runSets"]
    (group,) = runs["filters"]["filters"]
    assert (group["key"]["name"], group["value"]) == ("group", "s")
    (order,) = runs["sort"]["keys"]
    assert order == {"key": {"section": "summary", "name": "result.gap_closed"}, "ascending": False}

    configs = [(panel["viewType"], panel["config"]) for panel in panels(workspace)]
    curves = [config for kind, config in configs if kind == "Run History Line Plot"]
    assert {(plot["metrics"][0], plot["xAxis"], plot["groupBy"]) for plot in curves} >= {
        ("ce_gap", "tokens", "lora.value.rank"),
        ("ce_gap", "train_seconds", "lora.value.rank"),
    }
    factors = ["lora.value.rank", "sae.value.width", "sae.value.l0", "layer.value.index"]
    scatters = [config for kind, config in configs if kind == "Scatter Plot"]
    assert [plot["xAxis"] for plot in scatters] == [f"config:{key}" for key in factors]
    assert {plot["yAxis"] for plot in scatters} == {"summary:result.gap_closed"}
    (together,) = [config for kind, config in configs if kind == "Parallel Coordinates Plot"]
    assert [column["accessor"] for column in together["columns"]] == [
        *(f"config:{key}" for key in factors),
        "summary:result.gap_closed",
    ]


def test_runs_of_two_projects_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, project in ((1, "mine"), (4, "other")):
        frozen(tmp_path, f"lora.rank={rank}", f"tracking.project={project}")
    assert main(["dashboard", str(tmp_path / "main"), "--dry-run"]) == 1
    assert "(default)/mine, (default)/other" in capsys.readouterr().err


def test_without_wandb_workspaces_it_names_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen(tmp_path)
    for name in ("wandb_workspaces", "wandb_workspaces.workspaces", "wandb_workspaces.reports.v2"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["dashboard", str(tmp_path / "main"), "--dry-run"]) == 1
    assert "pip install wandb-workspaces" in capsys.readouterr().err
