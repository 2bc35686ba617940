"""W&B shows exactly the rows of the curve, and never stops a run."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import wandb
import yaml

from sae_lora.cli import main
from sae_lora.common.errors import UserError
from sae_lora.common.locks import held
from sae_lora.config.compose import VARIABLES
from sae_lora.config.identity import identity
from sae_lora.config.serialize import load
from sae_lora.config.value_checks import WANDB_MODES
from sae_lora.evaluation import suite_records
from sae_lora.launcher.plan import plan
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint, Summary
from sae_lora.run import active_run
from sae_lora.tracking import tracker as tracking
from sae_lora.tracking import wandb_run
from sae_lora.tracking.sync import upload
from sae_lora.tracking.tracker import Tracker
from sae_lora.tracking.wandb_view import CURVES, WandbView
from sae_lora.train import checkpoint
from tests.support.attempts import FORKS, frozen, run_with_fault
from tests.support.commands import REPOSITORY
from tests.support.points import points_in
from tests.support.submission import until
from tests.support.sweeps import curve_point, summed_up
from tests.support.wandb_server import Server, serving

KEY = "0123456789" * 4
DOCS = REPOSITORY / "docs/wandb.md"
ENVIRONMENT = {"git_commit": "0df10b5", "packages": {"torch": "2.8"}}
QUICK = {
    "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.1",
    "WANDB__FILE_STREAM_RETRY_WAIT_MIN_SECONDS": "0.1",
    "WANDB__FILE_STREAM_RETRY_WAIT_MAX_SECONDS": "0.2",
    "WANDB__FILE_STREAM_TIMEOUT_SECONDS": "1",
    "WANDB__GRAPHQL_TIMEOUT_SECONDS": "2",
    "WANDB__GRAPHQL_RETRY_WAIT_MIN_SECONDS": "0.1",
    "WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS": "0.2",
}
"""Short timeouts of wandb."""


@pytest.fixture(autouse=True)
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_TAGS", *VARIABLES.values()):
        monkeypatch.delenv(name, raising=False)
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracking._said_offline.clear()
    wandb.teardown()  # wandb reads the environment once per process
    yield
    wandb_run.cut_off()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A W&B server, with a login."""
    with serving() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return run_in(tmp_path)


def run_in(home: Path, *overrides: str) -> RunFolder:
    return frozen(home, "tracking=wandb", "tracking.finish_timeout_s=60", *overrides)


def begin(folder: RunFolder) -> Tracker:
    return Tracker(load(folder.config.read_text()), folder, ENVIRONMENT)


def attempt(
    folder: RunFolder, points: int, summary: Summary | None, *, will_resume: bool = False
) -> Tracker:
    """Track the first `points` of the curve, and end the W&B run."""
    tracker = begin(folder)
    tracker.show(points)
    tracker.finish(summary, will_resume=will_resume)
    return tracker


def view_of(folder: RunFolder) -> WandbView:
    return WandbView(folder, load(folder.config.read_text()))


def measured(step: int, seconds: float = 1.0) -> CurvePoint:
    """A point of the curve; its CE falls with the step, and rises at the last point."""
    student_ce = 3 - step / 1000 if step < 150 else 2.975
    per_sae = {"model.layers.3": {"fvu": 0.1, "l0": 4.0}}
    return dataclasses.replace(
        curve_point(step), student_ce=student_ce, per_sae=per_sae, train_seconds=seconds * step / 3
    )


def measure(folder: RunFolder, *steps: int, keep: int = 0, seconds: float = 1.0) -> None:
    """Append points to the curve, like an attempt that resumes from a checkpoint with `keep` points."""
    folder.cut_curve(keep)
    for step in steps:
        folder.append_point(measured(step, seconds))


def finish(folder: RunFolder) -> Summary:
    summed_up(folder, environment=ENVIRONMENT)
    return Summary(**folder.read_summary())


def save(folder: RunFolder, step: int, points: int) -> None:
    """Write a checkpoint with this number of points."""
    state = checkpoint.Snapshot({"adapter": torch.zeros(2)}, {"step": step, "points": points})
    checkpoint.save(folder.checkpoints, identity(load(folder.config.read_text())), state)


def expected_rows(folder: RunFolder) -> list[dict[str, object]]:
    """The rows that W&B must have: each line of the curve at its step, without nulls."""
    lines = [json.loads(line) for line in folder.curve.read_text().splitlines()]
    rows = [{key: value for key, value in line.items() if value is not None} for line in lines]
    return [{"_step": row["step"]} | row for row in rows]


class TestView:
    def test_layer_width_and_l0_are_those_of_the_resolved_sae(self, tmp_path: Path) -> None:
        single = view_of(run_in(tmp_path, "sae.width=1k", "sae.l0=5", "lora.rank=2"))
        assert single.values["sae"]["width"] == 1024
        assert single.values["sae"]["l0"] == 4.0
        assert single.values["layer"]["index"] == 3
        assert single.values["lora"]["rank"] == 2
        tags = ["model:tiny", "method:lora", "layer:3", "width:1024", "l0:4", "rank:2"]
        assert single.tags == tags
        several = view_of(run_in(tmp_path, "layer.index=[1,2]"))
        assert several.values["layer"]["index"] == [1, 2]
        assert several.values["sae"]["width"] == 1024
        assert "layer:1+2" in several.tags
        assert several.values["layer"]["hook"] == "resid_post"
        inside = view_of(run_in(tmp_path, "sae=identity", "layer.hook=mlp_out", "sweep=inside"))
        assert inside.values["layer"]["hook"] == "mlp_out"
        assert {"layer:3", "hook:mlp_out"} <= set(inside.tags)

    def test_curves_include_all_documented_measures(self) -> None:
        documented = (
            "base_ce spliced_ce student_ce ce_gap gap_closed kl top1_agreement fvu l0 lr grad_norm "
            "tokens_per_second peak_memory_gb"
        )
        assert set(documented.split()) <= set(CURVES)

    def test_only_a_failure_changes_the_id(self, folder: RunFolder) -> None:
        first = view_of(folder).id
        measure(folder, 0)
        folder.set_aside(curve=True)  # killed before its first checkpoint
        assert list(folder.path.glob("unfinished-*"))
        assert view_of(folder).id == first
        folder.write_failure("why", "the whole story")
        assert view_of(folder).id == first
        folder.clear_failure()
        assert view_of(folder).id == f"{first}-2"


class TestVariables:
    """W&B's own variables are heard where the config is silent, and saved with the run."""

    @pytest.fixture(autouse=True)
    def variables(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("PROJECT", "ENTITY", "NAME", "NOTES"):
            monkeypatch.setenv(f"WANDB_{name}", f"my {name.lower()}")
        monkeypatch.setenv("WANDB_TAGS", "paper, ,draft")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))

    def test_they_apply_where_the_config_is_silent(self, tmp_path: Path, server: Server) -> None:
        folder = run_in(tmp_path)
        measure(folder, 0)
        attempt(folder, 1, None)
        (run,) = server.runs.values()
        assert run.values["project"] == "my project"
        assert run.config["tracking"]["entity"] == "my entity"
        assert run.values["displayName"] == "my name" and run.values["notes"] == "my notes"
        assert run.values["tags"][-2:] == ["paper", "draft"]
        assert run.values["groupName"] == "main"  # the sweep
        assert (tmp_path / "elsewhere/wandb").is_dir() and not (folder.path / "wandb").exists()

    def test_the_config_wins(self, tmp_path: Path) -> None:
        keys = ("project", "entity", "name", "notes", "dir")
        folder = run_in(tmp_path, *(f"tracking.{key}=mine" for key in keys), "tracking.tags=[own]")
        config = load(folder.config.read_text()).tracking
        assert [getattr(config, key) for key in keys] == ["mine"] * 5 and config.tags == ["own"]

    def test_a_mode_that_wandb_lacks_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WANDB_MODE", "offlne")
        with pytest.raises(
            UserError, match=r"WANDB_MODE = 'offlne'[^$]*nearest valid: WANDB_MODE=offline"
        ):
            run_in(tmp_path)
        run_in(tmp_path, "tracking.mode=online")  # the config wins
        for mode in WANDB_MODES:
            monkeypatch.setenv("WANDB_MODE", mode)
            run_in(tmp_path)

    def test_a_name_that_wandb_refuses_is_refused_with_its_variable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WANDB_PROJECT", "mine/ranks")
        with pytest.raises(UserError, match=r"tracking\.project = 'mine/ranks'[^$]*WANDB_PROJECT"):
            run_in(tmp_path)

    @pytest.mark.parametrize("name", [*VARIABLES.values(), "WANDB_TAGS"])
    def test_a_value_that_a_config_cannot_hold_is_refused_with_its_variable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setenv(name, "a ${b")
        with pytest.raises(UserError, match=rf"^{name} = 'a \${{b' cannot be used: in a config"):
            run_in(tmp_path)
        monkeypatch.setenv(name, "a\nb")
        if name == "WANDB_NOTES":
            assert load(run_in(tmp_path).config.read_text()).tracking.notes == "a\nb"
        else:
            with pytest.raises(UserError, match=rf"^{name} = 'a\\nb' cannot be used"):
                run_in(tmp_path)

    def test_a_secret_in_a_variable_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WANDB_NOTES", f"see hf_{KEY}")
        with pytest.raises(UserError, match=r"tracking\.notes"):
            run_in(tmp_path)


def test_what_varies_comes_first_in_the_names_of_a_sweep(tmp_path: Path) -> None:
    point = points_in(tmp_path)
    runs = plan([point(f"train.lr={lr}", "tracking.name=mine") for lr in (1e-3, 2e-3)]).runs
    assert [run.config.tracking.name for run in runs] == ["lr=0.001 mine", "lr=0.002 mine"]
    runs = plan([point(f"lora.rank={rank}") for rank in (1, 2)]).runs
    names = [WandbView(run.folder, run.config).name for run in runs]
    assert [name.split(" tiny-")[0] for name in names] == ["rank=1", "rank=2"]
    (run,) = plan([point()]).runs
    assert run.config.tracking.name is None


def test_names_and_ids_are_within_the_limits_of_wandb(tmp_path: Path) -> None:
    views = [
        view_of(run_in(tmp_path, f"sweep={'s' * 200}{end}", f"tracking.name={'n' * 200}{end}", tags))
        for end, tags in (("a", f"tracking.tags=[{'t' * 90}a,{'t' * 90}b]"), ("b", "tracking.tags=[]"))
    ]
    for of_view in ("id", "name", "group"):
        texts = [getattr(view, of_view) for view in views]
        assert len(set(texts)) == 2 and all(len(text) <= 128 for text in texts)
    assert all(len(f"{view.id}-offline") <= 128 for view in views)
    assert len(set(views[0].tags)) == len(views[0].tags) and max(map(len, views[0].tags)) <= 64


@pytest.mark.slow
def test_wandb_agent_runs_the_trials_of_a_sweep(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command of docs/wandb.md. A trial that repeats a finished run shows its curve again."""
    (recipe,) = re.findall(r"```yaml\n(# sweep.yaml\n.*?)```", DOCS.read_text(), re.DOTALL)
    command = yaml.safe_load(recipe)["command"]
    assert command[:2] == ["${env}", "sae-lora"]
    small = [f"output_dir={tmp_path}/outputs", f"data.cache_dir={tmp_path}/cache", *SMALL]
    command[1:2] = [sys.executable, "-m", "sae_lora"]
    server.sweep = yaml.safe_dump({"command": [*command[:-1], *small, command[-1]]})
    server.trials = [{"lora.rank": 1}, {"lora.rank": 1}]
    for name in ("WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    agent = [sys.executable, "-m", "wandb", "agent", "me/my_project/s"]
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        agent, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    runs = {name: server.runs[name] for name in ("trial-2", "trial-1")}
    assert list(server.runs) == list(runs)
    assert [run.config["lora"]["rank"] for run in runs.values()] == [1, 1]
    assert [run.values["sweep"] for run in runs.values()] == ["s", "s"]
    first, repeated = (run.rows for run in runs.values())
    assert first == repeated and first[-1]["ce_gap"] == runs["trial-2"].summary["ce_gap"]
    assert len(list(tmp_path.glob("outputs/*/*/config.yaml"))) == 1


class TestOnline:
    def test_a_run_from_its_first_point_to_its_summary(
        self, folder: RunFolder, server: Server, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tracker = begin(folder)
        measure(folder, 0, 50, 100, 150)
        for points in (1, 3, 4):
            tracker.show(points)
        view = view_of(folder)
        summary = finish(folder)
        tracker.finish(summary, will_resume=False)
        run = server.runs[view.id]
        assert run.rows == expected_rows(folder)
        assert run.exit_code == 0
        assert run.summary["student_ce"] == {"min": 2.9, "last": 2.975}
        assert run.summary["result"]["gap_closed"] == 0.5
        assert run.config == json.loads(json.dumps(view.values)) | {"environment": ENVIRONMENT}
        assert run.values["displayName"] == view.name
        assert run.values["groupName"] == "main"
        assert run.values["jobType"] == "lora"
        assert run.values["tags"] == view.tags
        assert tracker.place == f"{server.address}/me/sae_lora/runs/{view.id}"
        assert capsys.readouterr().out == f"W&B shows {view.name} at {tracker.place}\n"

    def test_a_stopped_run_resumes_in_the_same_wandb_run(
        self, folder: RunFolder, server: Server
    ) -> None:
        measure(folder, 0, 50, 100)
        attempt(folder, 2, None, will_resume=True)  # the third point is in no checkpoint
        (run,) = server.runs.values()
        assert run.rows == expected_rows(folder)[:2]
        tracker = begin(folder)
        tracker.show(3)
        measure(folder, 150, keep=3)
        tracker.show(4)
        tracker.finish(finish(folder), will_resume=False)
        assert list(server.runs.values()) == [run]
        assert run.rows == expected_rows(folder)
        assert run.exit_code == 0
        assert run.summary["student_ce"] == {"min": 2.9, "last": 2.975}

    def test_a_run_that_others_have_left_behind_is_no_failure(
        self, folder: RunFolder, server: Server
    ) -> None:
        """It says where it stopped, and goes on in the same W&B run."""
        measure(folder, 0, 50)
        tracker = begin(folder)
        tracker.show(None)
        folder.write_stop("stopped at 50 tokens, rank 3 of 4 by gap after", outranked=True)
        tracker.finish(None, will_resume=False)
        (run,) = server.runs.values()
        assert run.exit_code == 0 and "result" not in run.summary
        assert run.summary["outranked"] == "stopped at 50 tokens, rank 3 of 4 by gap after"
        folder.clear_failure()
        tracker = begin(folder)
        measure(folder, 100, keep=2)
        tracker.show(None)
        tracker.finish(finish(folder), will_resume=False)
        assert list(server.runs.values()) == [run] and run.rows == expected_rows(folder)
        assert run.summary.get("outranked") is None and "result" in run.summary

    def test_a_failed_attempt_keeps_its_rows_and_the_next_gets_a_new_id(
        self, folder: RunFolder, server: Server
    ) -> None:
        measure(folder, 0, 50, 100)
        failed_id = view_of(folder).id
        attempt(folder, 3, None)
        failed = expected_rows(folder)
        folder.write_failure("why", "the whole story")
        folder.clear_failure()
        measure(folder, 100, 150, keep=2, seconds=2.0)  # from an earlier checkpoint
        attempt(folder, 4, finish(folder))
        assert server.rows(failed_id) == failed
        assert server.runs[failed_id].exit_code == 1
        assert server.rows(view_of(folder).id) == expected_rows(folder) != failed

    @pytest.mark.parametrize("state", ["dropping", "busy", "hanging"])
    def test_an_outage_loses_nothing(self, folder: RunFolder, server: Server, state: str) -> None:
        measure(folder, 0, 50, 100, 150)
        attempt(folder, 2, None, will_resume=True)
        tracker = begin(folder)
        assert tracker.place is not None
        server.become(state)
        tracker.show(4)
        count = len(server.said)
        ending = threading.Thread(
            target=tracker.finish, args=[finish(folder)], kwargs={"will_resume": False}
        )
        ending.start()
        until(lambda: len(server.said) > count, "a request of the run's end", limit_s=20)
        assert len(server.rows(view_of(folder).id)) == 2
        server.become("up")
        ending.join()
        assert server.rows(view_of(folder).id) == expected_rows(folder)
        assert server.runs[view_of(folder).id].exit_code == 0

    def test_several_runs_at_the_same_time(self, tmp_path: Path, server: Server) -> None:
        folders = [run_in(tmp_path, f"lora.rank={rank}") for rank in (1, 2, 4)]
        trackers = [begin(folder) for folder in folders]
        for number, (folder, tracker) in enumerate(zip(folders, trackers, strict=True), 1):
            measure(folder, *(50 * number * at for at in range(3)))
            tracker.show(3)
        for folder, tracker in zip(folders, trackers, strict=True):
            tracker.finish(finish(folder), will_resume=False)
        assert len(server.runs) == 3
        for folder in folders:
            assert server.rows(view_of(folder).id) == expected_rows(folder)

    def test_no_secret_is_sent(
        self, folder: RunFolder, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        secret = "correct horse battery"
        monkeypatch.setenv("MY_SERVICE_TOKEN", secret)
        monkeypatch.setattr(sys, "argv", [*sys.argv, f"--password={secret}"])
        environment = ENVIRONMENT | {"host": f"at {secret}"}
        tracker = Tracker(load(folder.config.read_text()), folder, environment)
        measure(folder, 0)
        tracker.show(1)
        tracker.finish(finish(folder), will_resume=False)
        assert server.runs
        texts = [*server.said, *(path.read_text(errors="replace") for path in files_of(folder))]
        assert any("at ***" in text for text in texts)
        assert not [text for text in texts if secret in text or KEY in text]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Log messages of this package, without those of wandb."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("sae_lora")]


def files_of(folder: RunFolder) -> list[Path]:
    return [path for path in folder.path.rglob("*") if path.is_file()]


class TestErrors:
    def test_not_logged_in_is_offline_with_one_line(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for rank in (1, 2):
            folder = run_in(tmp_path, f"lora.rank={rank}")
            measure(folder, 0, 50)
            tracker = attempt(folder, 2, None)
            assert tracker.place is not None
            assert Path(tracker.place).is_relative_to(folder.path)
            assert list(Path(tracker.place).glob("*.wandb"))
        assert messages(caplog) == ["not logged in to W&B (`wandb login`): tracking offline"]

    @pytest.mark.parametrize("state", ["dropping", "busy", "hanging"])
    def test_a_server_that_does_not_answer(
        self,
        folder: RunFolder,
        server: Server,
        state: str,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(wandb_run, "_PROBE_TIMEOUT_S", 1)
        server.become(state)
        measure(folder, 0)
        tracker = attempt(folder, 1, finish(folder))
        assert tracker.place is not None
        assert Path(tracker.place).is_relative_to(folder.path)
        assert messages(caplog) == ["the W&B server does not answer: tracking offline"]

    def test_a_server_that_hangs_after_the_probe(
        self,
        folder: RunFolder,
        server: Server,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(wandb_run, "_answers", lambda url: True)
        monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_S", 1)
        server.become("hanging")
        tracker = begin(folder)
        assert tracker.place is not None
        assert Path(tracker.place).is_relative_to(folder.path)
        tracker.finish(finish(folder), will_resume=False)
        (message,) = messages(caplog)
        assert message.endswith("tracking offline")

    def test_training_does_not_wait_for_wandb(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """wandb waits for training to continue; if training waited for wandb too, both would hang."""
        monkeypatch.setenv("WANDB_MODE", "offline")
        continued, init, results = threading.Event(), wandb.init, []

        def waiting(**settings: object) -> object:
            results.append(continued.wait(60))
            return init(**settings)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(wandb, "init", waiting)
        tracker = begin(folder)
        measure(folder, 0)
        tracker.show(1)
        continued.set()
        tracker.finish(None, will_resume=True)
        assert results == [True]

    def test_an_error_of_wandb_does_not_stop_the_run(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(**_: object) -> None:
            raise OSError("no space left for hf_a1B2c3D4e5F6g7H8i9J0")

        monkeypatch.setattr(wandb, "init", broken)
        monkeypatch.setenv("WANDB_MODE", "offline")
        assert attempt(folder, 1, None).place is None
        assert messages(caplog) == ["W&B is off for this run: no space left for ***"]

    def test_disabled_tracking_is_silent(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = run_in(tmp_path, "tracking.mode=disabled")
        files = files_of(folder)
        assert attempt(folder, 1, None).place is None
        assert files_of(folder) == files
        assert messages(caplog) == []

    def test_wandb_mode_applies_if_the_config_says_auto(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WANDB_MODE", "disabled")
        assert begin(run_in(tmp_path)).place is None
        offline = begin(run_in(tmp_path, "tracking.mode=offline"))
        assert offline.place is not None
        offline.finish(None, will_resume=False)

    def test_the_file_of_wandb_login_is_read(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        settings = wandb.Settings(base_url="http://wandb.example:8080")
        assert not wandb_run.is_logged_in(settings)
        (tmp_path / "netrc").write_text(f"machine wandb.example\n  login user\n  password {KEY}\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        assert wandb_run.is_logged_in(settings)
        assert not wandb_run.is_logged_in(wandb.Settings(base_url="http://other.example"))

    def test_an_end_that_hangs_is_cut_off_and_can_be_uploaded_later(
        self, tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = run_in(tmp_path, "tracking.finish_timeout_s=1")
        measure(folder, 0, 50, 100)
        tracker = begin(folder)
        assert tracker.place is not None
        server.become("hanging")
        tracker.show(3)
        tracker.finish(finish(folder), will_resume=False)
        (message,) = messages(caplog)
        assert message.startswith("W&B did not finish in 1 s; `sae-lora sync ")
        server.become("up")
        upload([folder])
        assert server.rows(view_of(folder).id) == expected_rows(folder)

    @pytest.mark.slow
    def test_the_process_ends_although_the_server_hangs(self, tmp_path: Path, server: Server) -> None:
        folder = run_in(tmp_path, "tracking.finish_timeout_s=1")
        measure(folder, 0)
        code = (
            "import sys; from pathlib import Path; from sae_lora.tracking.tracker import Tracker;"
            "from sae_lora.config.serialize import load; from sae_lora.records.folder import RunFolder;"
            "folder = RunFolder(Path(sys.argv[1]));"
            "tracker = Tracker(load(folder.config.read_text()), folder, {});"
            "print(tracker.place, flush=True); input(); tracker.show(1);"
            "tracker.finish(None, will_resume=False); print('ended', flush=True)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, folder.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        started = [process.stdout.readline(), process.stdout.readline()]
        assert started[1].startswith(server.address), started
        server.become("hanging")
        out, _ = process.communicate("\n", timeout=60)
        assert out == "ended\n"
        assert process.returncode == 0


class TestSync:
    @pytest.mark.parametrize("mode", ["offline", "disabled"])
    def test_untracked_runs_can_be_uploaded_twice(
        self, tmp_path: Path, server: Server, mode: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = run_in(tmp_path, f"tracking.mode={mode}")
        measure(folder, 0, 50, 100)
        attempt(folder, 3, finish(folder))
        assert not server.runs
        for old, new in ((0, 3), (3, 0)):
            assert main(["sync", str(folder.path.parent)]) == 0
            (line,) = [line for line in capsys.readouterr().out.splitlines() if "tiny" in line]
            address = f"{server.address}/me/sae_lora/runs/{view_of(folder).id}"
            assert [cell.strip() for cell in line.strip("│").split("│")][1:] == [
                str(old),
                str(new),
                address,
            ]
            run = server.runs[view_of(folder).id]
            assert run.rows == expected_rows(folder)
            assert run.exit_code == 0
            assert run.summary["result"]["gap_closed"] == 0.5
            assert run.config["environment"] == ENVIRONMENT

    def test_later_evaluations_are_uploaded_beside_the_result(
        self, folder: RunFolder, server: Server
    ) -> None:
        measure(folder, 0, 50)
        finish(folder)
        upload([folder])
        run = server.runs[view_of(folder).id]
        assert "evaluation" not in run.summary
        results = {"distance": {"student": {"l2": [{"value": 2.0}]}}, "shortened": None}
        suite_records.write(folder, suite_records.Record("mechanism", {}, results, {}, seconds=1.0))
        upload([folder])
        assert run.summary["evaluation"] == {"mechanism/L2 at the end": 2.0}

    def test_of_an_unfinished_run_only_checkpointed_points_are_uploaded(
        self, folder: RunFolder, server: Server
    ) -> None:
        measure(folder, 0, 50, 100)
        save(folder, step=60, points=2)
        upload([folder])
        run = server.runs[view_of(folder).id]
        assert run.rows == expected_rows(folder)[:2]
        measure(folder, 100, 150, keep=2, seconds=2.0)
        finish(folder)
        upload([folder])
        assert run.rows == expected_rows(folder)

    def test_a_failed_run_is_failed_in_wandb(self, folder: RunFolder, server: Server) -> None:
        measure(folder, 0, 50)
        folder.write_failure("why", "the whole story")
        upload([folder])
        run = server.runs[view_of(folder).id]
        assert run.rows == expected_rows(folder)
        assert run.exit_code == 1
        assert "result" not in run.summary

    def test_a_run_that_a_process_holds_is_skipped(
        self, folder: RunFolder, server: Server, capsys: pytest.CaptureFixture[str]
    ) -> None:
        measure(folder, 0)
        save(folder, step=10, points=1)
        with held(folder.path):
            upload([folder])
        assert not server.runs
        assert f"skipped: {folder.path.name} is being run by process" in capsys.readouterr().err

    def test_nobody_is_logged_in(self, folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["sync", str(folder.path.parent)]) == 1
        assert capsys.readouterr().err.startswith("error: cannot upload: not logged in")

    def test_the_server_does_not_answer(self, folder: RunFolder, server: Server) -> None:
        server.become("busy")
        with pytest.raises(UserError, match="does not answer"):
            upload([folder])


SMALL = (
    "train.train_tokens=1536 train.batch_size=1 train.eval_every_tokens=512 "
    "train.checkpoint_every_steps=3 data.validation_tokens=1024 lora.rank=2"
).split()


def _attempt(folder: Path, environment: dict[str, str], kill_at: int) -> None:
    """Run with tracking until this step."""
    os.environ.clear()
    os.environ.update(environment)

    def open_tracker(*arguments: Any) -> Tracker:  # a short training would end before wandb starts
        tracker = Tracker(*arguments)
        assert tracker.place.startswith("http")
        return tracker

    active_run.Tracker = open_tracker
    run_with_fault([folder], kill_at, str(signal.SIGKILL.value), None, [])


@pytest.mark.slow
def test_a_killed_run_resumes_and_its_rows_are_those_of_the_curve(
    tmp_path: Path, server: Server
) -> None:
    """It is killed after a point that is in no checkpoint, and measures this point again."""
    folder = run_in(tmp_path, *SMALL)
    run_id = view_of(folder).id

    def run_until(kill_at: int) -> ForkServerProcess:
        process = FORKS.Process(target=_attempt, args=(folder.path, dict(os.environ), kill_at))
        process.start()
        process.join(300)
        return process

    killed = run_until(9)
    first = expected_rows(folder)
    finished = run_until(10**9)
    final = expected_rows(folder)
    for process in psutil.process_iter(["name", "cmdline"]):  # the service outlives the killed process
        if process.info["name"] == "wandb-core" and str(killed.pid) in (process.info["cmdline"] or ()):
            process.kill()
    assert (killed.exitcode, finished.exitcode) == (-9, 0)
    assert server.rows(run_id) == final
    assert server.runs[run_id].exit_code == 0
    assert len(first) == 3
    assert len(final) == 4
    assert final[:2] == first[:2]
    assert final[2]["train_seconds"] != first[2]["train_seconds"]
    assert list(server.runs) == [run_id]
    packages = server.runs[run_id].config["environment"]["packages"]
    assert packages["wandb"] == wandb.__version__
