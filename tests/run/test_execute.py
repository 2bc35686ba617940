"""One run with the embedded model: the files in its folder."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from sae_lora.cli import main
from sae_lora.common.errors import EXIT_FAILED, EXIT_HELD
from sae_lora.common.locks import held
from sae_lora.config.schema import ModelConfig
from sae_lora.config.serialize import load
from sae_lora.launcher.plan import plan
from sae_lora.models.loading import load_model
from sae_lora.run import execute
from tests.support.points import Point, run_here


def test_a_run_writes_curve_and_summary(point: Point) -> None:
    (folder,) = run_here(point())
    summary = folder.read_summary()
    assert load(folder.config.read_text()).sae.used[0].id == "block_3-width_1024-l0_4"
    curve = folder.read_curve()
    assert [row.tokens for row in curve] == [0, 512, 1024]
    assert summary["student_ce"] == curve[-1].student_ce
    assert summary["gap_closed"] == curve[-1].gap_closed
    assert summary["initial_gap"] == pytest.approx(summary["spliced_ce"] - summary["base_ce"])
    assert summary["initial_gap"] > 0
    assert summary["l0"] == pytest.approx(4, abs=0.1)
    assert summary["version"] == 1
    assert len(summary["sae"][0]["sha256"]) == 64
    assert summary["environment"]["packages"]["torch"] == torch.__version__


def test_peft_loads_the_saved_adapter(point: Point) -> None:
    """Without this package, and the adapter changes the logits of the embedded model."""
    (folder,) = run_here(point())
    base = load_model(ModelConfig(name="tiny"), point().train.dtype, torch.device("cpu")).model
    tokens = torch.arange(2, 34)[None]
    plain = base(tokens).logits
    adapted = PeftModel.from_pretrained(base, str(folder.adapter))
    assert not torch.allclose(adapted(tokens).logits, plain)
    assert json.loads((folder.adapter / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.slow
def test_several_saes_at_once(point: Point) -> None:
    pair, single = run_here(
        point("layer.index=[2,5]", "lora.blocks=all"), point("layer.index=2", "lora.blocks=all")
    )
    summary = pair.read_summary()
    assert [sae["block"] for sae in summary["sae"]] == [2, 5]
    assert all(0 < sae["fvu"] < 2 for sae in summary["sae"])
    assert summary["initial_gap"] > single.read_summary()["initial_gap"]


@pytest.mark.slow
def test_table_and_report_of_finished_runs(point: Point, tmp_path: Path) -> None:
    run_here(*(point(f"lora.rank={rank}") for rank in (1, 2)))
    assert main(["table", str(tmp_path / "main")]) == 0
    assert main(["report", str(tmp_path / "main"), "--no-pictures"]) == 0
    report = json.loads((tmp_path / "main/report/summary.json").read_text())
    assert report["varying"] == ["rank"] and report["states"] == {"done": 2}


def test_a_failure_is_written_with_its_traceback(point: Point, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (planned,) = plan([point(f"data.cache_dir={tmp_path}/file/cache")]).runs
    planned.freeze()
    assert execute.attempt([planned.folder]) == EXIT_FAILED
    failure = json.loads(planned.folder.failure.read_text())
    assert failure["message"].startswith("data.cache_dir: ")
    assert "Traceback" in failure["details"]


def test_a_run_that_another_process_holds_is_skipped(
    point: Point, capsys: pytest.CaptureFixture[str]
) -> None:
    (planned,) = plan([point()]).runs
    planned.freeze()
    with held(planned.folder.path):
        assert execute.attempt([planned.folder]) == EXIT_HELD
    assert "being run by another process" in capsys.readouterr().err
    assert not planned.folder.failure.exists()
    assert not planned.folder.curve.exists()


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(tmp_path)]) == 1
    assert "holds no runs" in capsys.readouterr().err
