"""Folders and caches that cannot be written are named before any work starts."""

import errno
from pathlib import Path

import pytest
from huggingface_hub import constants

from sae_lora.common import hub
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.files import check_can_be_made, check_writable
from sae_lora.config.identity import folder_name
from sae_lora.launcher.plan import plan
from sae_lora.records.folder import runs_of
from tests.support.composing import composed, with_values


@pytest.mark.parametrize("name", ["file/outputs", "x" * 300, "a/" + "é" * 200])
def test_a_folder_that_cannot_be_made_is_refused_with_and_without_writing(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="output_dir: cannot write to"):
        check_can_be_made(tmp_path / name, "output_dir")
    assert sorted(tmp_path.rglob("*")) == before
    check_can_be_made(tmp_path / "new" / "folder", "output_dir")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="output_dir: cannot write to"):
        check_writable(tmp_path / name, "output_dir")


@pytest.mark.case("B5")
def test_the_name_of_a_sweep_fits_a_file_system() -> None:
    assert with_values(f"sweep={'x' * 255}").sweep == "x" * 255
    for name in ("x" * 256, "é" * 200):
        with pytest.raises(ConfigError, match="longest name of a folder") as error:
            with_values(f"sweep={name}")
        nearest = str(error.value.nearest)
        assert name.startswith(nearest) and 250 < len(nearest.encode()) <= 255


def test_a_long_name_of_a_run_is_cut_and_stays_unique(tmp_path: Path) -> None:
    short = composed("lora.rank=3")
    assert plan([short]).runs[0].name == folder_name(plan([short]).runs[0].config)
    long = []
    for rank in (1, 2):
        config = plan([composed(f"lora.rank={rank}", f"output_dir={tmp_path}")]).runs[0].config
        config.model.name = "org/" + "é" * 200
        long.append(folder_name(config))
        assert len(long[-1].encode()) in (254, 255)
    assert long[0] != long[1]


def test_the_path_of_a_sweep_that_is_too_long() -> None:
    with pytest.raises(UserError, match="File name too long"):
        runs_of(Path("x" * 300))


@pytest.mark.parametrize(("name", "cause"), [("none", "No such file"), ("", "Is a directory")])
def test_labelled_texts_are_looked_for_before_training(name: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"evaluation\.steering_texts = .* cannot be read: {cause}"):
        plan([with_values(f"evaluation.steering_texts={tmp_path / name}")])


def test_an_unknown_user_in_a_path() -> None:
    for key in ("data.files", "output_dir", "data.cache_dir", "sae.path"):
        with pytest.raises(ConfigError, match="no user 'nobody_here'") as error:
            with_values(f"{key}=~nobody_here/x")
        assert error.value.field == key


@pytest.mark.parametrize("wrong", ["[1,2]", "[a,null]", "{a: b}"])
def test_files_that_are_not_text(wrong: str) -> None:
    with pytest.raises(ConfigError, match="is not text") as error:
        with_values("data.source=text_files", f"data.files={wrong}")
    assert error.value.field == "data.files"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.case("B5")
def test_a_cache_of_the_hub_that_cannot_be_written(code: int) -> None:
    file = Path(constants.HF_HUB_CACHE, "models--org--name", "blobs")
    with (
        pytest.raises(UserError, match=r"model\.name = 'org/name'.*set HF_HOME") as error,
        hub.explained("model.name", "org/name"),
    ):
        raise OSError(code, "the cause", str(file))
    assert f"{file}: the cause" in str(error.value)
    local = "my_model/config.json"
    with (
        pytest.raises(UserError, match=rf"{local}: the cause$"),
        hub.explained("model.name", "my_model"),
    ):
        raise OSError(code, "the cause", local)
