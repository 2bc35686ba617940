"""Runs of every method with the embedded model: their results, and runs that begin with a result."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sae_lora.common.errors import EXIT_INTERRUPTED, ConfigError
from sae_lora.config.identity import train_steps
from sae_lora.config.schema import Config
from sae_lora.config.serialize import load
from sae_lora.data import corpus
from sae_lora.launcher.plan import plan
from sae_lora.models.dimensions import source
from sae_lora.models.loading import load_tokenizer
from sae_lora.records.damage import weights_of
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint
from sae_lora.run import execute
from sae_lora.train.cost.estimate import estimate
from sae_lora.train.train_state import TrainState
from tests.support.composing import composed
from tests.support.points import SMALL, Point, run_here
from tests.support.subjects import copy_few_texts
from tests.support.sweeps import summed_up
from tests.support.trainings import comparable

pytestmark = pytest.mark.slow  # many seconds in all

HOOKPOINT = "blocks.3.hook_resid_post"
RESULTS = {
    "lora": "adapter/adapter_model.safetensors",
    "mezo": "adapter/adapter_model.safetensors",
    "linear_adapter": f"output_adapter/{HOOKPOINT}/output_adapter.safetensors",
    "mlp_adapter": f"output_adapter/{HOOKPOINT}/output_adapter.safetensors",
    "sae_finetune": f"sae/{HOOKPOINT}/sae_weights.safetensors",
    "lora_sae": f"sae/{HOOKPOINT}/sae_weights.safetensors",
    "e2e": f"sae/{HOOKPOINT}/sae_weights.safetensors",
    "sae": f"sae/{HOOKPOINT}/sae_weights.safetensors",
}
"""A file of the result of each method."""
SETTINGS: dict[str, list[str]] = {
    "linear_adapter": ["train.lr=1e-3"],
    "mlp_adapter": ["train.lr=1e-3", "method.rank=8"],
    "sae_finetune": ["train.lr=5e-5"],
    "lora_sae": ["train.lr=5e-5", "method.lora_lr=1e-3"],
    "e2e": ["train.lr=1e-3", "method.checkpoints=[0.5,1]", "sae.width=256"],
    "sae": ["method.checkpoints=[0.5,1]", "sae.width=256", "method.buffer_tokens=1024"],
}
"""Settings for a run of a few steps."""
ADAPTING = ("lora", "mezo", "lora_sae")
MAKING_SAES = ("sae_finetune", "e2e", "sae")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text of the embedded model's training text, which is quick to read."""
    cache = tmp_path_factory.mktemp("cache")
    copy_few_texts(cache / "text")
    return cache


def points_of(home: Path, cache: Path) -> Point:
    paths = (
        *("data=text_files", f"data.files={cache}/text/*.py", "data.validation_share=0.5"),
        *("data.context_length=128", f"data.cache_dir={cache}", f"output_dir={home}"),
    )

    def compose(*overrides: str) -> Config:
        return composed(*SMALL, *paths, *overrides)

    return compose


@pytest.fixture
def point(tmp_path: Path, cache: Path) -> Point:
    return points_of(tmp_path, cache)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, RunFolder]:
    """A finished run of each method, by the name of the method."""
    point = points_of(tmp_path_factory.mktemp("finished"), cache)
    return {kind: run_here(point(f"method={kind}", *SETTINGS.get(kind, [])))[0] for kind in RESULTS}


def result_files(folder: RunFolder) -> dict[str, bytes]:
    """The files of the trained weights, by name."""
    results = (folder.adapter, folder.sae, folder.sae_at, folder.output_adapter)
    files = [file for result in results for file in sorted(result.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder.path)): file.read_bytes() for file in files}


def curve(folder: RunFolder) -> list[CurvePoint]:
    return [comparable(point) for point in folder.read_curve()]


@pytest.mark.parametrize("kind", RESULTS)
def test_every_method_writes_a_curve_a_summary_and_a_result(
    kind: str, finished: dict[str, RunFolder]
) -> None:
    folder = finished[kind]
    summary, points = folder.read_summary(), folder.read_curve()
    config = load(folder.config.read_text())
    assert [point.tokens for point in points] == [0, 512, 1024]
    assert len({point.student_ce for point in points}) == 3
    assert len({(point.spliced_ce, point.base_ce) for point in points}) == 1
    assert all(point.train_loss is not None and point.train_loss > 0 for point in points[1:])
    assert all(point.dead_latents is not None and 0 <= point.dead_latents < 1 for point in points)
    # FLOPs use the width that the planner has resolved.
    flops = estimate([config]).flops / train_steps(config)
    assert [point.train_flops for point in points] == [pytest.approx(step * flops) for step in range(3)]
    assert summary["method"] == {"kind": kind, "rank": config.method.rank, "init": None}
    assert summary["train_flops"] == points[-1].train_flops
    assert summary["dead_latents"] == points[-1].dead_latents
    assert summary["student_ce"] == points[-1].student_ce
    assert bool(summary["lora"]) is (kind in ADAPTING)
    is_new = kind in ("e2e", "sae")
    assert (summary["gap_closed"] is None) is is_new
    assert is_new or summary["initial_gap"] > 0
    assert RESULTS[kind] in result_files(folder)
    assert summary["weights"] == weights_of(folder) != {}
    folders = {name.split("/")[0] for name in result_files(folder)}
    expected = {RESULTS[kind].split("/")[0]} | ({"sae_at"} if is_new else set())
    assert folders == expected | ({"adapter"} if kind in ADAPTING else set())


def ce_from_scratch(config: Config, sae: SAE[Any]) -> float:
    """Cross-entropy on held-out text of the transformers model with the SAE in a forward hook."""
    model = AutoModelForCausalLM.from_pretrained(source(config.model), dtype=torch.float32)
    sequences = train_steps(config) * config.train.batch_size
    text = corpus.load(config.data, load_tokenizer(config.model), sequences, config.train.batch_size)
    tokens = text.validation_tokens
    kept = torch.isin(tokens, torch.tensor(text.special_ids))[..., None]
    assert kept.any()
    if not sae.cfg.metadata.exclude_special_tokens:
        kept = torch.zeros_like(kept)

    def replace_output(module: object, arguments: object, output: Any) -> Any:
        resid = output[0] if isinstance(output, tuple) else output
        recon = torch.where(kept, resid, sae.decode(sae.encode(resid)))
        return (recon, *output[1:]) if isinstance(output, tuple) else recon

    model.model.layers[3].register_forward_hook(replace_output)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.double()
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.parametrize("kind", MAKING_SAES)
def test_sae_lens_loads_the_trained_sae(kind: str, finished: dict[str, RunFolder]) -> None:
    folder = finished[kind]
    sae = SAE.load_from_disk(folder.sae / HOOKPOINT)
    assert sae.cfg.metadata.hook_name == HOOKPOINT
    ce = ce_from_scratch(load(folder.config.read_text()), sae)
    assert ce == pytest.approx(folder.read_summary()["student_ce"], abs=1e-6)


@pytest.fixture(scope="module")
def continued(
    finished: dict[str, RunFolder], tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> dict[str, RunFolder]:
    """LoRA runs that begin with the result of another method, by the name of that method."""
    home = tmp_path_factory.mktemp("continued")

    def point(*overrides: str) -> Config:
        return points_of(home, cache)("train.eval_every_tokens=1024", *overrides)

    path = f"{finished['sae'].sae}/blocks.{{block}}.hook_resid_post"
    points = {
        "disk": point("sae=disk", f"sae.path='{path}'", "layer.index=3"),
        **{kind: point(f"init={finished[kind].path}") for kind in RESULTS if kind != "mezo"},
    }
    return dict(zip(points, run_here(*points.values()), strict=True))


@pytest.mark.parametrize("kind", ["sae_finetune", "e2e", "sae", "linear_adapter", "mlp_adapter"])
def test_a_run_with_init_begins_with_the_result_of_the_other_run(
    kind: str, continued: dict[str, RunFolder], finished: dict[str, RunFolder]
) -> None:
    first, last = continued[kind].read_curve()[0], finished[kind].read_curve()[-1]
    assert first.student_ce == pytest.approx(last.student_ce, abs=1e-6)
    assert first.spliced_ce == first.student_ce
    assert first.kl == pytest.approx(last.kl, abs=1e-6)
    assert first.l0 == last.l0
    assert first.base_ce == last.base_ce
    assert continued[kind].read_summary()["method"]["init"] == str(finished[kind].path)


def test_the_sae_of_a_run_also_loads_from_disk(continued: dict[str, RunFolder]) -> None:
    assert curve(continued["disk"]) == curve(continued["sae"])


def test_lora_and_mezo_begin_with_trained_adapters(
    continued: dict[str, RunFolder], finished: dict[str, RunFolder], point: Point
) -> None:
    last = finished["lora"].read_curve()[-1]
    (mezo,) = run_here(point("method=mezo", f"init={finished['lora'].path}"))
    for folder in (continued["lora"], mezo):
        first = folder.read_curve()[0]
        assert first.student_ce == last.student_ce
        assert first.spliced_ce == last.spliced_ce
        assert first.gap_closed == last.gap_closed
    (both,) = run_here(point("method=lora_sae", f"init={finished['lora_sae'].path}"))
    first, last_of_both = both.read_curve()[0], finished["lora_sae"].read_curve()[-1]
    assert first.student_ce == pytest.approx(last_of_both.student_ce, abs=1e-6)
    trained = mezo.read_curve()[-1].student_ce
    assert trained != continued["lora"].read_curve()[-1].student_ce != last.student_ce


def test_adapters_begin_around_the_sae_they_were_trained_around(
    continued: dict[str, RunFolder], point: Point
) -> None:
    """Here an SAE with a trained map on its output, which no key of the config names."""
    (folder,) = run_here(point(f"init={continued['linear_adapter'].path}"))
    first, last = folder.read_curve()[0], continued["linear_adapter"].read_curve()[-1]
    assert first.spliced_ce == last.spliced_ce
    assert first.student_ce == last.student_ce


def test_an_sae_is_finetuned_for_adapters_that_stay(
    finished: dict[str, RunFolder], point: Point
) -> None:
    lora = finished["lora"]
    (folder,) = run_here(point("method=lora_sae", "method.lora_lr=0", f"init={lora.path}"))
    first, last = folder.read_curve()[0], lora.read_curve()[-1]
    assert first.student_ce == pytest.approx(last.student_ce, abs=1e-6)
    assert folder.read_curve()[-1].student_ce != first.student_ce
    before, after = (load_file(run.adapter / "adapter_model.safetensors") for run in (lora, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saes = (finished["sae_finetune"], folder)
    numbers = [run.read_summary()["trainable_parameters"] for run in saes]
    assert numbers[0] == numbers[1]


class TestRefusedInit:
    """Values of `init` that are refused before anything is loaded."""

    def refused(self, *points: Config) -> ConfigError:
        with pytest.raises(ConfigError) as error:
            plan(points)
        return error.value

    def test_a_folder_that_is_not_a_run(self, point: Point, finished: dict[str, RunFolder]) -> None:
        near = finished["sae"].path
        error = self.refused(point(f"init={near.with_name(near.name[:-1])}"))
        assert error.field == "init"
        assert error.nearest == near
        assert "it is not a run folder" in str(error)

    def test_a_run_that_is_not_finished(self, point: Point) -> None:
        (planned,) = plan([point()]).runs
        planned.freeze()
        error = self.refused(point(f"init={planned.folder.path}"))
        assert error.field == "init"
        assert "it is not finished" in str(error)

    def test_a_run_of_another_model(
        self, point: Point, finished: dict[str, RunFolder], tmp_path: Path
    ) -> None:
        gpt2 = RunFolder(tmp_path / "gpt2")
        gpt2.path.mkdir()
        text = finished["lora"].config.read_text()
        assert "name: tiny" in text
        gpt2.config.write_text(text.replace("name: tiny", "name: gpt2"))
        summed_up(gpt2)
        error = self.refused(point(f"init={gpt2.path}"))
        assert "a run of tiny" in str(error)
        assert "it is a run of gpt2" in str(error)

    def test_adapters_of_another_shape(self, point: Point, finished: dict[str, RunFolder]) -> None:
        init = f"init={finished['lora'].path}"
        error = self.refused(point(init, "lora.rank=3"))
        assert (error.field, error.nearest) == ("lora.rank", 2)
        assert f"nearest valid: {error.field}=2" in str(error)
        for override, nearest in (
            ("lora.alpha=1", 6.0),
            ("lora.blocks=[5]", "after"),
            ("lora.targets=qv", "all"),
            ("lora.rank_stabilised=false", True),
        ):
            error = self.refused(point(init, override))
            assert error.field == override.split("=")[0]
            assert error.nearest == nearest

    @pytest.mark.parametrize(
        ("kind", "source"),
        [
            *(("sae", source) for source in RESULTS),
            ("linear_adapter", "mlp_adapter"),
            ("mlp_adapter", "linear_adapter"),
            ("e2e", "lora"),
            ("e2e", "linear_adapter"),
            ("sae_finetune", "mezo"),
            ("sae_finetune", "lora_sae"),
            ("lora_sae", "mlp_adapter"),
            ("mlp_adapter", "lora"),
        ],
    )
    def test_results_that_a_method_cannot_begin_with(
        self, kind: str, source: str, point: Point, finished: dict[str, RunFolder]
    ) -> None:
        error = self.refused(point(f"method={kind}", f"init={finished[source].path}"))
        assert error.field == "init"
        assert f"method={kind} cannot start from a run of method={source}" in str(error)


STEPS = 8
STOPPED = {
    "e2e": [
        *("method=e2e", "sae.width=256", "method.dead_after_tokens=256", "method.checkpoints=[0.5,1]"),
    ],
    "e2e batchtopk": ["method=e2e", "sae.width=256", "sae.architecture=batchtopk"],
    "sae": [
        *("method=sae", "sae.width=256", "method.buffer_tokens=384", "method.dead_after_tokens=256"),
        *("layer.index=[2,4]", "method.checkpoints=[0.25]"),
    ],
    "mlp_adapter": ["method=mlp_adapter", "method.rank=8"],
    "lora_sae": ["method=lora_sae", "method.lora_lr=1e-2", "lora.dropout=0.1"],
    "sae_finetune of a rank": ["method=sae_finetune", "method.rank=4"],
}
"""Runs of eight steps; three steps use up a buffer."""
SLOW = ("e2e batchtopk", "sae_finetune of a rank")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in STOPPED],
)
def test_a_stopped_run_gives_the_same_result(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops after the step at which an SAE is saved, while the buffer is partly used."""
    sizes = ("train.batch_size=1", "train.eval_every_tokens=384")
    whole, stopped = (
        plan([points_of(tmp_path / home, cache)(*sizes, *STOPPED[name])]).runs[0]
        for home in ("whole", "stopped")
    )
    assert train_steps(whole.config) == STEPS
    for run in (whole, stopped):
        run.freeze()
    assert execute.attempt([whole.folder]) == 0
    take_step = TrainState.take_step

    def step_and_stop(training: TrainState, batch: torch.Size) -> None:
        take_step(training, batch)
        if training.step == STEPS // 2:
            os.kill(os.getpid(), signal.SIGUSR2)

    with monkeypatch.context() as patched:
        patched.setattr(TrainState, "take_step", step_and_stop)
        assert execute.attempt([stopped.folder]) == EXIT_INTERRUPTED
    assert not stopped.folder.is_finished
    assert [path.name for path in stopped.folder.checkpoints.iterdir()] == [f"step-{STEPS // 2:08d}"]
    assert execute.attempt([stopped.folder]) == 0
    assert [point.step for point in curve(stopped.folder)] == [0, 3, 6, 8]
    assert curve(stopped.folder) == curve(whole.folder)
    assert result_files(stopped.folder) == result_files(whole.folder)


def test_saes_in_a_pack_give_the_same_results_as_alone(tmp_path: Path, cache: Path) -> None:
    """Different widths, L0s, architectures, learning rates and blocks; one run has two SAEs."""
    common = ["method=sae", "method.buffer_tokens=1024"]
    variants = [
        ["sae.width=256", "layer.index=2"],
        ["sae.width=512", "sae.l0=8", "layer.index=[2,5]", "train.lr=1e-3", "train.seed=1"],
        ["sae.width=128", "layer.index=4", "sae.architecture=jumprelu", "train.schedule=constant"],
    ]
    pack = points_of(tmp_path / "pack", cache)
    together = run_here(*(pack(*common, *variant) for variant in variants))
    assert {folder.read_summary()["trained_together"] for folder in together} == {len(variants)}
    single = points_of(tmp_path / "alone", cache)
    for folder, variant in zip(together, variants, strict=True):
        (alone,) = run_here(single(*common, *variant))
        assert alone.path.name == folder.path.name
        assert curve(alone) == curve(folder)
        assert result_files(alone) == result_files(folder)
        assert len(result_files(alone)) == 2 * (2 if "layer.index=[2,5]" in variant else 1)


def files_in(result: str, folder: RunFolder) -> dict[str, bytes]:
    files = result_files(folder).items()
    return {name.removeprefix(result): content for name, content in files if name.startswith(result)}


@pytest.mark.parametrize("kind", ["e2e", "sae"])
def test_saes_are_saved_during_training(kind: str, finished: dict[str, RunFolder]) -> None:
    folder = finished[kind]
    assert sorted(path.name for path in folder.sae_at.iterdir()) == ["0.5", "1"]
    half, whole, end = (files_in(result, folder) for result in ("sae_at/0.5/", "sae_at/1/", "sae/"))
    assert whole == end
    assert half.keys() == end.keys()
    assert half != end
    sae = SAE.load_from_disk(folder.sae_at / "0.5" / HOOKPOINT)
    ce = ce_from_scratch(load(folder.config.read_text()), sae)
    assert ce == pytest.approx(folder.read_curve()[1].student_ce, abs=1e-6)


def test_evaluations_do_not_change_the_threshold(point: Point) -> None:
    """The SAE saved after the last step is equal to the SAE saved after the last evaluation."""
    batchtopk = ("sae.architecture=batchtopk", "sae.width=256", "method.checkpoints=[1]")
    (folder,) = run_here(point("method=e2e", *batchtopk))
    assert files_in("sae_at/1/", folder) == files_in("sae/", folder)
