"""A model's folder: a missing, incomplete or damaged file is named before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_lora.common.errors import UserError
from sae_lora.config.enums import DType
from sae_lora.config.schema import ModelConfig
from sae_lora.models import loading
from sae_lora.models.model_folder import check_files
from tests.support.architectures import tiny_model
from tests.support.families import small_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("complete")
    small_model("llama").model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    """A copy, to damage."""
    return shutil.copytree(complete, tmp_path / "model")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    files = {"one": "model-1.safetensors", "two": "model-2.safetensors"}
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_zip(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1000)}, folder / "pytorch_model.bin")
    truncate(folder / "pytorch_model.bin")


def write_bin(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


def write_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)


def link(folder: Path, name: str) -> None:
    """As in a copied snapshot of the cache of Hugging Face."""
    (folder / name).unlink()
    (folder / name).symlink_to("../blobs/gone")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def quantise(folder: Path) -> None:
    """As folders are whose quantization_config somebody has deleted."""
    codes = {"model.layers.1.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8)}
    change_weights(folder, lambda weights: weights.update(codes))


def whole_bias(folder: Path) -> None:
    bias = {"model.layers.1.mlp.up_proj.bias": torch.ones(48, dtype=torch.int64)}
    change_weights(folder, lambda weights: weights.update(bias))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda folder: truncate(folder / "model.safetensors"), "model.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors").write_text(""), "model.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (shard, "model-2.safetensors is missing"),
        (write_zip, "pytorch_model.bin is incomplete"),
        (
            lambda folder: (folder / "model.safetensors").write_text(
                "version https://git-lfs.github.com"
            ),
            "git lfs pull",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
        (
            lambda folder: (folder / "added_tokens.json").write_text("[]"),
            r"holds \[\], not an object",
        ),
        (lambda folder: (folder / "added_tokens.json").write_text("{"), "added_tokens.json cannot be"),
        (lambda folder: write_bin(folder, b""), "pytorch_model.bin is no file of torch"),
        (lambda folder: write_bin(folder, b"<html>"), "it begins with b'<html>'"),
        (lambda folder: write_index(folder, "[]"), r"index.json holds \[\], not an object"),
        (lambda folder: write_index(folder, '{"metadata": {}}'), "with the key weight_map"),
        (
            lambda folder: write_index(folder, '{"metadata": {}, "weight_map": {"a": null}}'),
            "names no file for the weight a: None",
        ),
        (lambda folder: link(folder, "model.safetensors"), "is a link to ../blobs/gone, which does not"),
        (lambda folder: link(folder, "tokenizer.json"), "is a link to ../blobs/gone, which does not"),
        (whole_bias, r"up_proj.bias is quantised \(I64 in model.safetensors\)"),
        (quantise, r"up_proj.weight is quantised \(I8 in model.safetensors\)"),
    ],
)
@pytest.mark.case("B5")
def test_a_damaged_folder_is_refused_by_the_name_of_the_file(
    folder: Path, damage: Callable[[Path], object], words: str
) -> None:
    check_files(ModelConfig(name=str(folder)))
    damage(folder)
    with pytest.raises(UserError, match=words) as refusal:
        check_files(ModelConfig(name=str(folder)))
    assert str(folder) in str(refusal.value)
    assert "cache" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights["model.norm.weight"].fill_(torch.nan), "model.norm.weight holds NaN"),
        (
            lambda weights: weights["model.layers.2.mlp.up_proj.weight"][3].fill_(torch.inf),
            "model.layers.2.mlp.up_proj.weight holds NaN or infinity",
        ),
        (lambda weights: weights.pop("lm_head.weight"), "lack 1 of its weights: lm_head.weight"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(7)}),
            r"model.norm.weight has the shape \[7\] in its files and \[32\] by its config",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_model_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    """transformers draws missing weights at random."""
    change_weights(folder, change)
    with pytest.raises(UserError, match=words):
        loading.load_model(ModelConfig(name=str(folder)), DType.float32, CPU)


@pytest.mark.case("B5")
def test_weights_that_the_config_leaves_out_are_noted(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 3}))
    model = loading.load_model(ModelConfig(name=str(folder)), DType.float32, CPU)
    (note,) = model.notes
    assert "hold 9 weights that LlamaForCausalLM does not use" in note
    assert "model.layers.3.input_layernorm.weight" in note


@pytest.mark.case("B5")
def test_a_buffer_of_the_files_with_nan_is_refused(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3").model
    model.save_pretrained(tmp_path)
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    change_weights(tmp_path, lambda weights: weights[name].fill_(torch.nan))
    with pytest.raises(UserError, match=f"{name} holds NaN"):
        loading.load_model(ModelConfig(name=str(tmp_path)), DType.float32, CPU)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quantization_config": {}}, "its weights are quantised"),
        ({"model_type": "foo"}, r"does not know its architecture \(foo\)"),
        ({"model_type": "foo", "auto_map": {"AutoConfig": "foo.Foo"}}, "code from its repository"),
        ({"model_type": "t5"}, "t5 is not a causal language model"),
        ({"hidden_size": 31}, "is not a multiple of the number of attention heads"),
    ],
)
@pytest.mark.case("B5")
def test_a_config_of_no_causal_model_is_refused_in_one_line(
    folder: Path, values: dict[str, object], words: str
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    for load in (loading.fetch_model, loading.load_shapes):
        with pytest.raises(UserError, match=words) as refusal:
            load(ModelConfig(name=str(folder)))
        assert "\n" not in str(refusal.value)


def test_a_causal_mask_under_the_name_bias_is_no_weight(folder: Path) -> None:
    """As in files of GPT-2."""
    mask = {"h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    change_weights(folder, lambda weights: weights.update(mask))
    check_files(ModelConfig(name=str(folder)))


def test_a_number_of_blocks_that_the_config_omits_is_named(folder: Path) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    del values["num_hidden_layers"]
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config\.json does not state num_hidden_layers"):
        loading.fetch_model(ModelConfig(name=str(folder)))


def test_the_files_of_a_tokenizer_that_cannot_be_read_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"its tokenizer \(tokenizer.json\): KeyError"):
        loading.load_tokenizer(ModelConfig(name=str(folder)))
