"""The plan: the run of each point, equal points, and points that cannot work."""

from dataclasses import replace
from pathlib import Path

import pytest

from sae_lora.common.errors import ConfigError, NoSuchCellError, UserError
from sae_lora.config.enums import Reduction
from sae_lora.config.serialize import load
from sae_lora.launcher.plan import plan
from tests.support.families import small_model
from tests.support.points import Point, folders_in


def test_requests_for_the_same_sae_are_the_same_run(point: Point) -> None:
    planned = plan([point("sae.l0=4"), point("sae.l0=5"), point("sae.width=1k")])
    assert len(planned.runs) == 1
    assert any("sae.l0 5 does not exist; the nearest is 4" in note for note in planned.notes)


def test_equal_requests_in_different_notation_are_the_same_run(point: Point) -> None:
    forms = (
        ("lora.blocks=[5]", "lora.blocks=5"),
        ("lora.blocks=[4,5]", "lora.blocks=[5,4]"),
        ("lora.alpha=2r", "lora.alpha=4"),
        ("lora.alpha=r", "lora.alpha=2.0"),
    )
    for first, second in forms:
        assert len(plan([point(first), point(second)]).runs) == 1


def test_cells_that_do_not_exist_are_dropped_from_a_sweep(point: Point) -> None:
    """SAEs with 4,096 latents exist only at block 3."""
    sweep = [point("sae.width=4k", f"layer.index={block}") for block in (2, 3, 4)]
    planned = plan(sweep)
    assert [run.config.sae.used[0].block for run in planned.runs] == [3]
    assert [note.split(",")[0] for note in planned.notes if "dropped" in note] == [
        "dropped: layer.index=2 sae.width=4k sae.l0=4",
        "dropped: layer.index=4 sae.width=4k sae.l0=4",
    ]
    with pytest.raises(NoSuchCellError):
        plan(sweep[:1])
    with pytest.raises(UserError, match="no point of this sweep has an SAE"):
        plan([sweep[0], sweep[2]])


def test_a_strict_plan_refuses_nearest_and_missing_saes(point: Point) -> None:
    exact = point("sae.l0=8", "launcher.strict=true")
    assert len(plan([exact]).runs) == 1
    for override in ("sae.l0=9", "sae.width=3k", "layer.index=2 sae.width=4k"):
        with pytest.raises(NoSuchCellError):
            plan([exact, point("launcher.strict=true", *override.split())])


def test_planning_writes_nothing(point: Point, tmp_path: Path) -> None:
    plan([point()])
    assert list(tmp_path.iterdir()) == []


def test_a_retry_uses_the_config_of_the_new_command(point: Point) -> None:
    (first,) = plan([point("train.kl_chunk_tokens=1024")]).runs
    first.freeze()
    (again,) = plan([point("train.kl_chunk_tokens=64")]).runs
    again.freeze()
    assert first.folder.path == again.folder.path
    assert load(again.folder.config.read_text()).train.kl_chunk_tokens == 64


def test_a_run_with_a_checkpoint_keeps_its_version_of_the_text(point: Point) -> None:
    (first,) = plan([point()]).runs
    config = replace(first.config, data=replace(first.config.data, version="old"))
    replace(first, config=config).freeze()
    (new,) = plan([point()]).runs
    assert new.config.data.version is None  # without a checkpoint, it reads the present text
    first.folder.checkpoints.mkdir()
    (started,) = plan([point()]).runs
    assert started.config.data.version == "old"
    assert started.folder.path == first.folder.path


@pytest.mark.parametrize(
    ("override", "field", "nearest"),
    [
        ("lora.blocks=[1,99]", "lora.blocks", [1]),
        ("layer.index=7", "layer.index", 6),
        ("sae=gemma_scope", "sae.family", None),
        ("data.context_length=512 train.batch_size=1", "data.context_length", 256),
    ],
)
def test_points_that_the_plan_refuses(
    point: Point, override: str, field: str, nearest: object, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        plan([point(*override.split())])
    assert (error.value.field, error.value.nearest) == (field, nearest)
    assert not folders_in(tmp_path)


@pytest.mark.case("C7")
def test_a_model_that_no_group_names_gets_sizes_from_its_own_config(
    point: Point, tmp_path: Path
) -> None:
    folder = tmp_path / "my_model"
    small_model("gpt_neox").model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    hf = ("model=hf", f"model.name={folder}", "sae=identity", "train.batch_size=1")
    planned = plan([point(*hf)])
    (config,) = [run.config for run in planned.runs]
    assert (config.sae.used[0].block, config.data.context_length) == (2, 64)
    assert config.data.name == "monology/pile-uncopyrighted"
    assert config.train.kl_reduction is Reduction.sequence_sum  # the published recipe
    assert planned.notes == [
        f"data.context_length=64 instead of 1024: the longest of {folder}",
        "layer.index=2 of 4 blocks, because nothing names a block",
    ]
    explicit = plan([point(*hf, "layer.index=2", "data.context_length=64", "model.fit_context=false")])
    assert [run.folder.path for run in explicit.runs] == [run.folder.path for run in planned.runs]
    with pytest.raises(ConfigError, match=r"data\.context_length=64"):
        plan([point(*hf, "model.fit_context=false")])
