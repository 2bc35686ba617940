"""Folders of sparsify and dictionary_learning, and folders that hold no SAE."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import Hook
from sae_lora.models.hookpoints import Place
from sae_lora.saes import probe
from sae_lora.saes.metadata import read_folder
from tests.saes.test_loading import D_IN, D_SAE, MODEL, X, loaded, write

WEIGHTS = {
    "encoder": torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(2)) / 4,
    "decoder": torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(3)) / 4,
    "at_latents": torch.randn(D_SAE, generator=torch.Generator().manual_seed(4)) / 4,
    "at_output": torch.randn(D_IN, generator=torch.Generator().manual_seed(5)),
}
ENCODER, DECODER, B_ENC, B_DEC = WEIGHTS.values()


def topk(values: Tensor, k: int = 4) -> Tensor:
    """The k largest values of each token, and zeros."""
    least = values.topk(k).values[..., -1:]
    return values * (values >= least)


def write_sparsify(folder: Path, **values: Any) -> Path:
    """Write an SAE as sparsify does."""
    folder.mkdir(parents=True)
    config = {"expansion_factor": 2, "num_latents": 0, "k": 4, "normalize_decoder": True, "d_in": D_IN}
    (folder / "cfg.json").write_text(json.dumps(config | values))
    tensors = {"encoder.weight": ENCODER, "encoder.bias": B_ENC, "W_dec": DECODER, "b_dec": B_DEC}
    save_file(tensors, folder / "sae.safetensors")
    return folder


def write_dictionary(folder: Path, kind: str, tensors: dict[str, Tensor], **values: Any) -> Path:
    """Write an SAE as dictionary_learning does."""
    folder.mkdir(parents=True)
    trainer = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 2, "k": 4}
    trainer |= {"lm_name": "org/model", "submodule_name": "resid_post_layer_2"} | values
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}))
    torch.save(tensors, folder / "ae.pt")
    return folder


@torch.no_grad()
def reconstruction(folder: Path) -> Tensor:
    sae = loaded(folder).sae
    return sae.decode(sae.encode(X))


@pytest.mark.case("B7")
def test_sparsify_computes_as_its_source(tmp_path: Path) -> None:
    """Also if the decoder's norms are 1, where SAELens's converter does not subtract `b_dec`."""
    expected = topk(((X - B_DEC) @ ENCODER.T + B_ENC).relu()) @ DECODER + B_DEC
    for normalises in (True, False):
        folder = write_sparsify(tmp_path / str(normalises) / "layers.2", normalize_decoder=normalises)
        torch.testing.assert_close(reconstruction(folder), expected)
        choice = read_folder(str(folder), None, None, MODEL)
        assert (choice.block, choice.width, choice.l0) == (2, D_SAE, 4)


@pytest.mark.parametrize("name", ["layers.2", "layers_2", "h.2", "gpt_neox.layers.2"])
def test_the_place_of_sparsify_is_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": "org/model", "ctx_len": 99}))
    folder = write_sparsify(tmp_path / name)
    assert Place.of(read_folder(str(folder), None, None, MODEL)) == Place(2)
    stated = loaded(folder).stated
    assert (stated["model_name"], stated["context_size"]) == ("org/model", 99)


@pytest.mark.parametrize("name", ["layers.2.mlp", "layers.2.attention", "embed_tokens"])
def test_other_places_of_sparsify_are_refused(tmp_path: Path, name: str) -> None:
    folder = write_sparsify(tmp_path / name)
    for index, hook in ((None, None), (2, Hook.mlp_out)):
        with pytest.raises(ConfigError, match=f"its hook point is {name}, by the name of") as error:
            read_folder(str(folder), index, hook, MODEL)
        assert error.value.field == "sae.path"
        assert "change the name of its folder and set layer.index and layer.hook" in error.value.allowed
    renamed = folder.rename(tmp_path / "my_sae")
    place = Place.of(read_folder(str(renamed), 2, Hook.mlp_out, MODEL))
    assert place == Place(2, Hook.mlp_out)


def test_a_renamed_folder_of_sparsify_needs_the_block(tmp_path: Path) -> None:
    folder = write_sparsify(tmp_path / "my_sae")
    with pytest.raises(ConfigError, match="names no hook point"):
        read_folder(str(folder), None, None, MODEL)
    assert Place.of(read_folder(str(folder), 2, None, MODEL)) == Place(2)


@pytest.mark.parametrize(
    "values",
    [{"transcode": True}, {"skip_connection": True}, {"signed": True}, {"activation": "groupmax"}],
)
def test_what_is_no_topk_sae_of_sparsify_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = write_sparsify(tmp_path / "layers.2", **values)
    (key,) = values
    with pytest.raises(ConfigError, match=f"its cfg.json says {key}"):
        read_folder(str(folder), None, None, MODEL)


_LINEAR = {"encoder.weight": ENCODER, "encoder.bias": B_ENC, "decoder.weight": DECODER.T.contiguous()}
_JUMP = {"W_enc": ENCODER.T.contiguous(), "W_dec": DECODER, "b_enc": B_ENC, "b_dec": B_DEC}
_PRE = (X - B_DEC) @ ENCODER.T + B_ENC
_THRESHOLD = torch.full((D_SAE,), 0.5)


def jump(values: Tensor) -> Tensor:
    return values.relu() * (values > 0.5)


@pytest.mark.parametrize(
    ("kind", "tensors", "latents"),
    [
        ("AutoEncoder", _LINEAR | {"bias": B_DEC}, _PRE.relu()),
        ("AutoEncoderNew", _LINEAR | {"decoder.bias": B_DEC}, (X @ ENCODER.T + B_ENC).relu()),
        ("AutoEncoderTopK", _LINEAR | {"b_dec": B_DEC, "k": torch.tensor(4)}, topk(_PRE.relu())),
        ("BatchTopKSAE", _LINEAR | {"b_dec": B_DEC, "threshold": torch.tensor(0.5)}, jump(_PRE)),
        ("MatryoshkaBatchTopKSAE", _JUMP | {"threshold": torch.tensor(0.5)}, jump(_PRE)),
        ("JumpReluAutoEncoder", _JUMP | {"threshold": _THRESHOLD}, jump(X @ ENCODER.T + B_ENC)),
        (
            "GatedAutoEncoder",
            {"encoder.weight": ENCODER, "decoder.weight": DECODER.T.contiguous(), "decoder_bias": B_DEC}
            | {"gate_bias": B_ENC, "r_mag": B_ENC / 2, "mag_bias": -B_ENC},
            (_PRE > 0) * ((_PRE - B_ENC) * (B_ENC / 2).exp() - B_ENC).relu(),
        ),
    ],
)
def test_dictionary_learning_computes_as_its_source(
    tmp_path: Path, kind: str, tensors: dict[str, Tensor], latents: Tensor
) -> None:
    folder = write_dictionary(tmp_path / "trainer_0", kind, tensors)
    torch.testing.assert_close(reconstruction(folder), latents @ DECODER + B_DEC)
    assert Place.of(read_folder(str(folder), None, None, MODEL)) == Place(2)
    assert loaded(folder).stated["model_name"] == "org/model"


def test_dictionary_learning_at_other_places(tmp_path: Path) -> None:
    tensors = _LINEAR | {"bias": B_DEC}
    folder = write_dictionary(tmp_path / "mlp", "AutoEncoder", tensors, submodule_name="mlp_out_layer2")
    assert str(Place.of(read_folder(str(folder), None, None, MODEL))) == "blocks.2.hook_mlp_out"
    folder = write_dictionary(tmp_path / "heads", "AutoEncoder", tensors, submodule_name="attn.z")
    with pytest.raises(ConfigError, match=r"attn\.z"):
        read_folder(str(folder), None, None, MODEL)


def test_what_dictionary_learning_cannot_mean_is_refused(tmp_path: Path) -> None:
    folder = write_dictionary(tmp_path / "cross", "CrossCoder", {})
    with pytest.raises(ConfigError, match="dict_class: CrossCoder"):
        read_folder(str(folder), None, None, MODEL)
    folder = write_dictionary(tmp_path / "batch", "BatchTopKSAE", _LINEAR | {"b_dec": B_DEC})
    with pytest.raises(UserError, match="has no threshold"):
        loaded(folder)


def test_tensors_that_are_not_read_are_refused(tmp_path: Path) -> None:
    folder = write_sparsify(tmp_path / "layers.2")
    tensors = load_file(folder / "sae.safetensors")
    save_file(tensors | {"W_skip": torch.eye(D_IN)}, folder / "sae.safetensors")
    with pytest.raises(ConfigError, match="holds W_skip"):
        read_folder(str(folder), None, None, MODEL)
    tensors = _LINEAR | {"b_dec": B_DEC, "k": torch.tensor(5)}
    with pytest.raises(UserError, match=r"has k=5, but config\.json says k: 4"):
        loaded(write_dictionary(tmp_path / "topk", "AutoEncoderTopK", tensors))


@pytest.mark.parametrize("name", ["encoder.weight", "encoder.bias", "W_dec", "b_dec"])
@pytest.mark.case("B5")
def test_the_plan_refuses_weights_of_sparsify_that_do_not_fit(tmp_path: Path, name: str) -> None:
    folder = write_sparsify(tmp_path / "layers.2")
    weights = load_file(folder / "sae.safetensors")
    wrong = weights | {name: weights[name][..., :-1].contiguous()}
    for tensors, words in (
        (wrong, "has the shape"),
        ({key: weights[key] for key in weights.keys() - {name}}, "has no"),
    ):
        save_file(tensors, folder / "sae.safetensors")
        with pytest.raises(ConfigError, match=words) as error:
            read_folder(str(folder), None, None, MODEL)
        assert error.value.field == "sae.path"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([1, 2], "no weights by name but a list"),
        (ENCODER, "no weights by name but a Tensor"),
        ({"state_dict": _LINEAR}, "holds state_dict"),
        (_LINEAR | {"bias": 0.5}, "no tensors: bias"),
        (_LINEAR, "has no b_dec"),
        (_LINEAR | {"bias": B_ENC}, "b_dec in"),
        (_LINEAR | {"bias": B_DEC, "encoder.weight": ENCODER.T}, "W_enc in"),
    ],
)
@pytest.mark.case("B5")
def test_weights_of_dictionary_learning_that_do_not_fit(
    tmp_path: Path, tensors: Any, words: str
) -> None:
    folder = write_dictionary(tmp_path / "sae", "AutoEncoder", tensors)
    check_refused_by_all(folder, words)


def check_refused_by_all(folder: Path, words: str) -> None:
    """Assert that a dry run and a launch refuse this folder, but not the plan, which has no torch."""
    read_folder(str(folder), None, None, MODEL)
    for check in (lambda: probe.check_file(str(folder)), lambda: loaded(folder)):
        with pytest.raises(UserError, match=words) as error:
            check()
        assert "ae.pt" in str(error.value) and "Error" not in str(error.value)


_TOPK = _LINEAR | {"b_dec": B_DEC, "k": torch.tensor(4)}
_BATCH = _LINEAR | {"b_dec": B_DEC, "threshold": torch.tensor(0.5)}


@pytest.mark.parametrize(
    ("kind", "tensors", "words"),
    [
        ("AutoEncoderTopK", _TOPK | {"b_dec": B_DEC.long()}, "b_dec in .* is stored as int64"),
        ("AutoEncoderTopK", _TOPK | {"b_dec": B_DEC + 0j}, "b_dec in .* is stored as complex64"),
        ("AutoEncoderTopK", _TOPK | {"encoder.weight": ENCODER > 0}, "W_enc in .* is stored as bool"),
        ("AutoEncoderTopK", _TOPK | {"b_dec": B_DEC.to_sparse()}, "no tensors: b_dec"),
        (
            "AutoEncoderTopK",
            _TOPK | {"k": torch.tensor([4, 4])},
            r"has k=\[4, 4\], but config.json says k: 4",
        ),
        ("AutoEncoderTopK", _TOPK | {"k": None}, "has k=None"),
        ("BatchTopKSAE", _BATCH | {"threshold": torch.ones(3)}, r"threshold in .* the shape \[3\]"),
        ("BatchTopKSAE", _BATCH | {"threshold": torch.tensor(1)}, "threshold in .* is stored as int64"),
        ("BatchTopKSAE", _BATCH | {"threshold": "a"}, "threshold that is no number: 'a'"),
        ("BatchTopKSAE", _LINEAR | {"b_dec": B_DEC}, "has no threshold"),
    ],
)
def test_a_dry_run_reads_a_file_of_torch(
    tmp_path: Path, kind: str, tensors: dict[str, Tensor], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_SMALL", 0)  # as for a large file
    check_refused_by_all(write_dictionary(tmp_path / "sae", kind, tensors), words)


def test_a_dry_run_refuses_a_damaged_file_of_torch(tmp_path: Path) -> None:
    folder = write_dictionary(tmp_path / "sae", "AutoEncoderTopK", _TOPK)
    probe.check_file(str(folder))
    file = folder / "ae.pt"
    data = file.read_bytes()
    for start in (100, 900, len(data) // 2):  # a pickle, a name in the archive, values
        file.write_bytes(data[:start] + bytes(100) + data[start + 100 :])
        check_refused_by_all(folder, r"ae\.pt is damaged")
    for text in (b"<html>", b"\x80\x02" + data[:50]):
        file.write_bytes(text)
        check_refused_by_all(folder, r"ae\.pt is damaged")


def test_a_threshold_is_one_number_or_one_per_latent(tmp_path: Path) -> None:
    reference = write_dictionary(tmp_path / "scalar", "BatchTopKSAE", _BATCH)
    for name, threshold in {"float": 0.5, "of_one": torch.full((1,), 0.5), "vector": _THRESHOLD}.items():
        folder = write_dictionary(tmp_path / name, "BatchTopKSAE", _BATCH | {"threshold": threshold})
        probe.check_file(str(folder))
        assert torch.equal(reconstruction(folder), reconstruction(reference))


@pytest.mark.parametrize("size", [0, 300, 2000])
@pytest.mark.case("B5")
def test_the_plan_refuses_a_truncated_file_of_torch(tmp_path: Path, size: int) -> None:
    folder = write_dictionary(tmp_path / "sae", "AutoEncoder", _LINEAR | {"bias": B_DEC})
    read_folder(str(folder), None, None, MODEL)
    (folder / "ae.pt").write_bytes((folder / "ae.pt").read_bytes()[:size])
    with pytest.raises(UserError, match=r"ae\.pt is damaged or incomplete"):
        read_folder(str(folder), None, None, MODEL)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *((None, "buffer", value) for value in ("none", [], 1, False)),
        *(("trainer", "dict_class", value) for value in ([], 1, None)),
        *(("trainer", "activation_dim", value) for value in ("16", 16.5, True, float("inf"), None)),
        *(("trainer", "dict_size", value) for value in (-32, 0, [32])),
        ("trainer", "k", 4.0),
        *(("trainer", "layer", value) for value in ("2", 2.0, -1, True, 3)),
        *(("trainer", "submodule_name", value) for value in (5, ["resid_post_layer_2"])),
    ],
)
@pytest.mark.case("B5")
def test_a_value_of_another_type_in_dictionary_learning_is_named(
    tmp_path: Path, part: str | None, key: str, value: object
) -> None:
    folder = write_dictionary(tmp_path / "sae", "AutoEncoderTopK", {})
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part])[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"its config\.json says {key}: ") as error:
        read_folder(str(folder), None, None, MODEL)
    assert error.value.field == "sae.path"


@pytest.mark.parametrize("key", ["d_in", "k", "num_latents", "expansion_factor"])
@pytest.mark.parametrize("value", ["4", 4.5, True, -1, float("nan")])
def test_a_value_of_another_type_in_sparsify_is_named(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_sparsify(tmp_path / "layers.2", **{key: value})
    with pytest.raises(ConfigError, match=rf"its cfg\.json says {key}: "):
        read_folder(str(folder), None, None, MODEL)


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    tensors: Any = {"encoder.weight": Path("/")}
    folder = write_dictionary(tmp_path / "sae", "AutoEncoder", tensors)
    with pytest.raises(UserError, match="holds more than tensors") as error:
        loaded(folder)
    assert "weights_only" not in str(error.value)


def refusal(path: Path) -> ConfigError:
    """The refusal of a path that holds no SAE."""
    with pytest.raises(ConfigError) as error:
        read_folder(str(path), None, None, MODEL)
    assert error.value.nearest != path
    return error.value


@pytest.mark.case("B7")
def test_the_nearest_path_is_never_the_path_itself(tmp_path: Path) -> None:
    (tmp_path / "my_sae").mkdir()
    assert refusal(tmp_path / "my_sae").nearest is None
    write(tmp_path / "saes" / "blocks.2")
    assert refusal(tmp_path / "saes").nearest == tmp_path / "saes" / "blocks.2"
    file = tmp_path / "saes" / "blocks.2" / "sae_weights.safetensors"
    assert refusal(file).nearest == file.parent
    assert refusal(tmp_path / "saes" / "block.2").nearest == tmp_path / "saes" / "blocks.2"


@pytest.mark.case("B7")
def test_checkpoints_of_dictionary_learning_are_named(tmp_path: Path) -> None:
    """The advice of the message works."""
    folder = write_dictionary(tmp_path / "sae", "AutoEncoder", _LINEAR | {"bias": B_DEC})
    (folder / "checkpoints").mkdir()
    checkpoint = (folder / "ae.pt").rename(folder / "checkpoints" / "ae_100.pt")
    for path in (folder, checkpoint, checkpoint.parent):
        error = refusal(path)
        assert error.nearest is None
        assert f"copy {checkpoint}, say, to ae.pt in a new folder, and its config.json" in str(error)
    new = tmp_path / "new"
    new.mkdir()
    (new / "ae.pt").write_bytes(checkpoint.read_bytes())
    (new / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert Place.of(read_folder(str(new), None, None, MODEL)) == Place(2)


@pytest.mark.parametrize(
    ("present", "missing"),
    [("config.json", "ae.pt"), ("ae.pt", "config.json"), ("sae_weights.safetensors", "cfg.json")],
)
def test_the_missing_file_is_named(tmp_path: Path, present: str, missing: str) -> None:
    (tmp_path / present).write_text("{}")
    assert f"it has {present} without {missing}" in str(refusal(tmp_path))


def test_the_nearest_path_holds_an_sae(tmp_path: Path) -> None:
    (tmp_path / "my_sae").mkdir()
    assert refusal(tmp_path / "my_sea").nearest is None
    (tmp_path / "my_sae" / "notes.txt").write_text("")
    assert refusal(tmp_path / "my_sae" / "notes.txt").nearest is None


@pytest.mark.parametrize(
    ("file", "words"),
    [("params.npz", "Gemma Scope"), ("hyperparams.json", "Llama Scope"), ("conf.yaml", "TemporalSAE")],
)
def test_a_format_that_is_read_from_releases_is_named(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / file).write_text("{}")
    assert words in str(refusal(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"metadata": [1]}', '{"metadata": []}', "\xff"])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "cfg.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"cfg\.json"):
        read_folder(str(tmp_path), None, None, MODEL)
