"""The plan: what points mean, which are the same, which cannot work, how far each is."""

from pathlib import Path

import pytest

from sae_lora.config import load
from sae_lora.errors import ConfigError
from sae_lora.plan import plan
from tests.points import Point, folders_in, points_in


@pytest.fixture
def point(tmp_path: Path) -> Point:
    return points_in(tmp_path)


def test_requests_for_the_same_sae_are_the_same_run(point: Point) -> None:
    planned = plan([point("sae.l0=4"), point("sae.l0=5"), point("sae.width=1k")])
    assert len(planned.runs) == 1
    assert any("sae.l0 5 does not exist; the nearest is 4" in note for note in planned.notes)


def test_the_same_request_in_other_words_is_the_same_run(point: Point) -> None:
    forms = ["lora.blocks=[5]", "lora.blocks=5"], ["lora.blocks=[4,5]", "lora.blocks=[5,4]"]
    for one, other in forms:
        assert len(plan([point(one), point(other)]).runs) == 1


def test_planning_writes_nothing(point: Point, tmp_path: Path) -> None:
    plan([point()])
    assert list(tmp_path.iterdir()) == []


def test_a_retry_takes_what_the_new_command_says(point: Point) -> None:
    (first,) = plan([point("train.kl_chunk_tokens=1024")]).runs
    first.freeze()
    (again,) = plan([point("train.kl_chunk_tokens=64")]).runs
    again.freeze()
    assert first.folder.path == again.folder.path
    assert load(again.folder.config.read_text()).train.kl_chunk_tokens == 64


@pytest.mark.parametrize(
    ("override", "field", "nearest"),
    [
        ("lora.blocks=[1,99]", "lora.blocks", [1]),
        ("layer.index=7", "layer.index", 6),
        ("sae=gemma_scope", "sae.family", None),
        ("data.context_length=512 train.batch_size=1", "data.context_length", 256),
    ],
)
def test_what_the_plan_refuses(
    point: Point, override: str, field: str, nearest: object, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        plan([point(*override.split())])
    assert (error.value.field, error.value.nearest) == (field, nearest)
    assert not folders_in(tmp_path)
