"""Requests for transcoders, what their metadata says that they read, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Hook, Reads
from sae_lora.models.dimensions import Dimensions
from sae_lora.saes import resolve as registry
from sae_lora.saes.metadata import read_folder
from sae_lora.saes.places import TRANSCODERS, hooks_of, reading
from sae_lora.saes.pretrained_table import converter_of, reading_of, table, transcoders_for
from tests.support.coders import write_cfg
from tests.support.composing import composed

TINY = Dimensions(d_model=128, n_blocks=8, d_vocab=2048, max_context=256)
GEMMA_2B = Dimensions(d_model=2304, n_blocks=26, d_vocab=256_000, max_context=8192)
GEMMA_1B = Dimensions(d_model=1152, n_blocks=26, d_vocab=262_144, max_context=32_768)
QWEN = Dimensions(d_model=2048, n_blocks=28, d_vocab=151_936, max_context=40_960)


def resolve(dimensions: Dimensions, *overrides: str) -> registry.Resolution:
    return registry.resolve(composed(*overrides), dimensions)


def write(folder: Path, architecture: str = "transcoder", d_in: int = 128, **metadata: Any) -> str:
    """Write a transcoder in sae-lens's format."""
    kind, config = get_sae_class(architecture)
    about = SAEMetadata(**metadata)
    sizes = {"d_in": d_in, "d_out": d_in, "d_sae": 16}
    kind(config(**sizes, apply_b_dec_to_input=False, metadata=about)).save_model(folder)
    return str(folder)


def test_every_release_of_transcoders_in_the_table_is_known_or_refused() -> None:
    for release, entry in table().items():
        is_named = "transcoder" in release or "transcoder" in converter_of(release)
        is_cross_layer = converter_of(release) == "mntss_clt_layer_transcoder"
        assert (reading_of(release) is not None) == (is_named and not is_cross_layer), entry["model"]


@pytest.mark.parametrize(
    ("dimensions", "overrides", "ids", "reads"),
    [
        (
            GEMMA_2B,
            ("model=gemma2_2b", "layer.index=0"),
            ["layer_0/width_16k/average_l0_76"],
            Reads.mlp_normalized,
        ),
        (
            GEMMA_1B,
            ("model=gemma3_1b", "layer.index=[12,13]", "sae.l0=120"),
            ["layer_12_width_16k_l0_big", "layer_13_width_16k_l0_big"],
            Reads.mlp_in,
        ),
        (
            GEMMA_1B,
            ("model=gemma3_1b", "layer.index=12", "sae.l0=20", "sae.skip=true"),
            ["layer_12_width_16k_l0_small_affine"],
            Reads.mlp_in,
        ),
        (QWEN, ("model=qwen3_1_7b", "layer.index=3"), ["layer_3"], Reads.mlp_in),
    ],
)
def test_a_models_transcoders(
    dimensions: Dimensions, overrides: tuple[str, ...], ids: list[str], reads: Reads
) -> None:
    choices, _ = resolve(dimensions, "sae=transcoder", *overrides)
    assert [choice.id for choice in choices] == ids
    assert {(choice.hook, choice.reads) for choice in choices} == {(Hook.mlp_out, reads)}


def test_a_list_of_folders_mixes_transcoders_and_saes(tmp_path: Path) -> None:
    """Each is at the place that its config names, in the order of the forward pass."""
    sae = write_cfg(tmp_path / "an_sae", metadata={"hook_name": "blocks.3.hook_resid_post"})
    first, second = (write(tmp_path / str(block), **hooks_of(block, Reads.mlp_in)) for block in (2, 3))
    choices, _ = resolve(TINY, "sae=disk", f"sae.path=[{sae},{second},{first}]")
    assert [(choice.block, choice.hook, choice.reads) for choice in choices] == [
        (2, Hook.mlp_out, Reads.mlp_in),
        (3, Hook.mlp_out, Reads.mlp_in),
        (3, Hook.resid_post, None),
    ]
    assert [choice.path for choice in choices] == [first, second, sae]
    with pytest.raises(ConfigError, match=r"is at blocks\.3\.hook_resid_post, too"):
        resolve(TINY, "sae=disk", f"sae.path=[{sae},{sae}]")


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("sae.path=[]",), "sae.path"),
        (("sae.path=[one,null]",), "sae.path"),
        (("sae.path=['{block}']",), "sae.path"),
        (("sae.path=[one,two]", "layer.index=3"), "layer.index"),
        (("sae.path=[one,two]", "layer.every=2"), "layer.every"),
        (("sae.path=[one,two]", "layer.hook=mlp_out"), "layer.hook"),
        (("sae.path=[one,two]", "layer.reads=mlp_in"), "layer.reads"),
    ],
)
def test_lists_that_cannot_be_used(overrides: tuple[str, ...], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        composed("sae=disk", *overrides)
    assert error.value.field == field


def test_every_block_of_the_embedded_model_has_one() -> None:
    choices, _ = resolve(TINY, "sae=transcoder", "layer=every_nth", "layer.every=1")
    assert [choice.block for choice in choices] == list(range(8))


@pytest.mark.parametrize(
    ("dimensions", "model"), [(TINY, "tiny"), (GEMMA_2B, "gemma2_2b"), (QWEN, "qwen3_1_7b")]
)
def test_what_is_asked_to_be_read_is_never_ignored(dimensions: Dimensions, model: str) -> None:
    asked = f"model={model}", "sae=transcoder", "layer.index=0", "layer.reads=resid_mid"
    (choice,), _ = resolve(dimensions, *asked)
    assert choice.reads is Reads.resid_mid


def test_releases_for_whole_models() -> None:
    assert transcoders_for("google/gemma-3-270m-it") == "gemma-scope-2-270m-it-transcoders-all"
    assert transcoders_for("Qwen/Qwen3-4B-Base") == "mwhanna-qwen3-4b-transcoders"
    assert transcoders_for("meta-llama/Llama-3.2-1B") is None


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_a_folder_says_what_it_reads(architecture: str, tmp_path: Path) -> None:
    for reads in Reads:
        folder = write(tmp_path / reads.name, architecture, **hooks_of(2, reads))
        choice = read_folder(folder, None, None, TINY)
        assert (choice.block, choice.hook, choice.reads) == (2, Hook.mlp_out, reads)
    folder = write(tmp_path / "unstated", architecture, hook_name_out="blocks.1.hook_mlp_out")
    with pytest.raises(ConfigError, match="does not say what this transcoder reads") as error:
        read_folder(folder, None, None, TINY)
    assert (error.value.field, error.value.nearest) == ("layer.reads", "mlp_in")
    assert read_folder(folder, None, None, TINY, Reads.resid_mid).reads is Reads.resid_mid


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"hook_name": "blocks.1.hook_mlp_in"}, Reads.resid_mid),  # as TransformerLens means it
        (
            {
                "hook_name": "blocks.1.hook_mlp_in",
                "hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output",
            },
            Reads.mlp_in,
        ),
        ({"hook_name": "model.layers.1.mlp.input"}, Reads.mlp_in),
        ({"hook_name": "transformer.h.1.ln_2.output"}, Reads.mlp_in),
        ({}, None),
    ],
)
def test_names_of_what_is_read(stated: dict[str, str], expected: Reads | None) -> None:
    about = {"architecture": "transcoder", "hook_name_out": "blocks.1.hook_mlp_out"} | stated
    assert reading(about, "sae.path", "it") is expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_in": 64}, "its d_in is 64"),
        ({"hook_name": "blocks.2.attn.hook_z"}, "it reads blocks.2.attn.hook_z"),
        ({"hook_name": "blocks.1.mlp.hook_in"}, "reads block 1 and writes block 2"),
        ({"hook_name_out": "blocks.2.hook_resid_post"}, "it writes blocks.2.hook_resid_post"),
    ],
)
def test_transcoders_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "one", **(hooks_of(2, Reads.mlp_in) | change))
    with pytest.raises(ConfigError, match=message) as error:
        read_folder(folder, None, None, TINY)
    assert error.value.field == "sae.path"


def test_a_crosscoder_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", **hooks_of(2, Reads.mlp_in))
    file = tmp_path / "one/cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architecture": "crosscoder"}))
    with pytest.raises(ConfigError, match="one activation, or architecture"):
        read_folder(folder, None, None, TINY)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("layer.reads=mlp_in",), "layer.reads"),
        (("sae.skip=true",), "sae.skip"),
        (("sae=transcoder", "layer.hook=resid_post"), "layer.hook"),
        (("method=sae", "sae=new", "sae.architecture=transcoder", "layer.hook=attn_out"), "layer.hook"),
        (("sae=transcoder", "sae.skip=true"), "sae.skip"),
        (("sae=transcoder", "model=gpt2"), "sae.family"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(overrides: tuple[str, ...], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(TINY, *overrides)
    assert error.value.field == field
