"""Command lines become points, and mistakes one message; `conf/` is found where it is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sae_lora
from sae_lora.common.errors import UserError
from sae_lora.config.compose import TRACEBACK_VARIABLE, points

PACKAGE = Path(sae_lora.__file__).parent


def test_options_may_follow_overrides() -> None:
    composed = points(["lora.rank=3", "-m", "train.seed=1,2"], run_now=pytest.fail)
    assert [(point.lora.rank, point.train.seed) for point in composed] == [(3, 1), (3, 2)]


def test_the_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACEBACK_VARIABLE, raising=False)
    arguments = list(sys.argv)
    points(["lora.rank=3"], run_now=pytest.fail)
    with pytest.raises(UserError):
        points(["lora.rnk=3"], run_now=pytest.fail)
    assert sys.argv == arguments and TRACEBACK_VARIABLE not in os.environ


@pytest.mark.parametrize("override", ["sae.path=saes/{block}", "data.files=books/{one,two}.txt"])
def test_a_value_that_needs_quotes_is_shown_with_them(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(UserError) as refusal:
        points([override], run_now=pytest.fail)
    quoted = f'{key}="{value}"'
    assert f"'{quoted}'" in str(refusal.value)
    (point,) = points([quoted, *(["sae=disk"] if key == "sae.path" else [])], run_now=pytest.fail)
    assert value in (point.sae.path, point.data.files)


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
