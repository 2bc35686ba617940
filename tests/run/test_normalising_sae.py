"""A run around an SAE that normalises its input and states much: notes, steering, a suite that fails."""

from pathlib import Path

import pytest
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lora.common.errors import UserError
from sae_lora.config.enums import Suite
from sae_lora.config.execution import EvaluationConfig
from sae_lora.config.schema import Config
from sae_lora.evaluation import run_suites, suite_records
from sae_lora.launcher.launch import launch
from sae_lora.launcher.prefetch import prefetched
from sae_lora.records.folder import RunFolder
from sae_lora.report.page import Report, page
from sae_lora.report.sweep import load_sweep
from sae_lora.report.tables import evaluation_tables
from tests.support.points import run_here
from tests.support.subjects import quick_points_in

STATED = {"model_name": "gpt2-small", "context_size": 16, "prepend_bos": False, "l0": 30.0}
KNOWN_BEFORE = [
    "block 3: the SAE was trained on gpt2-small",
    "block 3: the SAE was trained on sequences",
]
OF_THE_TEXT = ["block 3: the SAE was trained on sequences without BOS"]
MEASURED = ["block 3: the SAE is stated to have 30 active latents per token; before training 8 were"]
FEW = EvaluationConfig(
    resamples=10,
    steering_latents=2,
    steering_strengths=[0.5],
    steering_examples=2,
    steering_max_harm=None,
    steering_text_tokens=8,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    home = tmp_path_factory.mktemp("home")
    metadata = SAEMetadata(hook_name="blocks.3.hook_resid_post", **STATED)
    values = {"normalize_activations": "layer_norm", "metadata": metadata}
    TopKSAE(TopKSAEConfig(d_in=128, d_sae=256, k=8, **values)).save_model(home / "sae")
    return quick_points_in(home)("sae=disk", f"sae.path={home}/sae", "data.validation_tokens=4096")


@pytest.fixture(scope="module")
def finished(config: Config) -> RunFolder:
    (folder,) = run_here(config)
    return folder


def noted(lines: list[str], beginnings: list[str]) -> bool:
    """True if the lines are these, by their beginnings, in any order."""
    return len(lines) == len(beginnings) and all(
        any(line.startswith(beginning) for line in lines) for beginning in beginnings
    )


def notes_in(printed: str) -> list[str]:
    return [line.removeprefix("note: ") for line in printed.splitlines() if line.startswith("note: ")]


def test_the_plan_says_what_was_noticed(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    config.launcher.dry_run = True
    try:
        assert launch([config]) == 0
    finally:
        config.launcher.dry_run = False
    assert noted(notes_in(capsys.readouterr().out), KNOWN_BEFORE + OF_THE_TEXT)


def test_the_launch_says_what_the_plan_could_not_know(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    from sae_lora.config.serialize import load

    prefetched([load(finished.config.read_text())])
    assert noted(notes_in(capsys.readouterr().out), OF_THE_TEXT)


@pytest.mark.case("A5")
def test_summary_and_report_have_all_notes(finished: RunFolder, tmp_path: Path) -> None:
    notes = finished.read_summary()["notes"]
    assert noted(notes, KNOWN_BEFORE + OF_THE_TEXT + MEASURED)
    report = Report(load_sweep(finished.path.parent))
    text = page(report, [], tmp_path)
    assert all(f"<li>{note}</li>" in text for note in notes)


@pytest.mark.case("B2")
def test_a_suite_with_a_bug_ends_alone(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steering goes on, which decodes the latents of one `encode` twice."""

    def broken(*_: object) -> None:
        raise KeyError("gone")

    monkeypatch.setitem(run_suites._SUITES, Suite.mechanism, run_suites._Suite(broken, ()))
    assert run_suites.evaluate(finished, [Suite.mechanism, Suite.steering], FEW) == [Suite.mechanism]
    record = suite_records.read(finished, Suite.steering)
    assert record is not None and len(record.results["latents"]) == 2
    printed = capsys.readouterr().err
    assert f"failed: mechanism of {finished.path.name}: KeyError: 'gone'" in printed
    log = finished.evaluation / "mechanism_failed.log"
    assert str(log) in printed.replace("\n", "")
    assert "Traceback" in log.read_text()
    (table,) = evaluation_tables([finished], [Suite.mechanism])
    assert list(table.columns[-1].cells) == ["failed: KeyError: 'gone'"]
    suite_records.write(finished, suite_records.Record("mechanism", {}, {}, {}, 1.0))
    assert not log.exists()


@pytest.mark.parametrize("error", [UserError("the SAE is gone"), ValueError("damaged")])
def test_a_run_that_cannot_be_loaded_does_not_stop_the_others(
    finished: RunFolder, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def subject(*_: object) -> None:
        raise error

    monkeypatch.setattr(run_suites, "Subject", subject)
    assert run_suites.evaluate(finished, [Suite.lora], FEW, again=True) == [Suite.lora]
