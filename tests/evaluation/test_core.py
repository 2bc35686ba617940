"""The suite `core`: identities, a direct computation, and sae-lens's evaluation of the same tokens."""

import json
import math
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
from sae_lora.common.errors import UserError
from sae_lora.config.enums import Suite
from sae_lora.config.evaluation import EvaluationConfig
from sae_lora.evaluation import core, run_suites, suite_records
from sae_lora.evaluation.bootstrap import Bootstrap, interval
from sae_lora.evaluation.core import Core
from sae_lora.evaluation.subject import Subject
from sae_lora.records.folder import RunFolder
from sae_lora.report.page import Report, page
from sae_lora.report.sweep import Sweep
from tests.support.points import points_in, run_here

pytestmark = pytest.mark.slow  # many seconds in all

FEW = EvaluationConfig(resamples=20)
CE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """LoRA, and others; in one of them special tokens have no exception."""
    point = points_in(tmp_path_factory.mktemp("outputs"))
    asked = {
        "lora": ("train.lr=1e-2",),
        "perfect": ("sae=identity", "layer.index=3"),
        "several": ("layer.index=[2,4]",),
        "everywhere": ("sae.keep_special_tokens=false",),
        "sae_finetune": ("method=sae_finetune",),
        "linear_adapter": ("method=linear_adapter",),
        "e2e": ("method=e2e", "sae.width=64", "sae.l0=4"),
    }
    return {name: run_here(point(*overrides))[0] for name, overrides in asked.items()}


@pytest.fixture(scope="module")
def measured(runs: dict[str, RunFolder]) -> dict[str, Core]:
    return {name: core.evaluate(Subject(run), FEW) for name, run in runs.items()}


def test_it_finds_what_the_run_has_found(runs: dict[str, RunFolder], measured: dict[str, Core]) -> None:
    for name, run in runs.items():
        summary, found = run.read_summary(), measured[name]
        assert found.ce["base"].value == pytest.approx(summary["base_ce"], abs=CE), name
        assert found.ce["student"].value == pytest.approx(summary["student_ce"], abs=CE), name
        assert found.distance["student"].forward_kl.value == pytest.approx(summary["kl"], abs=CE)
        assert found.distance["student"].top1_agreement.value == pytest.approx(
            summary["top1_agreement"], abs=1e-3
        )
        fvus = [read["after"].fvu for read in found.saes.values()]
        assert np.mean(fvus) == pytest.approx(summary["fvu"], abs=CE)
        if name != "e2e":
            assert found.ce["spliced"].value == pytest.approx(summary["spliced_ce"], abs=CE), name
        if summary["gap_closed"] is not None:
            assert found.gap_closed is not None
            assert found.gap_closed.value == pytest.approx(summary["gap_closed"], abs=1e-3)


def test_which_cells_there_are(runs: dict[str, RunFolder], measured: dict[str, Core]) -> None:
    cells = {name: list(found.ce) for name, found in measured.items()}
    assert cells["lora"] == ["base", "spliced", "student", "adapted"]
    assert cells["sae_finetune"] == cells["linear_adapter"] == ["base", "spliced", "student"]
    assert cells["e2e"] == ["base", "student"]  # before, there was no SAE
    assert measured["e2e"].initial_gap is None and measured["e2e"].gap_closed is None
    assert measured["sae_finetune"].harm is None
    (read,) = measured["e2e"].saes.values()
    assert set(read) == {"after"}


def test_an_sae_that_loses_nothing_scores_one_and_zero(measured: dict[str, Core]) -> None:
    found = measured["perfect"]
    assert found.initial_gap is not None and found.initial_gap.value == 0
    assert found.gap_closed is None
    for recovered in found.recovered.values():
        assert recovered.spliced is not None
        assert recovered.spliced.value == recovered.spliced.low == recovered.spliced.high == 1
    assert found.distance["spliced"].forward_kl.value == found.distance["spliced"].reverse_kl.value == 0
    assert found.distance["spliced"].top1_agreement.value == 1
    (read,) = found.saes.values()
    assert read["before"].fvu == 0 and read["before"].cosine == pytest.approx(1)


def test_ablations_and_adapters_alone_against_a_direct_computation(
    runs: dict[str, RunFolder], measured: dict[str, Core]
) -> None:
    subject = Subject(runs["everywhere"])
    (splice,) = subject.after
    block = subject.model.model.get_decoder().layers[splice.block]  # pyright: ignore

    def ce(model: Any) -> float:
        with torch.no_grad():
            logits = model(subject.tokens).logits[:, :-1].double()
        return float(cross_entropy(logits.flatten(0, 1), subject.tokens[:, 1:].flatten()))

    def ce_with(replaced: Any) -> float:
        handle = block.register_forward_hook(lambda module, given, output: replaced(output))
        try:
            return ce(subject.adapted.base)
        finally:
            handle.remove()

    seen: list[torch.Tensor] = []
    ce_with(lambda output: seen.append(output))
    found = measured["everywhere"]
    expected = {
        "zero": ce_with(torch.zeros_like),
        "mean": ce_with(lambda output: seen[0].mean((0, 1)).expand_as(output)),
    }
    for name, value in expected.items():
        assert found.recovered[name].ablated_ce.value == pytest.approx(value, abs=CE)
    assert found.ce["adapted"].value == pytest.approx(ce(subject.adapted.model), abs=CE)
    base = found.ce["base"].value
    assert found.harm is not None and base is not None
    assert found.harm.value == pytest.approx(ce(subject.adapted.model) - base, abs=CE)


def test_as_sae_lens_measures_it(runs: dict[str, RunFolder], measured: dict[str, Core]) -> None:
    """Where special tokens have no exception, it defines the same."""
    subject, found = Subject(runs["everywhere"]), measured["everywhere"]
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
        "ce_loss_without_sae": found.ce["base"],
        "ce_loss_with_sae": found.ce["spliced"],
        "ce_loss_with_ablation": found.recovered["zero"].ablated_ce,
        "ce_loss_score": found.recovered["zero"].spliced,
        "kl_div_with_sae": found.distance["spliced"].forward_kl,
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
    read = found.saes[splice.hookpoint]["before"]
    assert read.l0 == pytest.approx(metrics["l0"], abs=1e-4)
    assert 1 - read.fvu == pytest.approx(metrics["explained_variance"], abs=1e-4)
    assert read.cosine == pytest.approx(metrics["cossim"], abs=1e-4)
    density = np.array(by_latent["feature_density"])
    assert read.dead == pytest.approx((density == 0).mean())
    assert sum(read.density) == (density > 0).sum()


def test_what_single_tokens_say_adds_up(measured: dict[str, Core]) -> None:
    for found in measured.values():
        for change in found.loss_change.values():
            assert sum(change.tokens) == found.tokens - found.sequences
        gap = found.ce_gap.value
        assert found.loss_change["student over base"].mean == pytest.approx(gap, abs=1e-9)
        for cell, by_position in found.ce_by_position.items():
            assert len(by_position) == found.tokens // found.sequences - 1
            assert np.mean(by_position) == pytest.approx(found.ce[cell].value)


def test_latents_by_how_often_they_are_active() -> None:
    values = torch.tensor([-9.0, -5.0, -4.9, 0.0])
    counts = core._histogram(values, core.DENSITY_EDGES)
    assert len(counts) == len(core.DENSITY_EDGES) + 1
    # An edge belongs to what is below it.
    assert (counts[0], counts[1], counts[-2], counts[-1]) == (2, 1, 1, 0)


class TestBootstrap:
    def test_what_does_not_vary_has_no_width(self) -> None:
        found = interval(Bootstrap(5, 50).mean(torch.full((5,), 6.0), torch.full((5,), 3.0)))
        assert (found.value, found.low, found.high) == (2, pytest.approx(2), pytest.approx(2))

    def test_means_are_weighted_by_tokens(self) -> None:
        bootstrap = Bootstrap(2, 10)
        mean = bootstrap.mean(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 3.0]))
        assert mean[0] == 2.5

    def test_a_difference_is_paired(self) -> None:
        """Two measures that differ by the same in every sequence differ by that in every resample."""
        bootstrap, values, ones = Bootstrap(50, 100), torch.randn(50), torch.ones(50)
        apart = bootstrap.mean(values + 0.5, ones) - bootstrap.mean(values, ones)
        assert apart == pytest.approx(np.full(101, 0.5))

    def test_its_width_is_that_of_the_normal_distribution(self) -> None:
        values = torch.randn(400, generator=torch.Generator().manual_seed(0))
        found = interval(Bootstrap(400, 4000).mean(values, torch.ones(400)))
        assert found.low is not None and found.high is not None
        expected = 2 * 1.96 * float(values.std()) / math.sqrt(400)
        assert found.high - found.low == pytest.approx(expected, rel=0.1)

    def test_the_same_twice(self) -> None:
        assert (Bootstrap(9, 9)._times == Bootstrap(9, 9)._times).all()

    def test_what_is_undefined_has_no_bounds(self) -> None:
        nothing = Bootstrap(3, 5).mean(torch.zeros(3), torch.ones(3))
        with np.errstate(all="ignore"):
            found = interval(nothing / nothing)
        assert (found.value, found.low, found.high) == (None, None, None)


class TestCommand:
    def test_what_was_measured_is_not_measured_again(
        self, runs: dict[str, RunFolder], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = runs["lora"]
        arguments = ["evaluate", str(run.path), "--suite", "core", "--set"]
        assert main([*arguments, "resamples=10"]) == 0
        there = suite_records.read(run, Suite.core)
        assert there is not None and there.settings == {"resamples": 10}
        assert there.results["ce"]["base"]["value"] == pytest.approx(
            run.read_summary()["base_ce"], abs=CE
        )
        monkeypatch.setattr(run_suites, "Subject", lambda *_: pytest.fail("loaded"))
        assert main([*arguments, "evaluation.resamples=10"]) == 0
        with pytest.raises(pytest.fail.Exception):
            main([*arguments, "resamples=11"])
        with pytest.raises(pytest.fail.Exception):
            main([*arguments, "resamples=10", "--again"])

    def test_of_another_version_it_is_measured_again(self, runs: dict[str, RunFolder]) -> None:
        run = runs["perfect"]
        assert run_suites.evaluate(run, [Suite.core], FEW) == []
        file = run.evaluation / "core.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 0}))
        assert suite_records.read(run, Suite.core) is None

    def test_what_one_suite_lacks_does_not_keep_the_others(
        self, runs: dict[str, RunFolder], monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        def lacking(*_: object) -> None:
            raise UserError("the data set org/name is not there")

        known = run_suites._SUITES
        monkeypatch.setitem(known, Suite.tasks, run_suites._Suite(lacking, ()))
        run = runs["e2e"]
        wanted = [Suite.tasks, Suite.core]
        assert run_suites.evaluate(run, wanted, FEW) == [Suite.tasks]
        assert "org/name is not there" in capsys.readouterr().err
        assert suite_records.read(run, Suite.core) is not None
        assert suite_records.read(run, Suite.tasks) is None

    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ("resample=5", "nearest valid: evaluation.resamples"),
            ("resamples=many", "a whole number"),
            ("resamples=0", "above 0"),
        ],
    )
    def test_a_setting_that_is_not_there(
        self, setting: str, said: str, runs: dict[str, RunFolder], capsys
    ) -> None:
        assert main(["evaluate", str(runs["lora"].path), "--set", setting]) == 1
        assert said in capsys.readouterr().err

    def test_no_run_is_finished(self, runs: dict[str, RunFolder], tmp_path: Path, capsys) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text(runs["lora"].config.read_text())
        assert main(["evaluate", str(tmp_path)]) == 1
        assert "finished" in capsys.readouterr().err


def test_the_report_shows_it(
    runs: dict[str, RunFolder], measured: dict[str, Core], tmp_path: Path
) -> None:
    run = runs["lora"]
    assert run_suites.evaluate(run, [Suite.core, Suite.mechanism, Suite.lora], FEW) == []
    report = Report(Sweep([run]))
    harm = measured["lora"].harm
    assert harm is not None and report.frame["core/harm"][0] == pytest.approx(harm.value)
    assert {"loss_change", "by_position", "distances"} <= {view.name for view in report.views()}
    assert "effective rank" in page(report, report.views(), tmp_path)


def test_text_that_is_another_now_is_refused(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    """Its numbers would stand beside those of another text."""
    copied = RunFolder(shutil.copytree(runs["lora"].path, tmp_path / "run"))
    values = yaml.safe_load(copied.config.read_text())
    values["data"]["version"] = "0" * 16
    copied.config.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="text"):
        Subject(copied)
