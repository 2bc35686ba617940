"""The experiments on a real model: their stages, and the independent check."""

import importlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import sae_lora
from sae_lora.embedded import MODEL
from sae_lora.records.folder import RunFolder
from sae_lora.report.sweep import Sweep
from scripts import addup
from scripts.real_model import check, tables
from tests.support.commands import REPOSITORY
from tests.support.composing import composed
from tests.support.points import points_in, run_here

stages = importlib.import_module("scripts.real_model.__main__")


@pytest.fixture(scope="module")
def checked_runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """Runs of three methods on the embedded model, which the check reads as any other."""
    point = points_in(tmp_path_factory.mktemp("runs"))
    sae = MODEL.parent / "saes/block_3-width_1024-l0_4"
    disk = (f"model.name={MODEL}", "sae=disk", f"sae.path={sae}", "layer.index=3")
    methods = ("lora", "sae_finetune", "lora_sae")
    return [run_here(point(*disk, f"method={method}"))[0] for method in methods]


@pytest.mark.slow
def test_an_independent_script_finds_the_same_numbers(
    checked_runs: list[RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in checked_runs:
        record = tmp_path / f"{folder.path.name}.json"
        monkeypatch.setattr("sys.argv", ["check", str(folder.path), "--to", str(record)])
        check.main()
        values = json.loads(record.read_text())["values"]
        assert len(values) == 9
        for name, row in values.items():
            assert abs(row["difference"]) < 1e-6, (folder.path.name, name, row)
        assert values["student_ce"]["script"] != values["spliced_ce"]["script"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_jobs")
def test_ways_have_equal_tokens_or_equal_flops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing exceeds LoRA's tokens and FLOPs, and each run falls short by less than a step."""
    monkeypatch.setattr(addup, "SEEDS", (3,))
    ways = ["LoRA", "both at once", "finetuning, then LoRA"]
    monkeypatch.setattr(addup, "WAYS", {way: addup.WAYS[way] for way in ways})
    launched = []

    def launch(*overrides: str) -> Sweep:
        home = (f"output_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache", "lora.rank=2")
        small = ("data.validation_tokens=1024", "train.eval_every_tokens=2048", "tracking=disabled")
        launched.append(sae_lora.launch(["experiment=addup", *home, *small, *overrides]))
        return launched[-1]

    rows = list(addup.rows(launch, tokens=2048, step=512, budgets=("tokens", "FLOPs")))
    assert [row["way"] for row in rows] == [*ways, *ways[1:]]
    lora = rows[0]
    for row, runs in zip(rows, launched, strict=True):
        begun = [run.config["init"] for run in runs]
        assert begun == [None, *(str(run.folder) for run in runs[:-1])]
        assert row["gap_before"] == lora["gap_before"] and row["seed"] == 3
        assert row["gap_closed"] == pytest.approx(1 - row["gap_after"] / row["gap_before"])
        if row["budget"] == "tokens":
            assert row["tokens"] == 2048
        else:
            step = 512 * len(runs) * row["flops"] / row["tokens"]
            assert 0 <= lora["flops"] - row["flops"] < step


def test_records_of_runs_that_the_outputs_lack_stay(tmp_path: Path) -> None:
    rows = [
        {"sweep": "s", "run": name, "device": device, "kl": kl}
        for name, device, kl in (("a", "cpu", 1), ("b", "cpu", 1), ("b", "cpu", 2), ("a", "gpu", 2))
    ]
    path = tmp_path / "runs.json"
    assert tables.with_earlier(rows[:1], path) == rows[:1]
    path.write_text(json.dumps(rows[:2]))
    assert tables.with_earlier(rows[2:], path) == [rows[0], rows[3], rows[2]]


def test_the_tables_of_the_page_are_those_of_its_records() -> None:
    page = REPOSITORY / "docs/results/real_model.md"
    text = page.read_text()
    assert tables.with_tables(text, page.with_suffix("")) == text
    assert set(re.findall(r"<!-- (\w+) -->", text)) == {*tables.TABLES, *tables.OTHERS}


@pytest.mark.slow
@pytest.mark.parametrize("from_hub", [False, True])
def test_every_launch_of_every_stage_composes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, from_hub: bool
) -> None:
    """With the last of the values of an override. Other tests compose all points of experiments."""
    models = []

    def launch(overrides: list[str]) -> list[SimpleNamespace]:
        models.append(composed(*(re.sub(r"=.*,", "=", override) for override in overrides)).model.name)
        summary = dict.fromkeys(("initial_gap", "ce_gap", "initial_kl", "kl", "fvu", "train_flops"), 1.0)
        run = SimpleNamespace(folder=tmp_path / "RUN", summary=summary | {"train_tokens": 1024})
        run.adapted = lambda: SimpleNamespace(generate=lambda prompt, *_, **__: prompt)
        return [run] * math.prod(1 + override.count(",") for override in overrides)

    monkeypatch.setattr(sae_lora, "launch", launch)
    monkeypatch.setattr(addup, "SEEDS", (0, 1))
    monkeypatch.setattr(stages.subprocess, "run", lambda *_, **__: None)
    (tmp_path / "outputs").mkdir()
    names = ["saes", "checks"] if from_hub else []
    stages.main([str(tmp_path), *names, *(["--hub"] if from_hub else [])])
    assert len(models) >= (4 if from_hub else 25)
    local = str(tmp_path / "SmolLM2-135M")
    assert set(models) == {"HuggingFaceTB/SmolLM2-135M" if from_hub else local}
