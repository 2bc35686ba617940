"""The suite `core` against identities, a direct computation, and sae-lens's evaluation."""

import functools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler
from torch.nn.functional import cross_entropy

from sae_lora.cli import main
from sae_lora.common.console import show
from sae_lora.common.errors import UserError
from sae_lora.comparisons.recipes import savings
from sae_lora.config.enums import Suite
from sae_lora.config.execution import EvaluationConfig
from sae_lora.evaluation import core, run_suites, suite_records
from sae_lora.evaluation.bootstrap import Bootstrap, interval
from sae_lora.evaluation.core import Core
from sae_lora.evaluation.subject import Subject
from sae_lora.records.folder import RunFolder
from sae_lora.report.page import Report, page
from sae_lora.report.results import comparison_table
from sae_lora.report.sweep import Sweep
from sae_lora.report.tables import run_table
from tests.support.points import points_in, run_here

pytestmark = pytest.mark.slow  # many seconds in all

FEW = EvaluationConfig(resamples=20)
CE = 1e-7
"""Largest difference between a run's summary and the suite, in nats per token."""
DIRECT = 1e-5
"""Largest difference to a direct computation, with all logits at once in other arithmetic."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """Runs of several methods; in `everywhere`, the SAE also replaces special tokens' activations.

    `packed` has trained with another run.
    """
    compose = points_in(tmp_path_factory.mktemp("outputs"))
    point = functools.partial(compose, "train.train_tokens=512", "data.validation_tokens=512")
    methods = {
        "lora": ("train.lr=1e-2",),
        "perfect": ("sae=identity", "layer.index=3"),
        "several": ("layer.index=[2,4]",),
        "everywhere": ("sae.keep_special_tokens=false",),
        "sae_finetune": ("method=sae_finetune",),
        "linear_adapter": ("method=linear_adapter",),
        "lora_sae": ("method=lora_sae", "train.lr=1e-2"),
        "e2e": ("method=e2e", "sae.width=64", "sae.l0=4"),
    }
    runs = {name: run_here(point(*overrides))[0] for name, overrides in methods.items()}
    runs["bfloat16"], runs["packed"] = (
        run_here(*(point(f"train.dtype={dtype}", f"lora.rank={rank}") for rank in ranks))[-1]
        for dtype, ranks in (("bfloat16", (2,)), ("float32", (2, 4)))
    )
    return runs


@pytest.fixture(scope="module")
def measured(runs: dict[str, RunFolder]) -> dict[str, Core]:
    return {name: core.evaluate(Subject(run), FEW) for name, run in runs.items()}


def test_results_equal_the_runs_summary(runs: dict[str, RunFolder], measured: dict[str, Core]) -> None:
    for name, run in runs.items():
        summary, result = run.read_summary(), measured[name]
        assert result.ce["base"].value == pytest.approx(summary["base_ce"], abs=CE), name
        assert result.ce["student"].value == pytest.approx(summary["student_ce"], abs=CE), name
        assert result.distance["student"].forward_kl.value == pytest.approx(summary["kl"], abs=CE)
        assert result.distance["student"].top1_agreement.value == pytest.approx(
            summary["top1_agreement"], abs=CE
        )
        fvus = [sae["after"].fvu for sae in result.saes.values()]
        assert np.mean(fvus) == pytest.approx(summary["fvu"], abs=CE)
        if name != "e2e":
            assert result.ce["spliced"].value == pytest.approx(summary["spliced_ce"], abs=CE), name
        if summary["gap_closed"] is not None:
            assert result.gap_closed is not None
            assert result.gap_closed.value == pytest.approx(summary["gap_closed"], abs=1e-6)
        else:
            assert result.gap_closed is None


def test_the_cells_of_each_method(runs: dict[str, RunFolder], measured: dict[str, Core]) -> None:
    cells = {name: list(result.ce) for name, result in measured.items()}
    assert cells["lora"] == cells["lora_sae"] == ["base", "spliced", "student", "adapted"]
    assert cells["sae_finetune"] == cells["linear_adapter"] == ["base", "spliced", "student"]
    assert cells["e2e"] == ["base", "student"]  # there is no SAE before the run
    assert measured["e2e"].initial_gap is None and measured["e2e"].gap_closed is None
    assert measured["sae_finetune"].harm is None
    (sae,) = measured["e2e"].saes.values()
    assert set(sae) == {"after"}


def test_an_sae_without_error_scores_one_and_zero(measured: dict[str, Core]) -> None:
    result = measured["perfect"]
    assert result.initial_gap is not None and result.initial_gap.value == 0
    assert result.gap_closed is None
    for recovered in result.recovered.values():
        assert recovered.spliced is not None
        assert recovered.spliced.value == recovered.spliced.low == recovered.spliced.high == 1
    assert (
        result.distance["spliced"].forward_kl.value == result.distance["spliced"].reverse_kl.value == 0
    )
    assert result.distance["spliced"].top1_agreement.value == 1
    (sae,) = result.saes.values()
    assert sae["before"].fvu == 0 and sae["before"].cosine == pytest.approx(1)


def test_ablations_and_adapters_against_a_direct_computation(
    runs: dict[str, RunFolder], measured: dict[str, Core]
) -> None:
    subject = Subject(runs["everywhere"])
    (splice,) = subject.after
    block = subject.model.model.get_decoder().layers[splice.block]  # pyright: ignore

    def ce(model: Any) -> float:
        with torch.no_grad():
            logits = model(subject.tokens).logits[:, :-1].double()
        return float(cross_entropy(logits.flatten(0, 1), subject.tokens[:, 1:].flatten()))

    def ce_with(replace: Any) -> float:
        handle = block.register_forward_hook(lambda module, inputs, output: replace(output))
        try:
            return ce(subject.adapted.base)
        finally:
            handle.remove()

    outputs: list[torch.Tensor] = []
    ce_with(lambda output: outputs.append(output))
    result = measured["everywhere"]
    expected = {
        "zero": ce_with(torch.zeros_like),
        "mean": ce_with(lambda output: outputs[0].mean((0, 1)).expand_as(output)),
    }
    for name, value in expected.items():
        assert result.recovered[name].ablated_ce.value == pytest.approx(value, abs=DIRECT)
    assert result.ce["adapted"].value == pytest.approx(ce(subject.adapted.model), abs=DIRECT)
    base = result.ce["base"].value
    assert result.harm is not None and base is not None
    assert result.harm.value == pytest.approx(ce(subject.adapted.model) - base, abs=DIRECT)


def test_results_equal_those_of_sae_lens(runs: dict[str, RunFolder], measured: dict[str, Core]) -> None:
    """Definitions are the same if the SAE also replaces special tokens' activations."""
    subject, result = Subject(runs["everywhere"]), measured["everywhere"]
    (splice,) = subject.before
    name = subject.model.name_at(splice.hookpoint)
    sae: Any = splice.sae
    sae = getattr(sae, "sae", sae)
    sae.cfg.metadata.hook_name = name
    model = HookedProxyLM(subject.adapted.base, subject.adapted.tokenizer, hook_names=[name])
    store: Any = SimpleNamespace(get_batch_tokens=lambda prompts: subject.tokens)
    common: dict[str, Any] = {"n_batches": 1, "eval_batch_size_prompts": len(subject.tokens)}
    theirs = get_downstream_reconstruction_metrics(
        sae, model, store, ActivationScaler(), compute_kl=True, compute_ce_loss=True, **common
    )
    ours = {
        "ce_loss_without_sae": result.ce["base"],
        "ce_loss_with_sae": result.ce["spliced"],
        "ce_loss_with_ablation": result.recovered["zero"].ablated_ce,
        "ce_loss_score": result.recovered["zero"].spliced,
        "kl_div_with_sae": result.distance["spliced"].forward_kl,
    }
    for key, measure in ours.items():
        assert measure is not None
        assert measure.value == pytest.approx(theirs[key], abs=1e-4), key
    metrics, by_latent = get_sparsity_and_variance_metrics(
        sae,
        model,
        store,
        ActivationScaler(),
        compute_l2_norms=False,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        model_kwargs={},
        **common,
    )
    reconstruction = result.saes[splice.hookpoint]["before"]
    assert reconstruction.l0 == pytest.approx(metrics["l0"], abs=1e-4)
    assert 1 - reconstruction.fvu == pytest.approx(metrics["explained_variance"], abs=1e-4)
    assert reconstruction.cosine == pytest.approx(metrics["cossim"], abs=1e-4)
    density = np.array(by_latent["feature_density"])
    assert reconstruction.dead == pytest.approx((density == 0).mean())
    assert sum(reconstruction.density) == (density > 0).sum()


def test_changes_of_single_tokens_add_up_to_the_gap(measured: dict[str, Core]) -> None:
    for result in measured.values():
        for change in result.loss_change.values():
            assert sum(change.tokens) == result.tokens - result.sequences
        gap = result.ce_gap.value
        assert result.loss_change["student over base"].mean == pytest.approx(gap, abs=1e-9)
        for cell, by_position in result.ce_by_position.items():
            assert len(by_position) == result.tokens // result.sequences - 1
            assert np.mean(by_position) == pytest.approx(result.ce[cell].value)


def test_the_histogram_of_latents() -> None:
    values = torch.tensor([-9.0, -5.0, -4.9, 0.0])
    counts = core._histogram(values, core.DENSITY_EDGES)
    assert len(counts) == len(core.DENSITY_EDGES) + 1
    # An edge belongs to the bin below it.
    assert (counts[0], counts[1], counts[-2], counts[-1]) == (2, 1, 1, 0)


class TestBootstrap:
    def test_a_constant_measure_has_an_interval_of_no_width(self) -> None:
        result = interval(Bootstrap(5, 50).mean(torch.full((5,), 6.0), torch.full((5,), 3.0)))
        assert (result.value, result.low, result.high) == (2, pytest.approx(2), pytest.approx(2))

    def test_means_are_weighted_by_tokens(self) -> None:
        bootstrap = Bootstrap(2, 10)
        mean = bootstrap.mean(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 3.0]))
        assert mean[0] == 2.5

    def test_a_difference_is_paired(self) -> None:
        """A constant difference in every sequence is the same difference in every resample."""
        bootstrap, values, ones = Bootstrap(50, 100), torch.randn(50), torch.ones(50)
        differences = bootstrap.mean(values + 0.5, ones) - bootstrap.mean(values, ones)
        assert differences == pytest.approx(np.full(101, 0.5))

    def test_the_width_of_the_interval_is_that_of_a_normal_distribution(self) -> None:
        values = torch.randn(400, generator=torch.Generator().manual_seed(0))
        result = interval(Bootstrap(400, 4000).mean(values, torch.ones(400)))
        assert result.low is not None and result.high is not None
        expected = 2 * 1.96 * float(values.std()) / math.sqrt(400)
        assert result.high - result.low == pytest.approx(expected, rel=0.1)

    def test_resamples_are_reproducible(self) -> None:
        assert (Bootstrap(9, 9)._times == Bootstrap(9, 9)._times).all()

    def test_an_undefined_measure_has_no_bounds(self) -> None:
        zeros = Bootstrap(3, 5).mean(torch.zeros(3), torch.ones(3))
        with np.errstate(all="ignore"):
            result = interval(zeros / zeros)
        assert (result.value, result.low, result.high) == (None, None, None)


class TestCommand:
    def test_a_finished_suite_is_not_run_again(
        self, runs: dict[str, RunFolder], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = runs["lora"]
        arguments = ["evaluate", str(run.path), "--suite", "core", "--set"]
        assert main([*arguments, "resamples=10"]) == 0
        record = suite_records.read(run, Suite.core)
        assert record is not None and record.settings == {"resamples": 10}
        assert record.results["ce"]["base"]["value"] == pytest.approx(
            run.read_summary()["base_ce"], abs=CE
        )
        monkeypatch.setattr(run_suites, "Subject", lambda *_: pytest.fail("loaded"))
        assert main([*arguments, "evaluation.resamples=10"]) == 0
        with pytest.raises(pytest.fail.Exception):
            main([*arguments, "resamples=11"])
        with pytest.raises(pytest.fail.Exception):
            main([*arguments, "resamples=10", "--again"])

    def test_a_record_of_another_version_is_not_read(self, runs: dict[str, RunFolder]) -> None:
        run = runs["perfect"]
        assert run_suites.evaluate(run, [Suite.core], FEW) == []
        file = run.evaluation / "core.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 0}))
        assert suite_records.read(run, Suite.core) is None

    def test_a_suite_that_cannot_run_does_not_stop_the_others(
        self, runs: dict[str, RunFolder], monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        def lacking(*_: object) -> None:
            raise UserError("the data set org/name is missing")

        suites = run_suites._SUITES
        monkeypatch.setitem(suites, Suite.tasks, run_suites._Suite(lacking, ()))
        run = runs["e2e"]
        assert run_suites.evaluate(run, [Suite.tasks, Suite.core], FEW) == [Suite.tasks]
        assert "org/name is missing" in capsys.readouterr().err
        assert suite_records.read(run, Suite.core) is not None
        assert suite_records.read(run, Suite.tasks) is None

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("resample=5", "nearest valid: evaluation.resamples"),
            ("resamples=many", "a whole number"),
            ("resamples=0", "above 0"),
        ],
    )
    def test_an_invalid_setting_is_refused(
        self, setting: str, message: str, runs: dict[str, RunFolder], capsys
    ) -> None:
        assert main(["evaluate", str(runs["lora"].path), "--set", setting]) == 1
        assert message in capsys.readouterr().err

    def test_no_run_is_finished(self, runs: dict[str, RunFolder], tmp_path: Path, capsys) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text(runs["lora"].config.read_text())
        assert main(["evaluate", str(tmp_path)]) == 1
        assert "finished" in capsys.readouterr().err


def test_the_report_shows_the_results(
    runs: dict[str, RunFolder], measured: dict[str, Core], tmp_path: Path
) -> None:
    run = runs["lora"]
    assert run_suites.evaluate(run, [Suite.core, Suite.mechanism, Suite.lora], FEW) == []
    report = Report(Sweep([run]))
    harm = measured["lora"].harm
    assert harm is not None and report.frame["core/harm"][0] == pytest.approx(harm.value)
    assert {"loss_change", "by_position", "distances"} <= {view.name for view in report.views()}
    assert "effective rank" in page(report, report.views(), tmp_path)


@pytest.mark.case("A8")
def test_gap_closed_of_an_sae_without_error_is_a_dash_everywhere(
    runs: dict[str, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["perfect"]
    summary = run.read_summary()
    assert summary["gap_closed"] is None and summary["best_gap_closed"] is None
    assert {point.gap_closed for point in run.read_curve()} == {None}
    frame = Sweep([run]).frame()
    assert frame[["gap_closed", "closed_per_minute"]].isna().all(axis=None)
    assert set(Sweep([run]).curves()["gap_closed"]) == {None}
    show(run_table(summary))
    show(comparison_table([run]))
    printed = capsys.readouterr().out
    assert re.search(r"gap closed +│ +– │ the SAE opens no gap above rounding errors", printed)
    assert "– gap closed: the SAE opens no gap above rounding errors, or is new" in printed
    assert Report(Sweep([run])).missing[0].startswith("gap closed is undefined for 1 run: the SAE opens")
    with pytest.raises(UserError, match="their gap closed is undefined"):
        savings([run], [run])


def test_text_that_has_changed_since_the_run_is_refused(
    runs: dict[str, RunFolder], tmp_path: Path
) -> None:
    """Results on different text cannot be compared."""
    copied = RunFolder(shutil.copytree(runs["lora"].path, tmp_path / "run"))
    values = yaml.safe_load(copied.config.read_text())
    values["data"]["version"] = "0" * 16
    copied.config.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="text"):
        Subject(copied)
