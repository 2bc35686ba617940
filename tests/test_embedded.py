"""The embedded model and SAEs follow the recipe, have learnt their text, and LoRA closes their gap."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sae_lora.config.enums import SAEFamily, TextSource
from sae_lora.config.schema import Config, DataConfig, LoRAConfig, ModelConfig, SAEChoice, SAEConfig
from sae_lora.data import corpus
from sae_lora.data.documents import stdlib_documents
from sae_lora.embedded import MODEL, SAES
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import load_model, load_tokenizer
from sae_lora.saes import loading
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Splice
from sae_lora.splice.kl import Comparison
from sae_lora.splice.student import LoRAStudent
from sae_lora.train.evaluator import Evaluation, Evaluator
from scripts.embedded import language_model, recipe
from scripts.embedded.saes import TopKRequest
from tests.support.commands import launch

TINY = ModelConfig(name="tiny")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    cache = tmp_path_factory.mktemp("cache")
    config = DataConfig(source=TextSource.stdlib, cache_dir=str(cache), validation_tokens=4096)
    return corpus.load(config, load_tokenizer(TINY), train_sequences=64)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model(TINY, Config().train.dtype, CPU)


def evaluations(model: LanguageModel, text: corpus.Corpus, names: Sequence[str]) -> list[Evaluation]:
    """Evaluate the plain model with each of these SAEs."""
    config = SAEConfig(family=SAEFamily.tiny)
    students = []
    for name in names:
        block = recipe.requests()[name].block
        loaded = loading.load(config, SAEChoice(block=block, id=name), read_dimensions(TINY), CPU)
        special = loading.special_of(config, loaded, text.special_ids)
        assert special.ids == text.special_ids
        splices = (Splice(block, loaded.sae, special=special),)
        students.append(LoRAStudent(model, splices, LoRAConfig(rank=1, blocks=[7])))
    comparison = Comparison(Head.of(model), 1024)
    return Evaluator(model, text.validation_tokens, 32, comparison)(students)


def test_the_package_contains_all_saes_of_the_recipe() -> None:
    transcoders = {f"transcoder_{block}-width_1024-l0_16" for block in range(8)}
    assert {path.name for path in SAES.iterdir()} == {*recipe.requests(), *transcoders}
    assert (MODEL / "model.safetensors").exists()
    size = sum(path.stat().st_size for path in MODEL.parent.rglob("*") if path.is_file())
    assert size < 24 * 2**20


def test_the_model_has_learnt_its_text(model: LanguageModel, text: corpus.Corpus) -> None:
    """Held-out cross-entropy is far below that of the best constant prediction."""
    tokens = text.validation_tokens
    counts = torch.bincount(tokens.flatten(), minlength=2048).float()
    frequencies = counts / counts.sum()
    unigram = -(frequencies[counts > 0] * frequencies[counts > 0].log()).sum()
    ce = language_model.validation_ce(model.model, text.validation)  # pyright: ignore[reportArgumentType]
    assert ce < 0.6 * float(unigram)


@pytest.mark.slow
@pytest.mark.parametrize("block", recipe.BLOCKS)
def test_a_denser_sae_reconstructs_better(model: LanguageModel, text: corpus.Corpus, block: int) -> None:
    results = evaluations(model, text, [f"block_{block}-width_1024-l0_{l0}" for l0 in recipe.SPARSITIES])
    fvus = [next(iter(result.per_sae.values()))["fvu"] for result in results]
    gaps = [result.spliced_ce - result.base_ce for result in results]
    assert 0.02 < fvus[-1] < fvus[0] < 0.7
    assert fvus == sorted(fvus, reverse=True)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] > 0
    for result, l0 in zip(results, recipe.SPARSITIES, strict=True):
        assert next(iter(result.per_sae.values()))["l0"] == pytest.approx(l0, rel=0.02)


@pytest.mark.slow
def test_the_recipe_is_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same files, byte by byte; another seed gives different files."""
    requests = {
        "block_3-width_64-l0_4": TopKRequest(3, 64, 4),
        "block_1-width_64-l0_8": TopKRequest(1, 64, 8),
    }
    monkeypatch.setattr(recipe, "requests", lambda: requests)

    monkeypatch.setattr(recipe, "stdlib_documents", lambda **which: stdlib_documents(**which)[::40])
    budget = language_model.Budget(tokens=8192)
    sae_budget = recipe.SAEBudget(tokens=4096, batch_tokens=512, buffer_tokens=2048)

    def files_from(name: str, seed: int) -> dict[str, bytes]:
        recipe.make(tmp_path / name, budget, sae_budget, seed)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    first, again = files_from("first", 0), files_from("again", 0)
    different = files_from("different", 1)
    assert set(first) == set(again) == set(different)
    assert "saes/block_3-width_64-l0_4/sae_weights.safetensors" in first
    assert [name for name in first if first[name] != again[name]] == []
    assert first["model/model.safetensors"] != different["model/model.safetensors"]


@pytest.mark.slow
def test_the_default_run_begins_to_close_its_gap(tmp_path: Path) -> None:
    """`python launch.py` with default settings, offline, for a fortieth of its tokens."""
    paths = f"output_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"
    part = "train.train_tokens=10240", "data.validation_tokens=4096"
    finished = launch(*paths, *part, WANDB_MODE=None, WANDB_API_KEY=None)
    assert finished.returncode == 0, finished.stderr
    assert "tracking offline" in finished.stderr
    assert "W&B run" in finished.stdout
    (path,) = tmp_path.glob("main/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["gap_closed"] > 0.005
    assert Path(summary["tracked_at"]).is_dir()
