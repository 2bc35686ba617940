"""W&B shows the run, and can never stop it."""

import time
from pathlib import Path

import pytest
import wandb

from sae_lora import tracking
from sae_lora.config import Config, TrackingConfig, TrackingMode
from tests.composing import composed
from tests.test_records import point


def config(mode: TrackingMode, **more: float) -> Config:
    base = composed()
    base.tracking = TrackingConfig(mode=mode, **more)  # pyright: ignore[reportArgumentType]
    return base


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    tracking._said_offline.clear()
    wandb.teardown()  # it reads the environment once a process


def test_disabled_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = tracking.start(config(TrackingMode.disabled), "name", "abc", tmp_path)
    tracker.log(point(0))
    tracker.finish(None)
    assert tracker.place is None
    assert list(tmp_path.iterdir()) == []
    assert caplog.text == ""


def test_wandbs_own_variable_decides_what_the_config_leaves_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.start(config(TrackingMode.auto), "name", "abc", tmp_path).place is None
    asked = tracking.start(config(TrackingMode.offline), "name", "abc", tmp_path)
    assert asked.place is not None
    asked.finish(None)


def test_not_logged_in_is_offline_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        tracker = tracking.start(config(TrackingMode.auto), "name", f"abc{number}", folder)
        tracker.log(point(0))
        tracker.log(point(1))
        tracker.finish(None)
        assert tracker.place is not None
        assert Path(tracker.place).is_relative_to(folder)
        assert list(Path(tracker.place).glob("*.wandb"))
    assert caplog.text.count("not logged in") == 1


def test_a_server_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    tracker = tracking.start(config(TrackingMode.auto), "name", "abc", tmp_path)
    tracker.log(point(0))
    tracker.finish(None)
    assert time.monotonic() - started < 30
    assert "does not answer" in caplog.text


def test_whatever_wandb_raises_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(wandb, "init", broken)
    tracker = tracking.start(config(TrackingMode.offline), "name", "abc", tmp_path)
    tracker.log(point(0))
    tracker.finish(None)
    assert "W&B is off for this run: no space left on device" in caplog.text


def test_a_hanging_end_is_not_waited_for(tmp_path: Path) -> None:
    tracker = tracking.start(config(TrackingMode.offline, finish_timeout_s=0.5), "name", "abc", tmp_path)
    finish = tracker._run.finish  # pyright: ignore[reportAttributeAccessIssue]
    tracker._run.finish = lambda **_: time.sleep(60)  # pyright: ignore[reportAttributeAccessIssue]
    started = time.monotonic()
    tracker.finish(None)
    assert time.monotonic() - started < 10
    finish()


def test_what_wandb_login_writes_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = wandb.Settings(base_url="http://wandb.example:8080")
    assert not tracking._is_logged_in(settings)
    (tmp_path / "netrc").write_text("machine wandb.example\n  login user\n  password " + "0" * 40 + "\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracking._is_logged_in(settings)
    assert not tracking._is_logged_in(wandb.Settings(base_url="http://other.example"))
