"""Attribution graphs: what is written for circuit-tracer, its scores, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_lora.cli import main
from sae_lora.common.errors import UserError
from sae_lora.config.enums import Hook, Reads, Suite, TextSource
from sae_lora.config.execution import EvaluationConfig
from sae_lora.evaluation import suite_records
from sae_lora.evaluation.circuits import files
from sae_lora.evaluation.circuits.prompts import CODE, ENGLISH, prompts
from sae_lora.evaluation.circuits.suite import check
from sae_lora.saes.places import TRANSCODERS
from sae_lora.splice.hooks import Splice, decoded
from tests.support.coders import topk_sae, transcoder
from tests.support.families import D_MODEL, small_model
from tests.support.points import run_here
from tests.support.subjects import quick_points_in


def at_block(sae: Any, block: int = 0) -> Splice:
    return Splice(block, sae, Hook.mlp_out, reads=Reads.mlp_in)


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_the_weights_compute_what_the_transcoder_computes(architecture: str, tmp_path: Path) -> None:
    sae = transcoder(architecture)
    files.write_transcoder(at_block(sae), tmp_path / "file")
    x = torch.randn(5, D_MODEL)
    computed = files._output(load_file(tmp_path / "file"), x)
    torch.testing.assert_close(computed, decoded(sae, sae.encode(x), x))


def test_another_sae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no transcoder that computes what blocks"):
        files.write_transcoder(at_block(topk_sae()), tmp_path / "file")


@pytest.mark.parametrize(
    ("family", "reads", "expected"),
    [
        ("llama", Reads.mlp_in, (["model.layers[{layer}].mlp", "input"], "model.layers[{layer}].mlp")),
        (
            "gemma2",
            Reads.resid_mid,
            (
                ["model.layers[{layer}].pre_feedforward_layernorm", "input"],
                "model.layers[{layer}].post_feedforward_layernorm",
            ),
        ),
        (
            "gemma2",
            Reads.mlp_normalized,
            ("ln2.hook_normalized", "model.layers[{layer}].post_feedforward_layernorm"),
        ),
    ],
)
def test_the_places_of_transcoders(family: str, reads: Reads, expected: tuple[Any, str]) -> None:
    splices = (Splice(0, transcoder(), Hook.mlp_out, reads=reads),)
    places = files.places(small_model(family), splices)
    assert (places["input"], places["output"]) == (expected[0], [expected[1], "output"])


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 7.0, "rope_type": "default"}, {"rope_theta": 7.0}),
        (
            {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 3.0}},
            {"rope_theta": 7.0, "rope_local_base_freq": 3.0},
        ),
        (None, {}),
    ],
)
def test_positions_are_stated_as_before(rope: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    config = {"hidden_size": 8} | ({"rope_parameters": rope} if rope else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    files.date_back(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == config | expected


def test_the_prompts(tmp_path: Path) -> None:
    assert prompts(None, TextSource.stdlib) == list(CODE)
    assert prompts(None, TextSource.hub) == list(ENGLISH)
    assert min(len(CODE), len(ENGLISH)) >= 10
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\\n"}\n')
    assert prompts(str(path), TextSource.hub) == ["one", "two\n"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains no prompt"),
        ('{"text": ""}', "line 1 has no prompt"),
        ('{"text": "one"}\n{"txt": "two"}', "line 2 has no prompt"),
        ("one", "line 1 is not JSON"),
        (None, "cannot be read"),
    ],
)
def test_prompts_that_cannot_be_used(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        prompts(str(path), TextSource.hub)


USED = [{"block": block, "reads": "mlp_in", "width": 16} for block in range(2)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"used": USED[:1]}, "need a transcoder at every block"),
        ({"used": [USED[0], {"block": 1, "width": 16}]}, "need a transcoder at every block"),
        ({"used": [USED[0], USED[1] | {"reads": "resid_mid"}]}, "read the same activation"),
        ({"used": [USED[0], USED[1] | {"width": 32}]}, "transcoders of one width"),
        ({"class": "GPTNeoXForCausalLM"}, "and not GPTNeoXForCausalLM"),
        ({"kind": "linear_adapter"}, "without a map on their output"),
        ({}, "no such file"),
    ],
)
def test_runs_that_have_no_graphs(changed: dict[str, Any], message: str) -> None:
    run: Any = SimpleNamespace(
        read_config=lambda: {
            "sae": {"used": changed.get("used", USED)},
            "method": {"kind": changed.get("kind", "lora")},
        },
        read_summary=lambda: {"model": {"class": changed.get("class", "LlamaForCausalLM"), "blocks": 2}},
    )
    with pytest.raises(UserError, match=message):
        check(EvaluationConfig(circuits_python="/no/python"), run)


@pytest.mark.slow
def test_graphs_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """An untrained adapter changes no graph; a trained one does, in a model with merged weights."""
    (run,) = run_here(
        quick_points_in(tmp_path)(
            *("sae=transcoder", "layer=every_nth", "layer.every=1", "lora.blocks=all", "train.lr=1e-2"),
            *("train.train_tokens=512", "data.validation_tokens=256", "train.eval_each_sae=false"),
        )
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["evaluate", str(run.path), "--suite", "circuits"]) == 1
    assert "create it with: sae-lora setup circuits" in capsys.readouterr().err
    assert main(["setup", "circuits"]) == 0
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "import os\\nimport"}\n{"text": "def f(x):\\n    return"}\n')
    assert (
        main(["evaluate", str(run.path), "--suite", "circuits", "--set", f"circuits_prompts={path}"])
        == 0
    )
    record = suite_records.read(run, Suite.circuits)
    assert record is not None
    before, after = (record.results["graphs"][cell] for cell in ("spliced", "student"))
    for graph in (*before, *after):
        assert 0 < graph["replacement"] < graph["completeness"] < 1
        assert graph["kept_features"] <= graph["features"]
    assert [graph["tokens"] for graph in before] == [graph["tokens"] for graph in after]
    assert before != after
    change = record.results["change"]["replacement"]["value"]
    means = record.results["means"]
    difference = means["student"]["replacement"]["value"] - means["spliced"]["replacement"]["value"]
    assert change == pytest.approx(difference)
