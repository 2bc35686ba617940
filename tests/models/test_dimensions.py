"""Sizes of models from their config files, under the names of every family."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sae_lora.common.errors import UserError
from sae_lora.config.schema import ModelConfig
from sae_lora.models.dimensions import Dimensions, read_dimensions

SIZES = Dimensions(d_model=64, n_blocks=6, d_vocab=100, max_context=512)


def read(folder: Path, **values: Any) -> Dimensions:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100} | values))
    return read_dimensions(ModelConfig(name=str(folder)))


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 64, "num_hidden_layers": 6, "max_position_embeddings": 512},
        {"n_embd": 64, "n_layer": 6, "n_positions": 512, "n_ctx": 512},  # GPT-2, GPT-J, CTRL
        {"hidden_size": 64, "num_layers": 6, "max_position_embeddings": 512},  # GPT-Neo
        {"d_model": 64, "n_layers": 6, "max_seq_len": 512},  # MPT, DBRX
        {"d_model": 64, "num_layers": 6, "max_position_embeddings": 512},  # XGLM
        {"d_model": 64, "decoder_layers": 6, "num_hidden_layers": 2, "max_target_positions": 512},
        {"hidden_size": 64, "num_hidden_layers": 6, "context_length": 512},  # RWKV
    ],
)
def test_each_name_of_a_size_is_known_without_transformers(
    tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_lora.models.dimensions._through_transformers", pytest.fail)
    sizes = dataclasses.replace(SIZES, model_type="any")
    assert read(tmp_path, model_type="any", **values) == sizes
    text_config = {"vocab_size": 100, "model_type": "any"} | values
    assert read(tmp_path, model_type="outer", vocab_size=7, text_config=text_config) == sizes


def test_a_size_that_the_file_omits_is_that_of_transformers(tmp_path: Path) -> None:
    """Also under the names of another family, through the attribute map of its config."""
    sizes = Dimensions(64, 6, 100, None, "bloom")
    assert read(tmp_path, model_type="bloom", n_embed=64, n_layer=6) == sizes
    assert read(tmp_path, model_type="llama", hidden_size=64).n_blocks == 32


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        ({"quantization_config": {"load_in_4bit": True}}, "its weights are quantised, and only float"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, r"quantised \(awq\)"),
        ({"is_encoder_decoder": True}, "it is an encoder-decoder"),
        ({"hidden_size": "64"}, "hidden_size in its config is '64', not a size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in its config is 0, not a size"),
        ({"num_hidden_layers": True}, "num_hidden_layers in its config is True, not a size"),
        ({"max_position_embeddings": -1}, "max_position_embeddings in its config is -1, not a size"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings in its config is '64', not a size"),
        ({"model_type": None}, "it has no model_type"),
        ({"model_type": ["llama"]}, r"model_type in .*config.json is \['llama'\], not a name"),
        ({"text_config": 5}, "text_config in .*config.json is 5, not an object"),
    ],
)
def test_a_model_that_cannot_work_is_refused_before_loading(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    llama = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 6}
    with pytest.raises(UserError, match=words):
        read(tmp_path, **llama | {"max_position_embeddings": 512} | values)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\ufffd"])
def test_a_file_that_holds_no_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_dimensions(ModelConfig(name=str(tmp_path)))


def test_an_adapter_without_a_model_is_named(tmp_path: Path) -> None:
    """As peft saves it: without config.json."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge_and_unload"):
        read_dimensions(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize("target", ["../blobs/gone", "config.json"])
def test_a_config_that_is_a_broken_link_is_named(tmp_path: Path, target: str) -> None:
    (tmp_path / "config.json").symlink_to(target)
    with pytest.raises(UserError, match=f"is a link to {target}, which does not exist"):
        read_dimensions(ModelConfig(name=str(tmp_path)))
