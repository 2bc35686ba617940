"""Damaged run folders: each kind is found, no command dies of it, and none counts such a run as done."""

import json
from pathlib import Path

import pytest

import sae_lora
from sae_lora.cli import main
from sae_lora.common.errors import UserError
from sae_lora.config.enums import Suite
from sae_lora.evaluation import suite_records
from sae_lora.evaluation.headlines import headlines
from sae_lora.evaluation.lora import similarity_results
from sae_lora.evaluation.lora.similarity_results import Grid, Pair
from sae_lora.evaluation.suite_records import Record
from sae_lora.launcher.launch import launch
from sae_lora.launcher.plan import plan
from sae_lora.records.damage import damage, damage_of_weights, weights_of
from sae_lora.records.folder import RunFolder, runs_of
from sae_lora.records.status import State, read_statuses, with_weights
from tests.support.damage import DAMAGE
from tests.support.points import Point
from tests.support.sweeps import MadeUp, curve_point, summed_up


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_is_found(kind: str, tmp_path: Path) -> None:
    folder = MadeUp(tmp_path).finished()
    assert damage(folder) is None
    harm, cause = DAMAGE[kind]
    harm(folder)
    (status,) = read_statuses([folder])
    assert status.state is State.damaged
    assert status.note is not None and cause in status.note
    with pytest.raises(UserError, match="it is damaged"):
        _ = sae_lora.load_sweep(folder.path)[0].summary


@pytest.mark.parametrize("kind", DAMAGE)
def test_commands_show_a_damaged_run_and_go_on_with_the_others(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = MadeUp(tmp_path / "ranks")
    sweep.grid(ranks=(1, 4, 16), blocks=(3,))
    damaged = sweep.home / "tiny-l3-l0_4-r16-s0"
    harm, cause = DAMAGE[kind]
    harm(RunFolder(damaged))
    home = str(sweep.home)
    for command in (
        ["status", home],
        ["table", home],
        ["report", home, "--no-pictures"],
        ["compare", "methods", home],
        ["compare", "recipes", home, home],
    ):
        assert main(command) == 1, command
        printed = capsys.readouterr()
        shown = printed.out + printed.err
        assert "damaged" in shown, command
        if command[0] != "status":
            assert f"{damaged}: " in shown.replace("\n", "") and cause in shown, command
        if command[0] == "status":
            assert "2 done, 1 damaged" in printed.out
        if command[0] == "table":
            assert printed.out.count("%") == 2  # the gap closed by the others
    runs = {run["run"]: run for run in sae_lora.load_sweep(home).frame().to_dict("records")}
    assert [run["state"] for run in runs.values()].count("done") == 2
    assert runs[damaged.name]["state"] == "damaged"
    for command in (
        ["logs", str(damaged)],
        ["export", str(damaged), "--to", str(tmp_path / "export")],
        ["table", str(damaged)],
        ["evaluate", str(damaged)],
        ["report", str(damaged)],
    ):
        assert main(command) == 1, command
        assert "damaged" in capsys.readouterr().err, command
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_launch_neither_trusts_nor_overwrites_a_damaged_run(
    kind: str, point: Point, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finished in a pack with a run that stays as it is; nothing is left to do."""
    points = [point("lora.rank=16"), point("lora.rank=4")]
    for run in plan(points).runs:
        run.freeze()
        for step in range(0, 500, 100):
            run.folder.append_point(curve_point(step))
        summed_up(run.folder)
    assert launch(points) == 0
    first, _ = plan(points).runs
    harm, cause = DAMAGE[kind]
    harm(first.folder)
    files = {path: path.read_bytes() for path in first.folder.path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert launch(points) == 1
    printed = capsys.readouterr()
    assert "1 of 2 already done" in printed.out
    assert cause in printed.err and "move the folder away" in printed.err
    assert files == {path: path.read_bytes() for path in files}


def test_weights_of_another_run_are_found_where_they_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have the same size and rank: only the digest in the summary tells them from the run's own."""
    folder = MadeUp(tmp_path / "sweep").finished()
    summed_up(folder, weights=weights_of(folder))
    assert with_weights(folder.path).path == folder.path
    weights = folder.adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert damage(folder) is None
    cause = "adapter/adapter_model.safetensors has changed since the run wrote it"
    for command in (
        ["export", str(folder.path), "--to", str(tmp_path / "export")],
        ["evaluate", str(folder.path), "--suite", "core"],
        ["launch", f"init={folder.path}", "launcher.dry_run=true", f"output_dir={tmp_path}"],
    ):
        assert main(command) == 1, command
        assert cause in capsys.readouterr().err.replace("\n", " "), command
    with pytest.raises(UserError, match=cause):
        sae_lora.load_adapted(folder.path)


def test_weights_after_a_share_of_the_training_are_checked_where_they_are_used(tmp_path: Path) -> None:
    """They may be deleted to save room; then only `init_at` lacks them."""
    folder = MadeUp(tmp_path / "sweep").finished()
    half = folder.sae_at / "0.5/blocks.3.hook_resid_post/sae_weights.safetensors"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    summed_up(folder, weights=weights_of(folder))
    assert damage_of_weights(folder) is damage_of_weights(folder, 0.5) is None
    half.write_bytes(b"flah")
    name = half.relative_to(folder.path).as_posix()
    assert damage_of_weights(folder, 0.5) == f"{name} has changed since the run wrote it"
    half.unlink()
    assert damage_of_weights(folder, 0.5) == f"{name} is missing"
    assert damage_of_weights(folder) is damage(folder) is None


INTERVAL = {"value": 0.25, "low": 0.125, "high": 0.5}
CORE = {
    "harm": INTERVAL,
    "recovered": {"zero": {"student": INTERVAL}},
    "distance": {"student": {"reverse_kl": INTERVAL}},
    "loss_change": {},
    "ce_by_position": {},
    "saes": {"a": {"after": {"cosine": 0.9, "dead": 0.1}}},
}
RECORDS = {
    "half a file": (lambda text: text[:-20], "core.json is damaged: "),
    "another run": (lambda text: text.replace('"run": "', '"run": "0'), "core.json is of another run"),
    "another suite": (lambda text: text.replace('"core"', '"lora"'), "core.json is of another suite"),
    "newer": (lambda text: text.replace('"version": 1', '"version": 2'), "core.json is of version 2"),
    "another number": (lambda text: text.replace("0.125", "0.0625"), "core.json has changed since"),
    "no results": (lambda text: text.replace('"harm"', '"charm"'), "core.json has changed since"),
    "list": (lambda _: "[]", "core.json is damaged: "),
    "nested": (lambda _: "[" * 100_000, "core.json is damaged: "),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_results_of_a_suite_that_cannot_be_used_are_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = MadeUp(tmp_path / "ranks")
    sweep.grid(ranks=(1, 4), blocks=(3,))
    first, second = runs_of(sweep.home)
    for folder in (first, second):
        suite_records.write(folder, Record("core", {}, CORE, {}, 1.0))
    assert main(["table", str(sweep.home), "--columns", "rank,core/harm"]) == 0
    file = first.evaluation / "core.json"
    harm, cause = RECORDS[kind]
    changed = harm(json.dumps(json.loads(file.read_text())))
    assert changed != file.read_text()
    file.write_text(changed)
    capsys.readouterr()
    for command in (["table", str(sweep.home)], ["report", str(sweep.home), "--no-pictures"]):
        assert main(command) == 1, command
        shown = capsys.readouterr().err.replace("\n", " ")
        assert f"{first.path}: evaluation/{cause}" in shown and str(second.path) not in shown, command
    assert suite_records.missing(first, [Suite.core], {}) == [Suite.core]
    assert list(headlines(first)) == [] and headlines(second)["core/harm"] == 0.25


SIMILARITY = {
    "a list": (lambda _: "[]", "is damaged: "),
    "half a file": (lambda text: text[:-20], "is damaged: "),
    "newer": (lambda text: text.replace('"version": 1', '"version": 2'), "is of version 2"),
    "another number": (lambda text: text.replace("0.5", "0.25"), "has changed since it was written"),
    "no pairs": (lambda text: text.replace('"pairs"', '"pears"'), "is damaged: it lacks 'pairs'"),
    "older": (lambda _: '{"version": 1, "pairs": [{"first": "a"}]}', "has changed since"),
}


@pytest.mark.parametrize("kind", SIMILARITY)
def test_similarities_that_cannot_be_used_are_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = MadeUp(tmp_path / "ranks")
    sweep.grid(ranks=(1, 4), blocks=(3,))
    grid: Grid = {"similarity": [[0.5]], "expected": [[0.125]]}
    first, second = (folder.path.name for folder in runs_of(sweep.home))
    pair = Pair(
        first=first,
        second=second,
        matrices=1,
        first_sizes=[1],
        second_sizes=[1],
        of_all=grid,
        of_kinds={"q_proj": grid},
    )
    similarity_results.write(sweep.home, [pair])
    assert similarity_results.read(sweep.home) == [pair]
    assert main(["report", str(sweep.home), "--no-pictures"]) == 0
    harm, cause = SIMILARITY[kind]
    file = similarity_results.path_in(sweep.home)
    file.write_text(harm(file.read_text()))
    capsys.readouterr()
    for command in (["table", str(sweep.home)], ["report", str(sweep.home), "--no-pictures"]):
        assert main(command) == 1, command
        assert f"{file} {cause}" in capsys.readouterr().err.replace("\n", " "), command


def test_a_changed_folder_is_looked_at_again(tmp_path: Path) -> None:
    folder = MadeUp(tmp_path).finished()
    text = folder.config.read_text()
    for _ in range(2):
        folder.config.write_text(text.replace("rank: 16", "rank: 17"))
        assert damage(folder) is not None
        folder.config.write_text(text)
        assert damage(folder) is None
