"""Data sets through the library `datasets`: wrong names are refused with the right ones."""

import dataclasses
from itertools import islice
from pathlib import Path

import pytest

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import TextSource
from sae_lora.config.schema import DataConfig
from sae_lora.data.documents import hub_documents
from sae_lora.launcher.plan import plan
from tests.support.composing import with_values

CARD = """---
configs:
- config_name: english
  data_files: [{split: train, path: english.jsonl}, {split: test, path: english.jsonl}]
- {config_name: french, data_files: french.jsonl}
- {config_name: broken, data_files: broken.jsonl}
---
"""


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data_set")
    (folder / "README.md").write_text(CARD)
    (folder / "english.jsonl").write_text('{"text": "one", "n": 1}\n{"text": null, "n": 2}\n' * 3)
    (folder / "french.jsonl").write_text('{"text": ["un", "deux"]}\n')
    (folder / "broken.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    return DataConfig(source=TextSource.hub, name=str(folder), subset="english")


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"subset": "englisch"}, "english"),
        ({"subset": None}, None),
        ({"split": "tset"}, "test"),
        ({"column": "txt"}, "text"),
        ({"column": "n"}, None),
        ({"subset": "french"}, None),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest(
    data_set: DataConfig,
    changes: dict[str, str],
    nearest: str | None,
    streaming: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    config = dataclasses.replace(data_set, streaming=streaming, **changes)
    with pytest.raises(ConfigError) as error:
        list(hub_documents(config))
    key = "column" if changes.get("subset") == "french" else next(iter(changes))
    assert (error.value.field, error.value.nearest) == (f"data.{key}", nearest)
    if key == "subset":
        assert "english, french, broken" in error.value.allowed


@pytest.mark.parametrize("name", ["a/b/c", "/tmp/nowhere/x", "no spaces", "{folder}"])
def test_a_name_that_is_none_of_the_hub(name: str, tmp_path: Path) -> None:
    """A folder would be read in place of the data set."""
    with pytest.raises(ConfigError, match=r"data=text_files data\.files") as error:
        plan([with_values("data.source=hub", f"data.name={name.format(folder=tmp_path)}")])
    assert error.value.field == "data.name"


def test_rows_without_text_are_left_out(data_set: DataConfig) -> None:
    assert [document.text for document in hub_documents(data_set)] == ["one"] * 3


def test_a_damaged_file_of_a_data_set_is_one_message(data_set: DataConfig) -> None:
    with pytest.raises(UserError, match=r"data\.name = .* cannot be read: "):
        list(islice(hub_documents(dataclasses.replace(data_set, subset="broken")), 10))
