"""Requested places of SAEs, by block and hook, and the places that SAEs were trained at."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from sae_lora.common.errors import ConfigError, NoSuchCellError
from sae_lora.config.enums import Hook
from sae_lora.config.identity import identity, readable_name
from sae_lora.config.schema import Config, LayerConfig
from sae_lora.embedded import SAES
from sae_lora.models.dimensions import Dimensions
from sae_lora.models.hookpoints import PLACES, Place
from sae_lora.saes import resolve
from sae_lora.saes.metadata import Notices, differences, differs_in_l0, read_folder, stated, stated_by
from sae_lora.saes.pretrained_table import place_in, same_model
from tests.support.coders import write_cfg
from tests.support.composing import composed

GEMMA_2B = Dimensions(d_model=2304, n_blocks=26, d_vocab=256_000, max_context=8192)
GEMMA_27B = Dimensions(d_model=4608, n_blocks=46, d_vocab=256_000, max_context=8192)
LLAMA_8B = Dimensions(d_model=4096, n_blocks=32, d_vocab=128_256, max_context=131_072)
GPT2 = Dimensions(d_model=768, n_blocks=12, d_vocab=50_257, max_context=1024)
TINY = Dimensions(d_model=128, n_blocks=8, d_vocab=2048, max_context=256)
composed_once = functools.cache(composed)


def asking(overrides: str, hook: str | None = None, **layer: object) -> Config:
    """The config that these overrides compose, with this layer."""
    values = LayerConfig(hook=None if hook is None else Hook[hook], **layer)  # pyright: ignore[reportArgumentType]
    return replace(composed_once(*overrides.split()), layer=values)


def places(
    dimensions: Dimensions, overrides: str, hook: str | None = None, **layer: object
) -> list[Place]:
    """The places of the SAEs that this request resolves to."""
    resolution = resolve.resolve(asking(overrides, hook, **layer), dimensions)
    return [Place.of(choice) for choice in resolution.choices]


def after(*blocks: int) -> list[Place]:
    return [Place(block) for block in blocks]


def of_mlps(*blocks: int) -> list[Place]:
    return [Place(block, Hook.mlp_out) for block in blocks]


def test_places_are_named_as_transformer_lens_does() -> None:
    for name in ("blocks.2.hook_attn_out", "blocks.10.hook_mlp_out", "blocks.0.hook_resid_post"):
        assert str(Place.named(name)) == name
    assert Place.named("blocks.7.hook_resid_pre") == Place(6)
    for name in ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z", "mlp"):
        assert Place.named(name) is None


@pytest.mark.parametrize("hook", ["attn_out", "mlp_out"])
def test_disk_takes_the_hook_from_the_metadata(tmp_path: Path, hook: str) -> None:
    folder = write_cfg(tmp_path / "sae", hook_name=f"blocks.5.hook_{hook}")
    for index, asked in ((None, None), (5, None), (None, Hook[hook]), (5, Hook[hook])):
        assert Place.of(read_folder(folder, index, asked, TINY)) == Place(5, Hook[hook])
    for asked in (Hook.resid_post, Hook.resid_pre):
        with pytest.raises(ConfigError, match=rf"was trained at blocks\.5\.hook_{hook}") as error:
            read_folder(folder, None, asked, TINY)
        assert (error.value.field, error.value.got) == ("layer.hook", asked.name)
        assert error.value.nearest == hook
    with pytest.raises(ConfigError) as error:
        read_folder(folder, 4, None, TINY)
    assert (error.value.field, error.value.nearest) == ("layer.index", 5)


def test_the_default_hook_is_resid_post(tmp_path: Path) -> None:
    folder = write_cfg(tmp_path / "sae")
    assert Place.of(read_folder(folder, 3, None, TINY)) == Place(3)
    assert Place.of(read_folder(folder, 3, Hook.mlp_out, TINY)) == Place(3, Hook.mlp_out)
    with pytest.raises(ConfigError, match="names no hook point"):
        read_folder(folder, None, Hook.mlp_out, TINY)


def test_resid_pre_is_the_output_of_the_block_before(tmp_path: Path) -> None:
    """Both names work, in the request and in the SAE's config."""
    for name, hook in (("before", "blocks.5.hook_resid_pre"), ("after", "blocks.4.hook_resid_post")):
        folder = write_cfg(tmp_path / name, hook_name=hook)
        for index, asked in ((None, None), (4, None), (4, Hook.resid_post), (5, Hook.resid_pre)):
            assert Place.of(read_folder(folder, index, asked, TINY)) == Place(4)
        with pytest.raises(ConfigError) as error:
            read_folder(folder, 4, Hook.resid_pre, TINY)
        assert (error.value.field, error.value.nearest) == ("layer.index", 5)
    assert places(TINY, "", "resid_pre", index=[2, 4]) == after(1, 3)
    with pytest.raises(ConfigError) as error:
        places(TINY, "", "resid_pre", index=1)
    assert (error.value.field, error.value.got, error.value.nearest) == ("layer.index", 1, 2)


def test_the_input_of_the_first_block_is_refused(tmp_path: Path) -> None:
    for overrides in ("", "sae=identity"):
        with pytest.raises(ConfigError, match="the embedding") as error:
            places(TINY, overrides, "resid_pre", index=0)
        assert (error.value.field, error.value.nearest) == ("layer.index", 1)
    with pytest.raises(ConfigError, match="except of block 0"):
        read_folder(write_cfg(tmp_path / "sae", hook_name="blocks.0.hook_resid_pre"), None, None, TINY)


@pytest.mark.parametrize(
    "values",
    [
        {"hook_name": "blocks.5.attn.hook_z"},
        {"hook_name": "blocks.5.hook_resid_mid"},
        {"hook_name": "blocks.5.hook_mlp_in", "hook_name_out": "blocks.5.hook_mlp_out"},
        {"hook_name": "blocks.5.hook_resid_pre", "hook_name_out": "blocks.5.hook_mlp_out"},
        {"hook_name": "blocks.5.hook_mlp_out", "architecture": "skip_transcoder"},
    ],
)
def test_other_places_and_transcoders_are_refused(tmp_path: Path, values: dict[str, str]) -> None:
    folders = [
        write_cfg(tmp_path / "new", metadata=values),
        write_cfg(tmp_path / "old", **values),
    ]
    for folder in folders:
        with pytest.raises(ConfigError, match="an SAE") as error:
            read_folder(folder, 5, None, TINY)
        assert error.value.field == "sae.path"


def test_an_sae_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = write_cfg(tmp_path / "sae", hook_name="blocks.5.hook_mlp_out", d_in=64)
    with pytest.raises(ConfigError, match="its d_in is 64") as error:
        read_folder(folder, None, None, TINY)
    assert error.value.field == "sae.path"


def test_a_hook_without_saes_is_an_empty_cell_of_the_grid() -> None:
    with pytest.raises(NoSuchCellError, match="a place with matching SAEs: resid_post") as error:
        places(TINY, "", "attn_out")
    assert (error.value.field, error.value.nearest) == ("layer.hook", "resid_post")


def test_gemma_scope_at_mlp_outputs() -> None:
    gemma = "model=gemma2_2b sae=gemma_scope"
    (choice,), _ = resolve.resolve(asking(gemma, "mlp_out", index=5), GEMMA_2B)
    assert (choice.release, Place.of(choice)) == ("gemma-scope-2b-pt-mlp", Place(5, Hook.mlp_out))
    assert str(choice.id).startswith("layer_5/width_16k/average_l0_")
    third = "model.name=google/gemma-3-1b-pt sae=gemma_scope"
    (choice,), _ = resolve.resolve(asking(third, "mlp_out", index=5), GEMMA_2B)
    assert (choice.release, Place.of(choice)) == ("gemma-scope-2-1b-pt-mlp-all", Place(5, Hook.mlp_out))
    expected = resolve.resolve(asking(gemma, "resid_post", index=12), GEMMA_2B)
    assert resolve.resolve(asking(gemma, "resid_pre", index=13), GEMMA_2B) == expected
    assert resolve.resolve(asking(gemma, index=12), GEMMA_2B) == expected
    assert expected.choices[0].release == "gemma-scope-2b-pt-res"


def test_hooks_that_gemma_scope_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="hook_z") as error:
        places(GEMMA_2B, "model=gemma2_2b sae=gemma_scope", "attn_out")
    assert error.value.field == "layer.hook"
    with pytest.raises(ConfigError, match="with gemma-2-27b") as error:
        places(GEMMA_27B, "model=gemma2_27b sae=gemma_scope", "mlp_out")
    assert (error.value.field, error.value.got) == ("layer.hook", "mlp_out")


@pytest.mark.parametrize(("hook", "letter"), [("attn_out", "a"), ("mlp_out", "m"), ("resid_post", "r")])
def test_llama_scope_at_every_hook(hook: str, letter: str) -> None:
    for times, asked, width in (("8x", "32k", 32_768), ("32x", "131k", 131_072)):
        config = asking("model=llama31_8b sae=llama_scope", hook, index=3)
        config = replace(config, sae=replace(config.sae, width=asked))
        (choice,), _ = resolve.resolve(config, LLAMA_8B)
        assert choice.release == f"llama_scope_lx{letter}_{times}"
        assert (choice.id, choice.width) == (f"l3{letter}_{times}", width)
        assert choice.hook is Hook[hook]


def of_gpt2(release: str, identifier: str | None = None) -> str:
    named = "" if identifier is None else f" sae.id={identifier}"
    return f"model=gpt2 sae=registry sae.release=gpt2-small-{release}{named}"


def test_registry_takes_the_hook_from_the_id() -> None:
    assert places(GPT2, of_gpt2("mlp-out-v5-32k", "blocks.7.hook_mlp_out")) == of_mlps(7)
    assert places(GPT2, of_gpt2("mlp-out-v5-32k"), index=[3, 7]) == of_mlps(3, 7)
    splitting = of_gpt2("res-jb-feature-splitting", "blocks.8.hook_resid_pre_768")
    assert places(GPT2, splitting) == after(7)
    with pytest.raises(ConfigError) as error:
        places(GPT2, of_gpt2("mlp-out-v5-32k", "blocks.7.hook_mlp_out"), "resid_post")
    assert (error.value.field, error.value.nearest) == ("layer.hook", "mlp_out")
    # The id names only the block; loading checks the hook.
    gemma = "model=gemma2_2b sae=registry sae.release=gemma-scope-2b-pt-mlp"
    assert places(GEMMA_2B, f"{gemma} sae.id=layer_5/width_65k/average_l0_22", "mlp_out") == of_mlps(5)


@pytest.mark.parametrize(
    ("release", "identifier"),
    [
        ("hook-z-kk", "blocks.5.hook_z"),
        ("resid-mid-v5-32k", "blocks.5.hook_resid_mid"),
        ("res-jb", "blocks.0.hook_resid_pre"),
    ],
)
def test_registry_at_other_places_is_refused(release: str, identifier: str) -> None:
    with pytest.raises(ConfigError) as error:
        places(GPT2, of_gpt2(release, identifier))
    assert (error.value.field, error.value.got) == ("sae.id", identifier)
    if release != "res-jb":  # this release also has SAEs at other places
        with pytest.raises(ConfigError, match=r"it contains blocks\.0\.hook_") as error:
            places(GPT2, of_gpt2(release), index=5)
        assert error.value.field == "sae.release"


def test_no_release_mixes_hooks() -> None:
    """Without `layer.hook`, each block has one place with SAEs."""
    for name, release in resolve.table().items():
        stated = [place_in(entry["id"], None) for entry in release["saes"]]
        assert len({place.hook for place in stated if place is not None}) <= 1, name


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (2, [1, 3, 5]), (3, [1, 4])])
def test_every_nth_block_of_the_embedded_saes(every: int, expected: list[int]) -> None:
    resolution = resolve.resolve(composed("layer=every_nth", f"layer.every={every}"), TINY)
    assert [Place.of(choice) for choice in resolution.choices] == after(*expected)
    assert {choice.id for choice in resolution.choices} <= {path.name for path in SAES.iterdir()}
    assert places(TINY, "", every=every, first=2) == after(*range(2, 7, every))


@pytest.mark.parametrize("hook", ["resid_post", "mlp_out"])
@pytest.mark.parametrize("every", [1, 2, 3, 4, 6, 8, 12, 16])
def test_every_nth_block_of_llama_scope(hook: str, every: int) -> None:
    """Several SAEs at once, as in the paper, in the 32 blocks of Llama-3.1-8B."""
    for first in (None, 3):
        result = places(LLAMA_8B, "model=llama31_8b sae=llama_scope", hook, every=every, first=first)
        assert result == [Place(block, Hook[hook]) for block in range(first or 0, 32, every)]


def test_every_nth_block_of_identity_saes_and_of_saes_on_disk(tmp_path: Path) -> None:
    assert places(TINY, "sae=identity", every=3) == after(0, 3, 6)
    # The inputs of blocks 1, 4 and 7: the input of block 0 is not the output of a block.
    assert places(TINY, "sae=identity", "resid_pre", every=3) == after(0, 3, 6)
    assert places(TINY, "sae=identity", "attn_out", every=7) == [
        Place(0, Hook.attn_out),
        Place(7, Hook.attn_out),
    ]
    for block in (2, 4, 6):
        write_cfg(tmp_path / f"at_{block}", hook_name=f"blocks.{block}.hook_mlp_out")
    on_disk = f"sae=disk sae.path='{tmp_path}/at_{{block}}'"
    assert places(TINY, on_disk, every=2) == of_mlps(2, 4, 6)
    assert places(TINY, on_disk, "mlp_out", every=2, first=4) == of_mlps(4, 6)


def test_every_nth_block_must_have_an_sae() -> None:
    scarce = "model=gemma2_27b sae=gemma_scope sae.width=131k"  # at blocks 10, 22 and 34
    assert places(GEMMA_27B, scarce, every=12) == after(10, 22, 34)
    with pytest.raises(NoSuchCellError, match=r"it also takes 16, 28") as error:
        places(GEMMA_27B, scarce, every=6)
    assert error.value.field == "layer.every"


@pytest.mark.parametrize(
    ("overrides", "layer", "field", "nearest"),
    [
        ("", {"first": 0}, "layer.first", 1),
        ("", {"first": 7}, "layer.first", 6),
        ("sae=disk sae.path=x", {}, "sae.path", None),
        ("sae=disk sae.path='x{block}'", {}, "sae.path", None),
        ("sae.width=512", {}, "sae.width", 1024),  # this width exists only at block 3
        (of_gpt2("res-jb", "blocks.7.hook_resid_pre"), {}, "layer.every", "null"),
    ],
)
def test_impossible_every_nth_blocks_are_refused(
    overrides: str, layer: dict[str, int], field: str, nearest: object
) -> None:
    with pytest.raises(ConfigError) as error:
        places(TINY, overrides, every=2, **layer)
    assert (error.value.field, error.value.nearest) == (field, nearest)


def named(*sites: Place) -> Config:
    """A config with identity SAEs at these places, as the planner resolves it."""
    (first, *_), config = sites, composed_once("sae=identity")
    resolved = resolve.resolve(asking("sae=identity", first.hook.name, index=first.block), TINY)
    used = [replace(resolved.choices[0], block=place.block, hook=place.hook) for place in sites]
    return replace(config, sae=replace(config.sae, used=used))


def test_another_hook_is_another_run_with_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """At resid_post, names and hashes are the same as before other hooks existed."""
    configs = [
        named(Place(3)),
        named(Place(3, Hook.mlp_out)),
        named(Place(3, Hook.attn_out)),
        named(Place(2), Place(5)),
        named(*of_mlps(2, 5)),
        named(Place(2, Hook.mlp_out), Place(5)),
        named(*after(*range(0, 8, 1))),
        named(*after(*range(0, 36, 4))),
        named(*of_mlps(*range(0, 32, 1))),
        named(*of_mlps(*range(0, 31, 1)), Place(31)),
    ]
    assert [readable_name(config).split("-")[1] for config in configs] == [
        *("l3", "l3mlp_out", "l3attn_out", "l2+5", "l2+5mlp_out", "l2mlp_out+5resid_post"),
        *("l0+1+2+3+4+5+6+7", "l0to32by4", "l0to31by1mlp_out", "l0to31mixed"),
    ]
    assert len(set(map(identity, configs))) == len(configs)
    hashed: list[dict] = []
    monkeypatch.setattr("sae_lora.config.identity._canonical", lambda values: str(hashed.append(values)))
    for config in configs[:2]:
        identity(config)
    assert ["hook" in values["sae"]["used"][0] for values in hashed] == [False, True]


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.3", "transformer.h.3", "gpt_neox.layers.3", "model.language_model.layers.3"),
        *("model.layers.3.output", "blocks.3.hook_out", "blocks.4.hook_in", "blocks.4.hook_resid_pre"),
    ],
)
@pytest.mark.case("B7")
def test_names_of_a_blocks_output(tmp_path: Path, name: str) -> None:
    for key in ("hook_name", "hook_point"):
        folder = write_cfg(tmp_path / key, metadata={key: name})
        assert Place.of(read_folder(folder, None, None, TINY)) == Place(3)


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.3.mlp", "transformer.h.3.attn", "lm_head", "blocks.0.hook_in", "hook_embed"),
        *("vision_tower.encoder.layers.3", "decoder.3.hook_resid_post"),
    ],
)
def test_names_of_other_places_are_refused(tmp_path: Path, name: str) -> None:
    folder = write_cfg(tmp_path / "sae", metadata={"hook_name": name})
    with pytest.raises(ConfigError, match=r"by the hook_name in its cfg\.json") as error:
        read_folder(folder, None, None, TINY)
    assert (error.value.field, error.value.got) == ("sae.path", folder)
    assert f"an SAE at {PLACES}" in error.value.allowed


NOTED = [
    ({"model_name": "gpt2-small"}, "trained on gpt2-small; this run uses it in tiny"),
    ({"context_size": 16}, "sequences of 16 tokens; data.context_length is 128"),
    ({"seqpos_slice": [0, 10]}, "only at positions 0:10 of each sequence"),
    ({"seqpos_slice": [5]}, "only at positions 0:5 "),
    ({"seqpos_slice": [None, None, 2]}, "only at positions 0::2 "),
    ({"model_from_pretrained_kwargs": {"fold_ln": True}}, "had changed (fold_ln)"),
    ({"hook_layer": 4, "hook_name": "blocks.5.hook_resid_post"}, "hook_layer is 4"),
    ({"prepend_bos": False}, "trained on sequences without BOS"),
    ({"context_size": "long"}, "context_size: 'long', which is not understood"),
    ({"seqpos_slice": {"a": 1}}, "which is not understood"),
    ({"seqpos_slice": ["a", 3]}, "which is not understood"),
    ({"seqpos_slice": []}, "which is not understood"),
    ({"seqpos_slice": [1, 2, 3, 4]}, "which is not understood"),
    ({"l0": float("nan")}, "which is not understood"),
    ({"model_from_pretrained_kwargs": "none"}, "which is not understood"),
    ({"unused_factor": 3.0}, "a factor of its input, 3.0, in activation_scaler.json"),
]
UNNOTED = [
    {"model_name": "org/tiny"},
    {"context_size": 128},
    {"seqpos_slice": [None]},
    {"seqpos_slice": [0, None, 1]},
    {"model_from_pretrained_kwargs": {"fold_ln": False, "dtype": "float16"}},
    {"hook_layer": 5, "hook_name": "blocks.5.hook_resid_post"},
    {"prepend_bos": True},
    {"noise_scale": 3, "unknown": 1},
]


@pytest.mark.case("A5")
def test_differences_between_metadata_and_run_are_noted() -> None:
    config = composed_once()
    for values, words in NOTED:
        (text,) = differences(stated({"metadata": values}), config, begins_with_bos=True)
        assert words in text
    for values in UNNOTED:
        assert differences(stated({"metadata": values}), config, begins_with_bos=True) == []
    assert differences({"prepend_bos": False}, config) == []  # the plan does not know the tokenizer


def test_notes_about_equal_saes_are_one_line() -> None:
    noticed = Notices()
    for block in (3, 1, 3):
        noticed.add(block, ["x", f"y{block}"])
    assert noticed.lines == ["blocks 1, 3: x", "block 3: y3", "block 1: y1"]


@pytest.mark.parametrize(
    ("name", "other", "same"),
    [
        ("gpt2-small", "openai-community/gpt2", True),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped", True),
        ("meta-llama/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B", True),
        ("gemma-2-2b", "/models/gemma-2-2b/", True),
        ("gemma-2-2b", "google/gemma-2-2b-it", False),
        ("gpt2-small", "gpt2-medium", False),
        ("pythia-70m", "pythia-70m-deduped", False),
    ],
)
def test_names_of_the_same_model(name: str, other: str, same: bool) -> None:
    assert same_model(name, other) is same


def test_the_names_of_models_equal_transformer_lenss() -> None:
    from transformer_lens.supported_models import MODEL_ALIASES

    for official, names in MODEL_ALIASES.items():
        assert all(same_model(name, official) for name in names), official


@pytest.mark.case("A5")
def test_an_l0_far_from_the_stated_one_is_noted() -> None:
    assert differs_in_l0(8, 10) is differs_in_l0(8, 6) is differs_in_l0(None, 6) is None
    for measured in (10.1, 5.9, 30):
        assert f"{measured:.3g} were measured" in str(differs_in_l0(8, measured))


def test_a_slip_in_the_spelling_of_a_hook_point_is_named(tmp_path: Path) -> None:
    meant = {
        "Blocks.5.hook_resid_post": "blocks.5.hook_resid_post",
        "block.5.hook_mlp_out": "blocks.5.hook_mlp_out",
        "blocks.5.hook_resid_pots": "blocks.5.hook_resid_post",
        "Model.Layers.5": "model.layers.5",
        "blocks.-5.hook_resid_post": None,
        "blocks.0.hook_resid_pre": None,
        "blocks.10.hook_resid_mid": None,
        "blocks.10.hook_mlp_in": None,
        "blocks.10.hook_attn_in": None,
        "gpt_neox.layers.10.mlp": None,
    }
    for number, (name, expected) in enumerate(meant.items()):
        folder = write_cfg(tmp_path / str(number), hook_name=name)
        with pytest.raises(ConfigError, match="by the hook_name in its cfg") as error:
            read_folder(folder, None, None, TINY)
        said = f"is meant as {expected}, correct the hook_name in its cfg.json"
        assert (said in error.value.allowed) == (expected is not None)
        assert ("change the hook_name" in error.value.allowed) == (expected is None)


def test_spaces_around_a_hook_point_are_dropped(tmp_path: Path) -> None:
    folder = write_cfg(tmp_path / "sae", hook_name=" blocks.5.hook_mlp_out\n")
    assert Place.of(read_folder(folder, None, None, TINY)) == Place(5, Hook.mlp_out)
    folder = write_cfg(tmp_path / "empty", hook_name=" ")
    with pytest.raises(ConfigError, match="names no hook point"):
        read_folder(folder, None, None, TINY)


def test_values_that_are_not_understood_are_noted(tmp_path: Path) -> None:
    for number, (key, value) in enumerate(
        {"dtype": "float33", "seqpos_slice": [0, None, 0], "context_size": "x"}.items()
    ):
        folder = write_cfg(tmp_path / str(number), hook_name="blocks.5.hook_resid_post", **{key: value})
        (note,) = differences(stated_by(read_folder(folder, None, None, TINY)), asking(""))
        assert note == f"the SAE's metadata says {key}: {value!r}, which is not understood"
    for dtype in ("float32", "torch.bfloat16"):
        folder = write_cfg(tmp_path / dtype, hook_name="blocks.5.hook_resid_post", dtype=dtype)
        assert not differences(stated_by(read_folder(folder, None, None, TINY)), asking(""))
