"""Tests that need a GPU: `pytest -m gpu`."""

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae_lora.config.enums import Attention
from sae_lora.config.schema import LoRAConfig
from sae_lora.models.attention.choice import choose_attention
from sae_lora.models.language_model import LanguageModel
from sae_lora.train.cost.estimate import estimate
from sae_lora.train.cost.memory import CUDA_BYTES
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import random_tokens, small_model
from tests.support.packs import pack_of, resolved, take_step
from tests.support.trainings import batches, comparable, curves, evaluator, pack, training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
DEVICE = torch.device("cuda")
MODELS = ["gemma2", "llama"]


def on_gpu(family: str) -> LanguageModel:
    return LanguageModel(small_model(family).model.to(DEVICE))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def never_waiting() -> Iterator[None]:
    """The host must not wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", MODELS)
def test_a_step_does_not_wait(family: str, request: pytest.FixtureRequest) -> None:
    model = on_gpu(family)
    saes = [topk_sae().to(DEVICE), jumprelu_sae().to(DEVICE)]
    adapters = LoRAConfig(rank=2, dropout=0.2, blocks="all")
    runs = [training(model, sae, adapters=adapters) for sae in (*saes, saes[0])]
    together = pack(model, *runs, stacked=True)
    tokens = together._on_device(random_tokens(batch=2, length=16, seed=1))
    together._take_step(together.active, tokens)
    request.getfixturevalue("never_waiting")
    together._take_step(together.active, tokens)


@pytest.mark.parametrize("family", MODELS)
def test_fused_attention_serves(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernels prove themselves on this GPU, and the states are those of eager attention."""
    model = on_gpu(family)
    tokens = random_tokens(batch=2, length=200, seed=1).to(DEVICE)
    expected = model.hidden(tokens)
    choose_attention(model.model, Attention.auto, DEVICE)
    assert model.model.config._attn_implementation == "fused"
    torch.testing.assert_close(model.hidden(tokens), expected, rtol=1e-3, atol=1e-3)
    assert "serves in place" not in capsys.readouterr().err


@pytest.mark.parametrize("family", MODELS)
def test_packed_runs_equal_single_runs_to_the_last_bit(family: str) -> None:
    model = on_gpu(family)
    saes = [topk_sae().to(DEVICE), jumprelu_sae().to(DEVICE)]
    alone = [curves(pack(model, run := training(model, sae)), 6)[run] for sae in saes]
    trainings = [training(model, sae) for sae in saes]
    together = curves(pack(model, *trainings), 6)
    assert [together[run] for run in trainings] == alone


@pytest.mark.parametrize("family", MODELS)
def test_a_stack_proves_itself(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And gives what runs give alone, without dropout, which hits other inputs."""
    model, tokens = on_gpu(family), random_tokens(batch=2, length=16, seed=1)
    saes = [topk_sae().to(DEVICE), jumprelu_sae().to(DEVICE)]
    results = []
    for stacked in (False, True):
        runs = [training(model, sae, adapters=LoRAConfig(rank=2)) for sae in saes]
        together = pack(model, *runs, stacked=stacked)
        for _ in range(3):
            together._take_step(together.active, together._on_device(tokens))
        results.append([weight for run in runs for weight in run.student.weights.values()])
    for alone, together in zip(*results, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-2, atol=1e-4)
    assert "serves in place" not in capsys.readouterr().err


def test_a_restored_run_continues_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # as train.deterministic
    try:
        _continue_the_same()
    finally:
        torch.use_deterministic_algorithms(False)


def _continue_the_same() -> None:
    model, sae = on_gpu("llama"), topk_sae().to(DEVICE)
    whole = training(model, sae)
    expected = curves(pack(model, whole), 6)[whole]
    stopped = training(model, sae)
    for _ in itertools.islice(pack(model, stopped).points(batches(6)), 2):  # points of steps 0 and 3
        pass
    resumed = training(model, sae)
    resumed.restore(stopped.state())
    remaining = curves(pack(model, resumed), 6)[resumed]
    assert remaining == expected[-len(remaining) :]


@pytest.mark.parametrize(
    "overrides",
    ["", "train.kl=full", "lora.blocks=all", "train.dtype=bfloat16", "lora.rank=256 lora.dropout=0.1"],
)
def test_memory_is_as_estimated(overrides: str, tmp_path: Path) -> None:
    larger = "train.batch_size=64 train.eval_batch_tokens=128"
    configs = resolved(tmp_path, (f"{larger} {overrides}",))
    gc.collect()
    torch.cuda.empty_cache()
    baseline = torch.cuda.memory_allocated()
    together = pack_of(configs, DEVICE)
    take_step(together, configs[0])
    torch.cuda.reset_peak_memory_stats()
    take_step(together, configs[0])
    peak = torch.cuda.max_memory_allocated() - baseline
    assert estimate(configs).peak_bytes - CUDA_BYTES == pytest.approx(peak, rel=0.15)


def test_evaluations_equal_those_of_a_cpu() -> None:
    cpu, gpu = small_model("gemma2"), on_gpu("gemma2")
    points = []
    for model, device in ((cpu, torch.device("cpu")), (gpu, DEVICE)):
        run = training(model, topk_sae().to(device))
        (evaluation,) = evaluator(model)([run.student])
        points.append(comparable(run.point(evaluation)))
    for name in ("base_ce", "spliced_ce", "kl", "fvu"):
        assert getattr(points[1], name) == pytest.approx(getattr(points[0], name), rel=1e-3)
