"""Command lines become points, and mistakes one message; `conf/` is found where it is installed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

import sae_lora
from sae_lora.common.errors import ConfigError, UserError, causes
from sae_lora.config.batches import Directions
from sae_lora.config.compose import dispatch, points, with_quoted_text
from sae_lora.config.mistakes.explain import TRACEBACK_VARIABLE
from sae_lora.config.schema import Config

PACKAGE = Path(sae_lora.__file__).parent


def test_options_may_follow_overrides() -> None:
    composed = points(["lora.rank=3", "-m", "train.seed=1,2"])
    assert [(point.lora.rank, point.train.seed) for point in composed] == [(3, 1), (3, 2)]


def test_the_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    arguments = list(sys.argv)
    points(["lora.rank=3"])
    with pytest.raises(UserError):
        points(["lora.rnk=3"])
    assert sys.argv == arguments and TRACEBACK_VARIABLE not in os.environ


def test_the_points_of_a_sweep_are_launched_together() -> None:
    batches: list[tuple[list[int], Directions | None]] = []

    def launch(batch: list[Config], directions: Directions | None) -> list[None]:
        batches.append(([point.lora.rank for point in batch], directions))
        return [None] * len(batch)

    dispatch(["-m", "lora.rank=1,2,4"], launch)
    dispatch(["lora.rank=8"], launch)
    assert batches == [([1, 2, 4], None), ([8], None)]


@pytest.mark.parametrize("words", [["lora.rank=1"], ["-m", "lora.rank=1,2"]])
@pytest.mark.parametrize("error", [OSError("disk"), ValueError("a bug"), KeyboardInterrupt("stop")])
def test_an_error_of_a_launch_is_not_a_mistake_of_the_user(
    words: list[str], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACEBACK_VARIABLE, "0")
    seen = []

    def launch(_batch: list[Config], _directions: Directions | None) -> NoReturn:
        seen.append(os.environ[TRACEBACK_VARIABLE])
        raise error

    with pytest.raises(type(error)) as raised:
        dispatch(words, launch)
    assert raised.value is error and seen == ["0"] == [os.environ[TRACEBACK_VARIABLE]]
    assert list(causes(error)) == [error]  # no circle


@pytest.fixture
def odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has files whose names are grammar to Hydra."""
    monkeypatch.chdir(tmp_path)
    for name in ("a,b=[1].txt", "1", "my (model)", "ä日.jsonl", "a–b é.txt", "${x}.txt"):
        (tmp_path / name).write_text("")


@pytest.mark.usefixtures("odd_names")
@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("sae.path=saes/{block}/x", 'sae.path="saes/{block}/x"'),
        ("sae.path=a/{block}.x,b c/{block}=1,null", 'sae.path="a/{block}.x","b c/{block}=1",null'),
        ("sae.path=${oc.env:HOME}/{block}", 'sae.path="${oc.env:HOME}/{block}"'),
        ("data.files=books/{one,two}.txt", 'data.files="books/{one,two}.txt"'),
        ("data.files=[books/*.txt,a/{b}.txt]", 'data.files=["books/*.txt","a/{b}.txt"]'),
        ("data.files=a,b=[1].txt", 'data.files="a,b=[1].txt"'),
        ("data.files=1", 'data.files="1"'),
        ("model.name=my (model)", 'model.name="my (model)"'),
        ("data.files=ä日.jsonl", 'data.files="ä日.jsonl"'),
        ("data.files=a–b é.txt", 'data.files="a–b é.txt"'),
        ("data.files=[bücher/*.txt,b.txt]", 'data.files=["bücher/*.txt",b.txt]'),
        ("sae.path=modèles/{block},b", 'sae.path="modèles/{block}",b'),
        ("sweep=größe", 'sweep="größe"'),
        *((same, same) for same in ('sae.path="a/{block}","b"', "sae.path=choice(a,b)", "sweep=null")),
        *(
            (same, same)
            for same in ("data.files=a.txt,b.txt", "data.files=[a*,b*]", "sae={block}", "-m")
        ),
    ],
)
@pytest.mark.case("B17")
def test_paths_need_no_quotes_for_hydra(argument: str, quoted: str) -> None:
    """A name of an existing file is taken as it is, also with commas and brackets."""
    assert with_quoted_text(argument) == quoted
    assert with_quoted_text(quoted) == quoted


@pytest.mark.usefixtures("odd_names")
def test_points_with_paths_of_special_characters() -> None:
    paths = "sae.path=a/{block}.x,b c/{block}=1"
    composed = points(
        ["-m", "sae=disk", paths, "data=text_files", "data.files=a,b=[1].txt", "data.name=ä/日"]
    )
    assert {point.data.name for point in composed} == {"ä/日"}
    assert [point.sae.path for point in composed] == ["a/{block}.x", "b c/{block}=1"]
    assert {point.data.files for point in composed} == {"a,b=[1].txt"}


@pytest.mark.usefixtures("odd_names")
@pytest.mark.case("B17")
def test_a_file_that_looks_like_an_interpolation() -> None:
    with pytest.raises(ConfigError, match="rename the file or folder") as refusal:
        points(["data=text_files", "data.files=${x}.txt"])
    assert refusal.value.field == "data.files"


@pytest.mark.parametrize("argument", ["layer.index=[2,", "lora.blocks={1,2}"])
def test_a_value_that_needs_quotes_is_shown_with_them(argument: str) -> None:
    key, _, value = argument.partition("=")
    with pytest.raises(UserError) as refusal:
        points([argument])
    assert f"""'{key}="{value}"'""" in str(refusal.value)


@pytest.mark.parametrize("name", ["org/name", "/a/folder"])
@pytest.mark.case("C7")
def test_the_name_of_a_model_is_not_an_option_of_the_group(name: str) -> None:
    with pytest.raises(UserError, match="model = ") as refusal:
        points([f"model={name}"])
    assert str(refusal.value).endswith(f"nearest valid: model=hf model.name={name}")
    (point,) = points(["model=hf", f"model.name={name}"])
    assert point.model.name == name


def test_an_option_that_needs_a_value_says_so() -> None:
    with pytest.raises(UserError, match=r"model\.name has no value: add model\.name=<value>"):
        points(["model=hf"])


def test_an_installed_package_has_its_own_conf(tmp_path: Path) -> None:
    """As in a wheel: `conf/` inside the package, and no repository around it."""
    installed = tmp_path / "site-packages/sae_lora"
    installed.mkdir(parents=True)
    for path in PACKAGE.iterdir():
        (installed / path.name).symlink_to(path)
    (installed / "conf").symlink_to(PACKAGE.parent / "conf")
    code = "from sae_lora.config.compose import CONF, default; print(CONF); print(default().lora.rank)"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.splitlines() == [str(installed / "conf"), "16"]
    assert 'conf = "sae_lora/conf"' in (PACKAGE.parent / "pyproject.toml").read_text()
