"""Requests resolve to existing SAEs of sae-lens's table; all others are refused before loading."""

import shutil
from pathlib import Path

import pytest
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from sae_lora.common.errors import ConfigError, NoSuchCellError
from sae_lora.config.enums import DType, Hook, SAEFamily
from sae_lora.config.schema import SAEChoice, SAEConfig
from sae_lora.config.validate import latents
from sae_lora.models.dimensions import Dimensions
from sae_lora.saes import resolve as registry
from tests.support.coders import write_cfg
from tests.support.composing import composed

GEMMA_2B = Dimensions(d_model=2304, n_blocks=26, d_vocab=256_000, max_context=8192)
GEMMA = ("model=gemma2_2b", "sae=gemma_scope")


def resolve(dimensions: Dimensions, *overrides: str) -> registry.Resolution:
    return registry.resolve(composed(*overrides), dimensions)


def test_the_table_equals_sae_lenss() -> None:
    table, theirs = registry.table(), get_pretrained_saes_directory()
    assert table.keys() == theirs.keys()
    for release, entry in theirs.items():
        assert {sae["id"] for sae in table[release]["saes"]} == set(entry.saes_map)


@pytest.mark.parametrize(
    ("block", "width", "l0"),
    [
        *((12, "16k", l0) for l0 in (22, 41, 82, 176, 445)),
        *((12, "32k", 76), (12, "65k", 72), (12, "131k", 67), (12, "262k", 67), (12, "524k", 65)),
        *((6, "16k", 70), (9, "16k", 73), (15, "16k", 78), (18, "16k", 74)),
    ],
)
def test_the_papers_saes_exist(block: int, width: str, l0: int) -> None:
    asked = (f"layer.index={block}", f"sae.width={width}", f"sae.l0={l0}")
    (choice,), notes = resolve(GEMMA_2B, *GEMMA, *asked)
    assert choice.id == f"layer_{block}/width_{width}/average_l0_{l0}"
    assert (choice.block, choice.width, choice.l0) == (block, latents(width), l0)
    assert notes == []


def test_the_nearest_sae_is_used_and_noted() -> None:
    (choice,), notes = resolve(GEMMA_2B, *GEMMA, "sae.l0=80")
    assert choice.id == "layer_12/width_16k/average_l0_82"
    assert notes == ["block 12: sae.l0 80 does not exist; the nearest is 82"]


def test_several_blocks_get_one_sae_each() -> None:
    choices, _ = resolve(GEMMA_2B, *GEMMA, "layer.index=[6,12]")
    assert [choice.block for choice in choices] == [6, 12]


@pytest.mark.parametrize(
    ("model", "release"),
    [
        ("google/gemma-2-9b", "gemma-scope-9b-pt-res"),
        ("google/gemma-2-27b", "gemma-scope-27b-pt-res"),
        ("google/gemma-2-9b-it", "gemma-scope-9b-it-res"),
        ("google/gemma-3-1b-pt", "gemma-scope-2-1b-pt-res-all"),
        ("google/gemma-3-4b-it", "gemma-scope-2-4b-it-res-all"),
        ("google/gemma-3-270m", "gemma-scope-2-270m-pt-res-all"),
    ],
)
def test_gemma_scope_releases(model: str, release: str) -> None:
    dimensions = Dimensions(d_model=1, n_blocks=60, d_vocab=1, max_context=None)
    block = 10 if "27b" in model else 9
    choices, _ = resolve(
        dimensions, "sae=gemma_scope", f"model.name={model}", f"layer.index={block}", "sae.width=131k"
    )
    assert choices[0].release == release
    assert choices[0].block == block


def test_registry_by_id_takes_its_block_from_the_id() -> None:
    gpt2 = Dimensions(768, 12, 50257, 1024)
    jb = (
        "model=gpt2",
        "sae=registry",
        "sae.release=gpt2-small-res-jb",
        "sae.id=blocks.7.hook_resid_pre",
    )
    (choice,), _ = resolve(gpt2, *jb)
    assert choice.block == 6
    with pytest.raises(ConfigError) as error:
        resolve(gpt2, *jb, "layer.index=7")
    assert error.value.nearest == 6


@pytest.mark.parametrize(
    ("overrides", "field", "nearest"),
    [
        ((*GEMMA, "layer.index=26"), "layer.index", 25),
        ((*GEMMA, "model.name=google/gemma-7b"), "sae.family", None),
        (("model=gemma2_2b", "sae=llama_scope"), "sae.family", None),
        (("model=gemma2_2b", "sae=tiny"), "sae.family", None),
        (
            ("model=gpt2", "sae=registry", "sae.release=gpt2-small-res-jbb"),
            "sae.release",
            "gpt2-small-res-jb",
        ),
        (
            (
                *GEMMA[:1],
                "sae=registry",
                "sae.release=gemma-scope-2b-pt-res",
                "sae.id=layer_12/width_16k/average_l0_821",
            ),
            "sae.id",
            "layer_12/width_16k/average_l0_82",
        ),
        (("layer.index=0",), "layer.index", 1),
        (("sae=identity", "layer.index=26"), "layer.index", 25),
    ],
)
def test_missing_saes_are_refused(overrides: tuple[str, ...], field: str, nearest: object) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(GEMMA_2B, *overrides)
    assert error.value.field == field
    assert error.value.nearest == nearest


@pytest.mark.parametrize(
    ("overrides", "field", "nearest"),
    [
        # 262k exists only at block 12, and another column of the grid does not replace it.
        (("layer.index=6", "sae.width=262k"), "sae.width", 65_536),
        (("sae.l0=80", "launcher.strict=true"), "sae.l0", "82"),
        (("sae.width=20k", "launcher.strict=true"), "sae.width", 16_384),
    ],
)
def test_a_cell_that_does_not_exist(overrides: tuple[str, ...], field: str, nearest: object) -> None:
    with pytest.raises(NoSuchCellError) as error:
        resolve(GEMMA_2B, *GEMMA, *overrides)
    assert error.value.field == field
    assert error.value.nearest == nearest


TINY = Dimensions(d_model=128, n_blocks=8, d_vocab=2048, max_context=256)


def test_disk_takes_block_and_width_from_the_metadata(tmp_path: Path) -> None:
    hook = {"hook_name": "blocks.5.hook_resid_post"}
    folder = write_cfg(tmp_path / "sae", architecture="topk", d_sae=512, k=9, metadata=hook)
    (choice,), _ = resolve(TINY, "sae=disk", f"sae.path={folder}")
    assert (choice.block, choice.width, choice.l0) == (5, 512, 9)
    with pytest.raises(ConfigError) as error:
        resolve(TINY, "sae=disk", f"sae.path={folder}", "layer.index=4")
    assert (error.value.field, error.value.nearest) == ("layer.index", 5)


def test_another_sae_in_the_same_folder_is_another_choice(tmp_path: Path) -> None:
    hook = {"hook_name": "blocks.5.hook_resid_post"}
    folder = write_cfg(tmp_path / "sae", **hook)
    original, _ = resolve(TINY, "sae=disk", f"sae.path={folder}")
    shutil.rmtree(folder)
    write_cfg(tmp_path / "sae", b_dec=1.0, **hook)
    retrained, _ = resolve(TINY, "sae=disk", f"sae.path={folder}")
    assert original != retrained


def test_a_width_that_the_table_does_not_state_is_noted() -> None:
    gpt2 = Dimensions(768, 12, 50257, 1024)
    release = "sae.release=gpt2-small-resid-post-v5-32k"
    (choice,), (note,) = resolve(
        gpt2, "model=gpt2", "sae=registry", release, "sae.width=32k", "layer.index=6"
    )
    assert choice.id == "blocks.6.hook_resid_post"
    assert "does not state sae.width" in note


@pytest.mark.parametrize(
    ("release", "identifier"),
    [
        ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post"),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_3"),
    ],
)
def test_releases_without_saes_are_refused_before_a_download(release: str, identifier: str) -> None:
    with pytest.raises(ConfigError, match="no SAE or transcoder of single tokens") as error:
        asked = f"sae.release={release}", f"sae.id={identifier}"
        resolve(GEMMA_2B, "model=gemma2_2b", "sae=registry", *asked)
    assert error.value.field == "sae.release"


def test_disk_with_a_misspelt_path_names_the_neighbour(tmp_path: Path) -> None:
    write_cfg(tmp_path / "my_sae")
    with pytest.raises(ConfigError) as error:
        resolve(TINY, "sae=disk", f"sae.path={tmp_path}/my_sea")
    assert error.value.nearest == tmp_path / "my_sae"


def test_disk_pattern_for_several_blocks(tmp_path: Path) -> None:
    for block in (1, 4):
        write_cfg(tmp_path / f"at_{block}", hook_name=f"blocks.{block}.hook_resid_post")
    choices, _ = resolve(TINY, "sae=disk", f"sae.path='{tmp_path}/at_{{block}}'", "layer.index=[1,4]")
    assert [choice.block for choice in choices] == [1, 4]


@pytest.mark.parametrize(
    ("family", "asked", "excluded", "keeps"),
    [
        ("gemma_scope", None, False, True),
        ("gemma_scope", False, False, False),
        ("llama_scope", None, False, False),
        ("disk", None, True, True),
        ("disk", None, False, False),
        ("disk", True, False, True),
    ],
)
def test_special_tokens_are_kept_if_the_sae_was_not_trained_on_them(
    family: str, asked: bool | None, excluded: bool, keeps: bool
) -> None:
    from sae_lora.saes.loading import IdentitySAE, LoadedSAE, special_of

    loaded = LoadedSAE(IdentitySAE(), {}, excluded)
    config = SAEConfig(family=SAEFamily[family], keep_special_tokens=asked)
    assert special_of(config, loaded, (1, 2)).ids == ((1, 2) if keeps else ())


def test_loaded_saes_are_checked_against_their_own_metadata(tmp_path: Path) -> None:
    import torch
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    from sae_lora.saes.loading import load

    metadata = SAEMetadata(hook_name="blocks.2.hook_resid_post")
    TopKSAE(TopKSAEConfig(d_in=16, d_sae=32, k=2, metadata=metadata)).save_model(tmp_path / "sae")
    config = SAEConfig(family=SAEFamily.disk, dtype=DType.float32)
    fits = Dimensions(d_model=16, n_blocks=4, d_vocab=1, max_context=None)
    choice = SAEChoice(block=2, path=str(tmp_path / "sae"))
    loaded = load(config, choice, fits, torch.device("cpu"))
    assert loaded.description["hookpoint"] == "blocks.2.hook_resid_post"
    assert loaded.description["width"] == 32
    assert not any(weight.requires_grad for weight in loaded.sae.parameters())
    with pytest.raises(ConfigError, match=r"layer\.index = 3"):
        load(config, SAEChoice(block=3, path=str(tmp_path / "sae")), fits, torch.device("cpu"))
    for hook in (Hook.attn_out, Hook.mlp_out):
        elsewhere = SAEChoice(block=2, hook=hook, path=str(tmp_path / "sae"))
        with pytest.raises(ConfigError, match=r"trained at blocks\.2\.hook_resid_post"):
            load(config, elsewhere, fits, torch.device("cpu"))
    with pytest.raises(ConfigError, match="its d_in is 16"):
        load(config, choice, Dimensions(99, 4, 1, None), torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "block", "notes"),
    [
        (("model.name=my_model",), 15, ["layer.index=15 of 30 blocks, because nothing names a block"]),
        (("model=gpt2", "model.name=my_model"), 15, 1),
        (("model=gpt2", "model.name=my_model", "layer.index=7"), 7, []),
        (("model=hf", "model.name=my_model", "model.middle_block=9"), 9, []),
        (("model=gemma2_2b",), 12, []),  # as published
        (("model=tiny",), 3, []),
    ],
)
def test_the_middle_block_is_half_of_the_models_own_blocks(
    overrides: tuple[str, ...], block: int, notes: list[str] | int
) -> None:
    """Case C7: a model that is not the one of its group."""
    model = Dimensions(d_model=16, n_blocks=30, d_vocab=1, max_context=None)
    (choice,), actual = resolve(model, *overrides, "sae=identity")
    assert choice.block == block
    assert actual == notes or len(actual) == notes
