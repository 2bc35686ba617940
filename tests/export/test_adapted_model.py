"""The loaded model of a finished run gives the values that the run has measured."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import sae_lora
from sae_lora.common.errors import UserError
from sae_lora.config.identity import train_steps
from sae_lora.data import corpus
from sae_lora.embedded import MODEL
from sae_lora.export.adapted_model import Adapted
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import Progress
from sae_lora.splice.hooks import Reading
from tests.support.coders import write_topk_sae
from tests.support.points import points_in, run_here
from tests.support.sweeps import write_summary

pytestmark = pytest.mark.slow  # many seconds in all

OVERRIDES = {
    "the default": [],
    "around two SAEs": [
        *("layer.index=[2,4]", "lora.blocks=all", "lora.dropout=0.1"),
        *("lora.rank_stabilised=true", "lora.targets=attn"),
    ],
    "around an MLP's output": ["sae=disk", "sae.path={home}/at_3", "layer.hook=mlp_out"],
    "at the hookpoints in the metadata": [
        *("sae=disk", "sae.path='{home}/at_{{block}}'", "layer=every_nth", "layer.every=2"),
        "lora.blocks=all",
    ],
}
PLACES = ("blocks.1.hook_attn_out", "blocks.3.hook_mlp_out", "blocks.5.hook_resid_post")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    home = tmp_path_factory.mktemp("outputs")
    for hookpoint in PLACES:
        write_topk_sae(home / f"at_{hookpoint.split('.')[1]}", hookpoint)
    point = points_in(home)
    folders = run_here(
        *(point(*(word.format(home=home) for word in words)) for words in OVERRIDES.values())
    )
    return dict(zip(OVERRIDES, folders, strict=True))


@pytest.fixture(scope="module")
def adapted(runs: dict[str, RunFolder]) -> Adapted:
    return sae_lora.load_adapted(runs["the default"])


@functools.cache
def held_out(adapted: Adapted) -> torch.Tensor:
    """The tokens that the run was evaluated on, `[sequence, pos]`."""
    data, size = adapted.config.data, adapted.config.train.batch_size
    steps = train_steps(adapted.config)
    return corpus.load(data, adapted.tokenizer, steps * size, size).validation_tokens


@pytest.mark.parametrize("name", OVERRIDES)
def test_logits_give_the_ce_of_the_run(name: str, runs: dict[str, RunFolder]) -> None:
    """With the forward pass of transformers and all logits at once, unlike in the run."""
    adapted = sae_lora.load_adapted(runs[name].path)
    tokens = held_out(adapted)

    def ce(*, sae: bool, adapters: bool) -> float:
        logits = adapted.logits(tokens, sae=sae, adapters=adapters)[:, :-1].double()
        return float(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    summary = runs[name].read_summary()
    assert ce(sae=False, adapters=False) == pytest.approx(summary["base_ce"], rel=1e-6)
    assert ce(sae=True, adapters=False) == pytest.approx(summary["spliced_ce"], rel=1e-6)
    assert ce(sae=True, adapters=True) == pytest.approx(summary["student_ce"], rel=1e-6)
    assert abs(ce(sae=False, adapters=True) - summary["base_ce"]) > 1e-4
    assert list(adapted.saes) == [sae["hookpoint"] for sae in summary["sae"]]


def test_saes_are_at_the_hookpoints_in_their_metadata(runs: dict[str, RunFolder]) -> None:
    summaries = {name: runs[name].read_summary() for name in OVERRIDES}
    hookpoints = {
        name: [sae["hookpoint"] for sae in summary["sae"]] for name, summary in summaries.items()
    }
    assert hookpoints["around an MLP's output"] == [PLACES[1]]
    assert hookpoints["at the hookpoints in the metadata"] == list(PLACES)
    assert hookpoints["the default"] == ["blocks.3.hook_resid_post"]
    assert summaries["around an MLP's output"]["name"] == "tiny-l3mlp_out-w256-l0_32-r2-after-s0"
    for name, summary in summaries.items():
        assert all(sae["l0"] > 0 and sae["fvu"] > 0 for sae in summary["sae"])
        assert summary["initial_gap"] > 0.01, name
        assert summary["student_ce"] != summary["spliced_ce"]


def test_a_call_returns_logits(runs: dict[str, RunFolder]) -> None:
    adapted = sae_lora.load_adapted(str(runs["the default"].path), device="cpu")
    logits = adapted(adapted.tokenizer("import os", return_tensors="pt").input_ids)
    assert logits.shape == (1, 3, 2048)
    assert not any(weight.requires_grad for weight in adapted.model.parameters())


def test_models_have_the_saes_only_inside_spliced(adapted: Adapted) -> None:
    tokens = held_out(adapted)[:2]
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    readings: list[Reading] = []
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError), adapted.spliced(readings.append):
            assert torch.equal(adapted.model(tokens).logits, adapted.peft(tokens).logits)
            inside = adapted.model(tokens).logits, adapted.base(input_ids=tokens).logits
            raise ZeroDivisionError
        assert torch.equal(inside[0], adapted(tokens))
        assert torch.equal(inside[1], adapted.logits(tokens, adapters=False))
        assert torch.equal(adapted.base(tokens).logits, plain(tokens).logits)
        with adapted.peft.disable_adapter():
            assert torch.equal(adapted.model(tokens).logits, plain(tokens).logits)
    # The SAE does not read positions with BOS or EOS.
    special = torch.isin(tokens, torch.tensor([0, 1]))
    assert special.any()
    assert [len(reading.resid) for reading in readings] == [int((~special).sum())] * len(readings)


def test_spliced_cannot_be_nested(adapted: Adapted) -> None:
    tokens = held_out(adapted)[:1]
    with adapted.spliced():
        for sae in (True, False):
            with pytest.raises(UserError, match="already in the model"):
                adapted.logits(tokens, sae=sae)
        with pytest.raises(UserError, match="input_ids are needed"):
            adapted.model(inputs_embeds=torch.zeros(1, 2, 128))
    assert adapted(tokens).isfinite().all()


def test_unusable_runs_are_refused(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    run = runs["the default"]
    with pytest.raises(UserError, match="is not a run"):
        sae_lora.load_adapted(run.path.parent)
    with pytest.raises(UserError, match="device = 'gpu'"):
        sae_lora.load_adapted(run, device="gpu")

    copy = RunFolder(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    summary = copy.read_summary()
    summary["sae"][0]["sha256"] = "0"
    write_summary(copy, summary)
    with pytest.raises(UserError, match=r"weights of the SAE at .* have changed since this run"):
        sae_lora.load_adapted(copy)
    copy.summary.unlink()
    copy.write_progress(Progress("training", step=3, steps=8))
    with pytest.raises(UserError, match="not finished: it is new, at step 0 of 8"):
        sae_lora.load_adapted(copy)


@pytest.mark.parametrize("damage", ["cut short", "incomplete", "gone"])
def test_damaged_adapters_are_refused(damage: str, runs: dict[str, RunFolder], tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "run")
    shutil.copytree(runs["the default"].path, copy.path)
    file = copy.adapter / "adapter_model.safetensors"
    match damage:
        case "cut short":
            file.write_bytes(file.read_bytes()[:-1])
        case "incomplete":
            weights = load_file(file)
            weights.pop(next(iter(weights)))
            save_file(weights, file)
        case _:
            shutil.rmtree(copy.adapter)
    with pytest.raises(UserError, match=r"is damaged(: | \()adapter/"):
        sae_lora.load_adapted(copy)


def test_import_of_the_package_loads_no_large_library() -> None:
    code = (
        "import sys, sae_lora\n"
        "assert 'load_adapted' in dir(sae_lora)\n"
        "assert not hasattr(sae_lora, 'load_nothing')\n"
        "sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
