"""Loading: the weights in the precision asked for, everything else as transformers keeps it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Attention, DType
from sae_lora.config.schema import ModelConfig
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.loading import load_model
from tests.support.families import D_MODEL, N_BLOCKS, random_tokens, small_model


def test_bfloat16_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    """To the last bit, rotary frequencies included: those stay float32."""
    small_model(family).model.save_pretrained(tmp_path)
    own = Attention.eager if family == "gemma2" else Attention.auto  # as transformers chooses
    config = ModelConfig(name=str(tmp_path), dtype=DType.bfloat16, attention=own)
    loaded = load_model(config, DType.bfloat16, torch.device("cpu"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    tokens = random_tokens(length=48)
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, reference(tokens).logits)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    for name, buffer in reference.named_buffers():
        assert loaded.model.get_buffer(name).dtype == buffer.dtype


def test_weights_are_rounded_to_one_precision_and_held_in_another(tmp_path: Path) -> None:
    small_model("llama").model.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), dtype=DType.bfloat16)
    held = load_model(config, DType.float32, torch.device("cpu")).model
    for weight in held.parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weight.bfloat16().float())


def test_dimensions_are_known_before_loading(family: str, tmp_path: Path) -> None:
    small_model(family).model.config.save_pretrained(tmp_path)
    dimensions = read_dimensions(ModelConfig(name=str(tmp_path)))
    assert (dimensions.d_model, dimensions.n_blocks, dimensions.max_context) == (D_MODEL, N_BLOCKS, 64)


def test_soft_capped_attention_is_blockwise_on_a_cpu(tmp_path: Path) -> None:
    small_model("gemma2").model.save_pretrained(tmp_path)
    cpu = torch.device("cpu")
    tokens = random_tokens(length=48)
    found = {}
    for own in (Attention.auto, Attention.eager):
        config = ModelConfig(name=str(tmp_path), attention=own)
        loaded = load_model(config, DType.float32, cpu)
        found[loaded.model.config._attn_implementation] = loaded.hidden(tokens)
    assert found.keys() == {"blockwise", "eager"}
    torch.testing.assert_close(found["blockwise"], found["eager"], rtol=1e-4, atol=1e-5)


def test_an_attention_that_is_not_there_is_refused(tmp_path: Path) -> None:
    small_model("gemma2").model.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), attention=Attention.sdpa)
    with pytest.raises(ConfigError, match=r"model\.attention = 'sdpa'"):
        load_model(config, DType.float32, torch.device("cpu"))
