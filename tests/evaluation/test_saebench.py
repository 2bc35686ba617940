"""SAEBench in its own environment: its scores of a run's models and SAEs equal ours."""

import random
import shutil
import string
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from sae_lora.cli import main
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import Suite
from sae_lora.config.execution import EvaluationConfig
from sae_lora.config.schema import Config
from sae_lora.embedded import MODEL, SAES
from sae_lora.evaluation import environments, headlines, run_suites, suite_records
from sae_lora.evaluation.environments import SAEBENCH as layer
from sae_lora.evaluation.saebench import suite as saebench
from sae_lora.evaluation.subject import Cell, Replacement, Subject
from sae_lora.records.folder import RunFolder
from sae_lora.splice.kl import kl_divergence
from tests.support.hub import serving
from tests.support.points import Point, points_in, run_here
from tests.support.served import serving_python

pytestmark = pytest.mark.slow  # creates an environment, and processes with slow imports

BIOS = "LabHC/bias_in_bios"
SET = f"{BIOS}_class_set1"
PROBES = {"dataset_names": [SET], "context_length": 32}
PROFESSIONS = {0: "accountant", 1: "architect", 2: "attorney", 6: "dentist", 9: "filmmaker"} | {
    13: "nurse",
    21: "professor",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sparse_probing": PROBES | {"probe_train_set_size": 40, "probe_test_set_size": 20, "k_values": [1]},
    "scr": PROBES
    | {"train_set_size": 40, "test_set_size": 20, "n_values": [2, 20], "probe_epochs": 2}
    | {"column1_vals_lookup": {SET: [["professor", "nurse"]]}},
    "tpp": PROBES | {"train_set_size": 40, "test_set_size": 20, "n_values": [2, 20], "probe_epochs": 2},
    "absorption": {"min_GT_probe_f1": 0.0, "min_feats_for_eval": 1, "max_k_value": 1}
    | {"prompt_token_pos": -5}
    | {"k_sparse_probe_num_epochs": 1, "precalc_k_sparse_probe_sae_acts": True},
}
"""Settings that are small enough to take seconds."""
ALL = EvaluationConfig(saebench=["core", *OPTIONS], saebench_options=OPTIONS)


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SAEBench's environment, created by the command, and a hub with the benchmarks' data.

    The command has started the module there once; processes after this are forked.
    """
    home = tmp_path_factory.mktemp("home")
    _write_bios(home / "hub/datasets" / BIOS)
    with pytest.MonkeyPatch.context() as patch, serving(home / "hub") as hub:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        with pytest.raises(UserError, match="sae-lora setup saebench"):
            saebench.check(ALL)
        assert main(["setup", "saebench"]) == 0
        patch.setenv("HF_ENDPOINT", hub.address)
        patch.setenv("HF_HOME", str(home / "hf"))
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        child = "sae_lora.evaluation.saebench"
        imported = f"{child}.benchmarks", f"{child}.model"
        with serving_python(str(layer.python(None)), layer.environment(), *imported) as forked:
            patch.setattr(saebench, "subprocess", forked)
            yield


def _write_bios(repository: Path) -> None:
    draw = random.Random(0)
    rows = [
        {"hard_text": _bio(draw, name, pronoun), "profession": profession, "gender": gender}
        for profession, name in PROFESSIONS.items()
        for gender, pronoun in enumerate(("he", "she"))
        for _ in range(45)
    ]
    draw.shuffle(rows)
    repository.mkdir(parents=True)
    for split, part in {
        "train": rows[: len(rows) * 3 // 4],
        "test": rows[len(rows) * 3 // 4 :],
    }.items():
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, repository / f"{split}-00000-of-00001.parquet")


def _bio(draw: random.Random, profession: str, pronoun: str) -> str:
    towns = draw.sample(["york", "leeds", "bath", "derby", "ely"], 2)
    return f"{pronoun} is a {profession} in {towns[0]} . before , {pronoun} was in {towns[1]} ."


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Point:
    """Points with the embedded model's weights and a tokenizer for which each word is one token.

    Benchmarks about the first letter of a word need this.
    """
    home = tmp_path_factory.mktemp("outputs")
    shutil.copytree(MODEL, home / "model")
    draw = random.Random(0)
    letters = string.ascii_lowercase
    words = sorted({first + "".join(draw.sample(letters, 4)) for first in letters for _ in range(6)})
    phrases = " ".join(
        _bio(draw, name, pronoun) for name in PROFESSIONS.values() for pronoun in ("he", "she")
    )
    known = [*phrases.split(), *"has the first letter: york leeds bath derby ely".split()]
    vocabulary = dict.fromkeys(["<|bos|>", "<|eos|>", "?", *letters.upper(), *known, *words])
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "unk_token": "?"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(home / "model")
    (home / "text").mkdir()
    for number in range(40):
        text = " ".join(draw.choice(words) for _ in range(600))
        (home / "text" / f"{number}.txt").write_text(text)
    sae = next((SAES).glob("*3*l0_8*"))

    def compose(*overrides: str) -> Config:
        return points_in(home)(
            *(f"model.name={home}/model", "sae=disk", f"sae.path={sae}", "layer.index=3"),
            *("data=text_files", f"data.files={home}/text/*.txt", "data.validation_share=0.3"),
            *("data.context_length=64", "data.validation_tokens=512", *overrides),
        )

    return compose


@pytest.fixture(scope="module")
def run(small: Point) -> RunFolder:
    """A run with adapters also before the SAE, so that the SAE's input changes."""
    (folder,) = run_here(small("lora.blocks=all", "train.lr=0.02", "sae.keep_special_tokens=false"))
    return folder


@pytest.fixture(scope="module")
def measured(run: RunFolder) -> dict[str, Any]:
    """Scores of all benchmarks, by benchmark and cell."""
    assert run_suites.evaluate(run, [Suite.saebench], ALL) == []
    record = suite_records.read(run, Suite.saebench)
    assert record is not None and record.results["version"] == layer.version
    (scores,) = record.results["scores"].values()
    return scores


def test_every_benchmark_has_scores_of_both_models(measured: dict[str, Any], run: RunFolder) -> None:
    assert set(measured) == {"core", *OPTIONS}
    assert all(set(cells) == {"spliced", "student"} for cells in measured.values())
    for name in ("core", "sparse_probing", "absorption"):  # the student has adapters before the SAE
        assert measured[name]["spliced"] != measured[name]["student"]
    for cell in ("spliced", "student"):
        assert (
            measured["sparse_probing"][cell]["llm_test_accuracy"] > 0.5
        )  # the texts name the profession
        assert 0 <= measured["sparse_probing"][cell]["sae_top_1_test_accuracy"] <= 1
        assert "tpp_threshold_20_total_metric" in measured["tpp"][cell]
        assert "scr_dir1_threshold_20" in measured["scr"][cell]
        assert 0 <= measured["absorption"][cell]["mean_absorption_fraction_score"] <= 1
    shown = headlines.headlines(run)
    assert shown["saebench/core, student"] == measured["core"]["student"]["ce_loss_score"]
    # SCR's headline score is of the harder of two directions, and is missing if both are equally hard.
    expected = {f"saebench/{name}" for name in {*measured} - {"scr"}}
    assert {name.split(",")[0] for name in shown} >= expected


@pytest.mark.parametrize("cell", [Cell.spliced, Cell.student])
@torch.no_grad()
def test_core_equals_a_direct_computation(cell: Cell, measured: dict[str, Any], run: RunFolder) -> None:
    """On the same tokens, without BOS and EOS, as in SAEBench."""
    subject = Subject(run)
    tokens = subject.tokens
    plain = {Cell.spliced: Cell.base, Cell.student: Cell.adapted}[cell]
    zeros = Replacement(torch.zeros_like)
    ablated = tuple(splice._replace(sae=zeros) for splice in subject.splices_of(cell))
    readings: list[Any] = []
    counted = ~torch.isin(tokens, torch.tensor(subject.special_ids))
    logits = {
        "without_sae": subject.head.logits(subject.hidden(plain, tokens)),
        "with_sae": subject.head.logits(subject.hidden(cell, tokens, observe=readings.append)),
        "with_ablation": subject.head.logits(subject.hidden(cell, tokens, instead=ablated)),
    }
    scores = measured["core"][cell]
    for name, values in logits.items():
        losses = torch.nn.functional.cross_entropy(
            values[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        expected = float(losses[counted[:, :-1].flatten()].mean())
        assert scores[f"ce_loss_{name}"] == pytest.approx(expected, abs=1e-4), name
        if name != "without_sae":
            divergence = kl_divergence(logits["without_sae"], values)
            assert scores[f"kl_div_{name}"] == pytest.approx(float(divergence[counted].mean()), abs=1e-4)
    (reading,) = readings
    resid, latents, recon = (values[counted.flatten()] for values in reading[1:4])
    assert scores["l0"] == pytest.approx(float((latents != 0).sum(-1).float().mean()), abs=1e-4)
    cosine = torch.nn.functional.cosine_similarity(resid, recon, dim=-1).mean()
    assert scores["cossim"] == pytest.approx(float(cosine), abs=1e-4)
    norm = resid.norm(dim=-1).mean()
    assert scores["l2_norm_in"] == pytest.approx(float(norm), rel=1e-4)
    assert scores["frac_alive"] == pytest.approx(float((latents != 0).any(0).float().mean()), abs=1e-4)


def test_a_recorded_suite_is_not_run_again(
    measured: dict[str, Any], run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process is started"))
    assert run_suites.evaluate(run, [Suite.saebench], ALL) == []


def test_a_missing_data_set_is_reported_and_other_results_are_written(
    small: Point, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SAE and its input are the same before and after the run, so each benchmark runs once."""
    (folder,) = run_here(small())
    lacking = {"dataset_names": ["fancyzhx/ag_news"]}
    config = EvaluationConfig(
        saebench=["tpp", "sparse_probing"],
        saebench_options={"tpp": OPTIONS["tpp"], "sparse_probing": lacking},
    )
    assert run_suites.evaluate(folder, [Suite.saebench], config) == [Suite.saebench]
    output = capsys.readouterr()
    assert "fancyzhx/ag_news cannot be loaded" in " ".join(output.err.split())
    assert "tpp, spliced" in output.out and "tpp, student" not in output.out
    record = suite_records.read(folder, Suite.saebench)
    assert record is not None and list(record.results["missing"]) == ["sparse_probing"]
    (scores,) = record.results["scores"].values()
    assert scores["tpp"]["student"] == scores["tpp"]["spliced"]
    # The missing benchmark is tried again; the other result is reused.
    monkeypatch.setattr(saebench, "_run", lambda python, request, folder: None)
    assert run_suites.evaluate(folder, [Suite.saebench], config) == [Suite.saebench]
    again = suite_records.read(folder, Suite.saebench)
    assert again is not None and again.results == record.results


def test_invalid_requests_are_refused_at_once() -> None:
    options = {"tpp": {"n_value": [2]}, "scr": {"dataset_names": ["org/none"]}, "core": {"context": 3}}
    with pytest.raises(UserError) as error:
        saebench.check(EvaluationConfig(saebench=list(options), saebench_options=options))
    for message in (
        "ScrAndTppEvalConfig has no setting n_value",
        "data set org/none cannot be loaded",
        "core has no setting context",
    ):
        assert message in str(error.value)


def test_an_empty_list_of_benchmarks_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one benchmark"):
        saebench.check(EvaluationConfig(saebench=[]))


def test_an_environment_of_other_versions_must_be_created_again(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = environments._versions(tuple(layer.shared))
    monkeypatch.setattr(environments, "_versions", lambda packages: versions | {"torch": "9"})
    with pytest.raises(UserError, match="create it again with: sae-lora setup saebench"):
        layer.python(None)
    with pytest.raises(UserError, match="no such file"):
        layer.python("/no/python")
