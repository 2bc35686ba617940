"""The plan and its runs, on the embedded default: skipped when done, kept when failed, compared."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from sae_lora import launcher, run
from sae_lora.__main__ import main
from sae_lora.config import Config, ModelConfig, load
from sae_lora.launcher import State
from sae_lora.lease import held
from sae_lora.models import load_model
from sae_lora.records import RunFolder
from tests.composing import composed

SMALL = (
    "train.train_tokens=1024 train.batch_size=4 train.eval_every_tokens=512 data.validation_tokens=1024 "
    "lora.rank=2 tracking=disabled"
).split()


@pytest.fixture
def point(tmp_path: Path):
    """Composes points whose runs land in the test's own folder."""

    def compose(*overrides: str) -> Config:
        return composed(*SMALL, f"output_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache", *overrides)

    return compose


def folders(tmp_path: Path) -> list[RunFolder]:
    return [RunFolder(path.parent) for path in sorted(tmp_path.glob("main/*/config.yaml"))]


def test_one_run_leaves_everything(point, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = point()
    assert launcher.launch([config]) == 0
    (folder,) = folders(tmp_path)
    summary = folder.read_summary()
    assert load(folder.config.read_text()).sae.used[0].id == "block_3-width_1024-l0_4"
    curve = folder.read_curve()
    assert [one.tokens for one in curve] == [0, 512, 1024]
    assert summary["student_ce"] == curve[-1].student_ce
    assert summary["gap_closed"] == curve[-1].gap_closed
    assert summary["initial_gap"] == pytest.approx(summary["spliced_ce"] - summary["base_ce"])
    assert summary["initial_gap"] > 0
    assert summary["l0"] == pytest.approx(4, abs=0.1)
    assert summary["version"] == 1
    assert len(summary["sae"][0]["sha256"]) == 64
    assert summary["environment"]["packages"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    for words in (
        "base CE",
        "spliced CE",
        "student CE",
        "gap closed",
        "trainable parameters",
        "run folder",
    ):
        assert words in printed
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    assert launcher.launch([config]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before
    assert "1 of 1 done before" in capsys.readouterr().out


def test_the_adapter_belongs_to_the_student(point, tmp_path: Path) -> None:
    """peft alone loads what was saved onto the embedded model, and it changes the model."""
    launcher.launch([point()])
    (folder,) = folders(tmp_path)
    base = load_model(ModelConfig(name="tiny"), point().train.dtype, torch.device("cpu")).model
    tokens = torch.arange(2, 34)[None]
    plain = base(tokens).logits
    adapted = PeftModel.from_pretrained(base, str(folder.adapter))
    assert not torch.allclose(adapted(tokens).logits, plain)
    assert json.loads((folder.adapter / "adapter_config.json").read_text())["r"] == 2


def test_a_sweep_runs_each_point_once_and_compares(point, tmp_path: Path, capsys) -> None:
    points = [point(f"lora.rank={rank}", f"layer.index={block}") for rank in (1, 2) for block in (1, 2)]
    assert launcher.launch([*points, points[0]]) == 0
    assert len(folders(tmp_path)) == 4
    printed = capsys.readouterr().out
    assert "is named twice and runs once" in printed
    assert "gap closed" in printed
    assert main(["table", str(tmp_path / "main")]) == 0
    assert main(["figure", str(tmp_path / "main"), "--to", str(tmp_path / "gap.html")]) == 0
    assert "CE gap to the plain model" in (tmp_path / "gap.html").read_text()


def test_requests_for_the_same_sae_are_the_same_run(point, tmp_path: Path) -> None:
    planned = launcher.plan([point("sae.l0=4"), point("sae.l0=5"), point("sae.width=1k")])
    assert len(planned.runs) == 1
    assert any("sae.l0 5 does not exist; the nearest is 4" in note for note in planned.notes)


def test_the_same_request_in_other_words_is_the_same_run(point) -> None:
    forms = ["lora.blocks=[5]", "lora.blocks=5"], ["lora.blocks=[4,5]", "lora.blocks=[5,4]"]
    for one, other in forms:
        assert len(launcher.plan([point(one), point(other)]).runs) == 1


def test_a_retry_takes_what_the_new_command_says(point, tmp_path: Path) -> None:
    (first,) = launcher.plan([point("train.kl_chunk_tokens=1024")]).runs
    launcher._freeze(first)
    (again,) = launcher.plan([point("train.kl_chunk_tokens=64")]).runs
    launcher._freeze(again)
    assert first.folder.path == again.folder.path
    assert load(again.folder.config.read_text()).train.kl_chunk_tokens == 64


def test_what_another_process_runs_is_left_alone(point, tmp_path: Path, capsys) -> None:
    (planned,) = launcher.plan([point()]).runs
    launcher._freeze(planned)
    with held(planned.folder.path):
        assert launcher.launch([point()]) == 1
    assert "another process" in capsys.readouterr().err
    assert not planned.folder.failure.exists()


def test_several_saes_at_once(point, tmp_path: Path) -> None:
    assert launcher.launch([point("layer.index=[2,5]", "lora.blocks=all")]) == 0
    (folder,) = folders(tmp_path)
    summary = folder.read_summary()
    assert [sae["block"] for sae in summary["sae"]] == [2, 5]
    assert all(0 < sae["fvu"] < 2 for sae in summary["sae"])
    alone = point("layer.index=2", "lora.blocks=all")
    launcher.launch([alone])
    (single,) = [one for one in folders(tmp_path) if one.path != folder.path]
    assert summary["initial_gap"] > single.read_summary()["initial_gap"]


def test_a_failed_run_is_kept_and_its_neighbours_complete(
    point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    points = [point(f"lora.rank={rank}") for rank in (1, 2, 3)]
    execute = run.execute

    def failing(folder: RunFolder, *arguments):
        if load(folder.config.read_text()).lora.rank == 2:
            raise RuntimeError("the disk is on fire")
        return execute(folder, *arguments)

    monkeypatch.setattr(run, "execute", failing)
    assert launcher.launch(points) == 1
    states = {one.config.lora.rank: one.state for one in launcher.plan(points).runs}
    assert states == {1: State.done, 2: State.failed, 3: State.done}
    (failed,) = [folder for folder in folders(tmp_path) if folder.has_failed]
    failure = json.loads(failed.failure.read_text())
    assert failure["message"] == "RuntimeError: the disk is on fire"
    assert "Traceback" in failure["details"]
    # Not tried again unasked; tried again when asked.
    monkeypatch.setattr(run, "execute", execute)
    assert launcher.launch(points) == 1
    assert "launcher.retry_failed=true" in capsys.readouterr().err
    assert (
        launcher.launch([point(f"lora.rank={n}", "launcher.retry_failed=true") for n in (1, 2, 3)]) == 0
    )
    assert all(folder.is_finished for folder in folders(tmp_path))
    assert len(list(failed.path.glob("unfinished-1/failure.json"))) == 1


def test_dry_run_writes_nothing(point, tmp_path: Path, capsys) -> None:
    assert launcher.launch([point("launcher.dry_run=true"), point("lora.rank=4")]) == 0
    assert not folders(tmp_path)
    assert capsys.readouterr().out.count("new") == 2


def test_an_objective_for_sweepers(point, tmp_path: Path) -> None:
    gap = launcher.run_now(point())
    assert gap == folders(tmp_path)[0].read_summary()["ce_gap"]


@pytest.mark.parametrize(
    ("override", "field", "nearest"),
    [
        ("lora.blocks=[1,99]", "lora.blocks", [1]),
        ("layer.index=7", "layer.index", 6),
        ("sae=gemma_scope", "sae.family", None),
        ("data.context_length=512 train.batch_size=1", "data.context_length", 256),
    ],
)
def test_what_the_plan_refuses(
    point, override: str, field: str, nearest: object, tmp_path: Path
) -> None:
    with pytest.raises(launcher.ConfigError) as error:
        launcher.plan([point(*override.split())])
    assert (error.value.field, error.value.nearest) == (field, nearest)
    assert not folders(tmp_path)


def test_a_folder_without_runs(tmp_path: Path, capsys) -> None:
    assert main(["table", str(tmp_path)]) == 1
    assert "holds no runs" in capsys.readouterr().err
