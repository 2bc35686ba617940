"""A value of config.json that transformers cannot work with: the message names its key."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import Attention, DType
from sae_lora.config.schema import ModelConfig
from sae_lora.models import config_faults, loading
from tests.support.tiny_models import small_causal_model, small_config

CPU = torch.device("cpu")


def change(folder: Path, values: dict[str, Any]) -> ModelConfig:
    """The model of the folder after a change of its config; a key with dots is inside another."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in values.items():
        *outer, name = key.split(".")
        part = config
        for inner in outer:
            part = part[inner]
        part[name] = value
    file.write_text(json.dumps(config))
    return ModelConfig(name=str(folder))


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "hidden_act", "silux"),
        ("llama", "rope_parameters.rope_type", "foo"),
        ("llama", "dtype", "float33"),
        ("llama", "num_attention_heads", 0),
        ("llama", "intermediate_size", "48"),
        ("llama", "pad_token_id", 5000),
        ("gpt2", "activation_function", "geluu"),
        ("gemma2", "query_pre_attn_scalar", 0),
        ("gemma2", "sliding_window", None),  # only a forward pass needs it
    ],
)
def test_the_key_that_transformers_cannot_use_is_named_before_loading(
    tmp_path: Path, family: str, key: str, value: Any
) -> None:
    small_config(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json") as refusal:
        loading.load_shapes(change(tmp_path, {key: value}))
    assert f"the cause is {key} = {value!r}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_a_saved_config_is_read_as_transformers_reads_it(tmp_path: Path, family: str) -> None:
    """Nemotron-H has an infinite number, which the file holds in another form."""
    small_config(family).save_pretrained(tmp_path)
    loading.load_shapes(ModelConfig(name=str(tmp_path)))
    config_faults.parsed(json.loads((tmp_path / "config.json").read_text()))


def test_an_error_of_another_cause_blames_no_key(tmp_path: Path) -> None:
    small_config("llama").save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path))
    with (
        pytest.raises(UserError, match=r"config\.json: OSError: no space$"),
        config_faults.explained(config, config_faults.parsed),
    ):
        raise OSError("no space")


def test_a_config_that_works_runs_without_weights() -> None:
    """Shapes answer the questions that masks ask; operations that need numbers are left out."""
    for family in ("llama", "mixtral", "gemma2", "jetmoe"):
        config_faults.run(config_faults.built(small_config(family)))


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        ("llama", {"rope_parameters.rope_theta": 0}, "inv_freq holds NaN or infinity"),
        ("gemma2", {"rms_norm_eps": -1e9}, "the output of block 0 holds NaN"),
        ("gemma2", {"sliding_window": 0}, "it is not causal"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "ZeroDivisionError"),
    ],
)
def test_a_number_that_makes_the_model_wrong_is_named(
    tmp_path: Path, family: str, values: dict[str, Any], words: str
) -> None:
    small_causal_model(family).save_pretrained(tmp_path)
    config = change(tmp_path, values)
    with pytest.raises(UserError, match=words) as refusal:
        loading.load_model(config, DType.float32, CPU)
    (key,) = values
    assert f"the cause is perhaps {key} = {values[key]}" in str(refusal.value)


def test_an_attention_that_nobody_asked_for_is_not_blamed(tmp_path: Path) -> None:
    small_causal_model("gemma2").save_pretrained(tmp_path)
    config = change(tmp_path, {"attn_logit_softcapping": 0.0})
    with pytest.raises(UserError, match=r"which model\.attention=auto takes") as refusal:
        loading.choose_attention(loading.load_shapes(config).model, Attention.auto, CPU)
    assert not isinstance(refusal.value, ConfigError)
    with pytest.raises(ConfigError, match=r"model\.attention = 'blockwise'"):
        loading.choose_attention(loading.load_shapes(config).model, Attention.blockwise, CPU)
