"""Memory counted on the meta device is that of the same tensors with numbers."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sae_lora.common.errors import UserError
from sae_lora.config.enums import Attention, DType
from sae_lora.config.schema import LoRAConfig
from sae_lora.models import lora
from sae_lora.models.attention.choice import choose_attention
from sae_lora.models.language_model import LanguageModel
from sae_lora.train.cost.memory import Adapters, CountedModel, PeakMemory
from scripts.benchmark.memory import measured_bytes
from tests.support.architectures import ARCHITECTURES, tiny_model
from tests.support.families import D_MODEL, D_VOCAB, FAMILIES, N_BLOCKS, small_model
from tests.support.tiny_models import small_causal_model

BATCH, LENGTH = 8, 32


def counted(model: LanguageModel, folder: Path, dtype: DType = DType.float32) -> CountedModel:
    model.model.config.save_pretrained(folder)
    return CountedModel(str(folder), None, dtype, Attention.auto, on_gpu=False)


UPPER_HALF = 2, LoRAConfig(rank=4)
ALL_BLOCKS_DROPOUT = 0, LoRAConfig(rank=16, dropout=0.5, targets="mlp")


@pytest.mark.slow
@pytest.mark.case("A13")
@pytest.mark.parametrize(
    ("name", "students"),
    [(name, (UPPER_HALF, ALL_BLOCKS_DROPOUT)) for name in sorted(FAMILIES)]
    + [(name, (UPPER_HALF,)) for name in sorted(ARCHITECTURES)],
)
def test_a_pass_with_gradient_takes_the_counted_memory(
    name: str, students: Sequence[tuple[int, LoRAConfig]], tmp_path: Path
) -> None:
    for first, config in students:
        check_counted(
            small_model(name) if name in FAMILIES else tiny_model(name), first, config, tmp_path
        )


@pytest.mark.case("A13")
@pytest.mark.parametrize("model_type", ["doge", "opt"])
def test_unusual_blocks_are_counted(model_type: str, tmp_path: Path) -> None:
    """Doge's mask has a gradient, and OPT's head reads states that are narrower than its blocks."""
    check_counted(LanguageModel(small_causal_model(model_type)), *UPPER_HALF, tmp_path)


@pytest.mark.case("B3")
@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("deepseek_v4", "the output of block 3 has the shape"),
        ("gemma3n_text", "the output of block 3 has the shape"),
        ("gemma4_text", "does not run on the tokens and the output of block . alone: KeyError"),
    ],
)
def test_a_model_that_a_launch_refuses_has_no_estimate(
    model_type: str, words: str, tmp_path: Path
) -> None:
    small_causal_model(model_type).config.save_pretrained(tmp_path)
    model = CountedModel(str(tmp_path), None, DType.float32, Attention.auto, on_gpu=False)
    with pytest.raises(UserError, match=words):
        model.graph(2, (BATCH, LENGTH), None, [], through_first=True)


def test_a_block_that_cannot_be_counted_takes_at_least_its_matrices(tmp_path: Path) -> None:
    """The shapes in JetMoE's blocks depend on numbers."""
    model = LanguageModel(small_causal_model("jetmoe"))
    first, config = UPPER_HALF
    config.blocks = [2, 3]
    arguments = first, (BATCH, LENGTH), Adapters.of(config), config.blocks
    graph = counted(model, tmp_path).graph(*arguments, through_first=False)
    lora.attach(model, config, 0)
    with PeakMemory() as memory:
        hidden = model.hidden(torch.zeros(BATCH, LENGTH, dtype=torch.long))
    assert hidden.requires_grad
    assert 0 < graph.kept < memory.now


def check_counted(model: LanguageModel, first: int, config: LoRAConfig, folder: Path) -> None:
    choose_attention(model.model, Attention.auto, model.device)
    config.blocks = adapted = list(range(first, N_BLOCKS))
    graph = counted(model, folder).graph(
        first, (BATCH, LENGTH), Adapters.of(config), adapted, through_first=False
    )

    lora.attach(model, config, 0)
    lora.set_adapter_dropout(model, True)
    tokens = torch.randint(D_VOCAB, (BATCH, LENGTH))
    resid = torch.randn(BATCH, LENGTH, D_MODEL) if first else None
    with PeakMemory() as memory:
        hidden = model.hidden(tokens, first, resid)
        kept = memory.now
        memory.peak = kept
        hidden.backward(torch.ones_like(hidden))
    assert graph.kept == pytest.approx(kept, rel=0.05)
    assert graph.kept + graph.extra == pytest.approx(memory.peak, rel=0.07)


@pytest.mark.case("A13")
@pytest.mark.slow
def test_a_process_with_the_default_in_a_pack_of_four_takes_the_estimated_memory() -> None:
    estimated, measured = measured_bytes(["data.validation_tokens=4096"], 4)
    assert estimated == pytest.approx(measured, rel=0.15)
