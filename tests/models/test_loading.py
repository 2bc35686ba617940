"""Loading: weights in the configured precision, everything else as in transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Attention, DType
from sae_lora.config.schema import ModelConfig
from sae_lora.models.attention.choice import choose_attention
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.loading import load_model
from tests.support.families import D_MODEL, N_BLOCKS, random_tokens, small_model
from tests.support.tiny_models import small_causal_model


def test_bfloat16_models_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Bit for bit, including the rotary frequencies, which stay float32."""
    small_model(family).model.save_pretrained(tmp_path)
    attention = Attention.eager if family == "gemma2" else Attention.auto  # transformers' choice
    config = ModelConfig(name=str(tmp_path), dtype=DType.bfloat16, attention=attention)
    loaded = load_model(config, DType.bfloat16, torch.device("cpu"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    tokens = random_tokens(length=48)
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, reference(tokens).logits)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    for name, buffer in reference.named_buffers():
        assert loaded.model.get_buffer(name).dtype == buffer.dtype


def test_weights_can_be_rounded_to_bfloat16_and_stored_as_float32(tmp_path: Path) -> None:
    small_model("llama").model.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), dtype=DType.bfloat16)
    loaded = load_model(config, DType.float32, torch.device("cpu")).model
    for weight in loaded.parameters():
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
    hidden = {}
    for attention in (Attention.auto, Attention.eager):
        config = ModelConfig(name=str(tmp_path), attention=attention)
        loaded = load_model(config, DType.float32, cpu)
        hidden[loaded.model.config._attn_implementation] = loaded.hidden(tokens)
    assert hidden.keys() == {"blockwise", "eager"}
    torch.testing.assert_close(hidden["blockwise"], hidden["eager"], rtol=1e-4, atol=1e-5)


def test_an_unsupported_attention_is_refused(tmp_path: Path) -> None:
    small_model("gemma2").model.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), attention=Attention.sdpa)
    with pytest.raises(ConfigError, match=r"model\.attention = 'sdpa'"):
        load_model(config, DType.float32, torch.device("cpu"))


def test_an_attention_that_ignores_a_part_of_the_model_is_refused() -> None:
    """GPT-OSS has attention sinks, which blockwise attention does not know."""
    model = small_causal_model("gpt_oss")
    for block in model.model.layers:
        block.self_attn.sinks.data.fill_(3.0)
    with pytest.raises(ConfigError, match="differ from those with its usual attention"):
        choose_attention(model, Attention.blockwise, torch.device("cpu"))
