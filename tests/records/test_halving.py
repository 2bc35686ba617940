"""The rule of successive halving: ranks at rungs, from the folders of the runs that compete."""

import dataclasses
from itertools import combinations
from pathlib import Path

import pytest

from sae_lora.cli import main
from sae_lora.records import halving
from sae_lora.records.damage import damage
from sae_lora.records.folder import RunFolder
from sae_lora.records.halving import Bracket, outranked, places, rank_of
from sae_lora.records.status import State, progress_of, read_statuses
from tests.support.sweeps import MadeUp, curve_point, summed_up

GAPS = {"a": 0.4, "b": 0.2, "c": 0.3, "d": 0.5}


def competitor(
    home: Path, name: str, *gaps: float, seed: int = 0, bracket: str = "one", **rule: object
) -> RunFolder:
    """A run of candidate `name` with an evaluation for each gap, after that before training."""
    folder = MadeUp(home).folder(seed=seed, lr=1e-4 * (ord(name) - 90))
    path = folder.path.rename(home / f"{name}-s{seed}")
    folder = RunFolder(path)
    folder.append_point(curve_point(0))
    for number, gap in enumerate(gaps, 1):
        folder.append_point(dataclasses.replace(curve_point(number), ce_gap=gap, top1_agreement=gap))
    values = {"rungs": [1], "keep": 0.5, "measure": "ce_gap"} | rule
    halving.write(folder, Bracket(bracket, name, **values))  # pyright: ignore[reportArgumentType]
    return folder


def test_the_best_half_goes_on(tmp_path: Path) -> None:
    folders = {name: competitor(tmp_path, name, gap) for name, gap in GAPS.items()}
    behind = outranked(list(folders.values()))
    assert {folder.path.name[0]: each.rank for folder, each in behind.items()} == {"a": 3, "d": 4}
    texts = {str(each) for each in behind.values()}
    assert texts == {f"stopped at 10 tokens, rank {rank} of 4 by gap after" for rank in (3, 4)}


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9])
def test_in_any_order_of_arrival_the_best_at_a_rung_goes_on(keep: float) -> None:
    for number in range(1, len(GAPS) + 1):
        for arrived in combinations(GAPS, number):
            values = {name: [GAPS[name]] for name in arrived}
            ranks = {name: rank_of(values, name, "ce_gap") for name in arrived}
            assert sorted(ranks.values()) == list(range(1, number + 1))
            best = min(arrived, key=GAPS.__getitem__)
            assert ranks[best] == 1 <= places(number, keep) <= number
            # A share of all that have arrived, rounded up.
            assert places(number, keep) - 1 < keep * number + 1e-6
            assert places(number, keep) >= keep * number - 1e-6


def test_a_higher_value_is_better_where_the_measure_says_so(tmp_path: Path) -> None:
    folders = [competitor(tmp_path, name, gap, measure="top1_agreement") for name, gap in GAPS.items()]
    assert {folder.path.name[0] for folder in outranked(folders)} == {"b", "c"}


def test_equal_values_share_a_rank() -> None:
    assert [rank_of({"a": [1], "b": [1], "c": [2]}, name, "kl") for name in "abc"] == [1, 1, 3]


def test_only_runs_of_the_same_bracket_that_reached_the_rung_compete(tmp_path: Path) -> None:
    worst = competitor(tmp_path, "d", 0.5)
    competitor(tmp_path, "a", 0.1, bracket="two")
    competitor(tmp_path, "b")  # has not reached the rung
    competitor(tmp_path, "c", 0.2).write_failure("diverged later", "")
    broken = competitor(tmp_path, "e", 0.2)
    broken.curve.write_text("nothing\n")
    assert not outranked([worst])
    halving.write(broken, Bracket("one", "e", [1], 0.5, "ce_gap"))
    broken.curve.unlink()
    for number, gap in enumerate((0.9, 0.2)):
        broken.append_point(dataclasses.replace(curve_point(number), ce_gap=gap))
    (standing,) = outranked([worst]).values()
    assert (standing.rank, standing.of) == (2, 2)


def test_the_last_rung_counts_until_the_next_one(tmp_path: Path) -> None:
    """Also with the values of runs that reached it later, so late ones stop early ones."""
    early = competitor(tmp_path, "d", 0.5, rungs=[1, 3])
    assert not outranked([early])
    early.append_point(dataclasses.replace(curve_point(2), ce_gap=0.1))
    late = competitor(tmp_path, "b", 0.2, rungs=[1, 3])
    assert not outranked([late])
    (standing,) = outranked([early, late]).values()
    assert str(standing) == "stopped at 20 tokens, rank 2 of 2 at 10 tokens by gap after"


def test_seeds_count_by_their_mean(tmp_path: Path) -> None:
    gaps = {("a", 0): 0.1, ("a", 1): 0.7, ("b", 0): 0.3, ("b", 1): 0.3}  # mean 0.4 and 0.3
    folders = [competitor(tmp_path, name, gap, seed=seed) for (name, seed), gap in gaps.items()]
    behind = outranked(folders)
    assert {folder.path.name for folder in behind} == {"a-s0", "a-s1"}
    assert {(each.rank, each.of) for each in behind.values()} == {(2, 2)}


def test_an_undefined_measure_stops_nothing(tmp_path: Path) -> None:
    folders = [competitor(tmp_path, name, gap, measure="gap_closed") for name, gap in GAPS.items()]
    for folder in folders:
        folder.curve.unlink()
        for number in range(2):
            folder.append_point(dataclasses.replace(curve_point(number), gap_closed=None))
    assert not outranked(folders)
    assert not outranked([])


def test_a_stopped_run_has_its_own_state_until_it_is_taken_up(tmp_path: Path) -> None:
    folder = MadeUp(tmp_path / "main").begun()
    folder.checkpoints.mkdir()
    folder.write_stop("stopped at 50,176 tokens, rank 3 of 8 by gap after", outranked=True)
    (status,) = read_statuses([folder])
    assert status.state is State.outranked and not status.is_to_do
    assert status.note == "stopped at 50,176 tokens, rank 3 of 8 by gap after"
    assert not folder.is_unsettled and folder.is_outranked
    assert progress_of(folder, status.state) is None
    folder.write_launch(tmp_path)  # of the launch that still trains others
    assert read_statuses([folder])[0].state is State.outranked
    folder.write_stop("on request")
    assert read_statuses([folder])[0].state is State.stopped and folder.is_unsettled
    folder.write_stop("rank 2 of 2", outranked=True)
    folder.clear_failure()
    assert read_statuses([folder])[0].state is State.resumable


def test_a_stopped_run_without_its_curve_is_damaged(tmp_path: Path) -> None:
    folder = MadeUp(tmp_path / "main").begun()
    folder.write_stop("stopped at 50,176 tokens, rank 3 of 8 by gap after", outranked=True)
    assert damage(folder) is None
    folder.curve.write_text("")
    assert damage(folder) == "curve.jsonl is empty"
    folder.curve.unlink()
    assert damage(folder) == "curve.jsonl is missing"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"bracket": 1}', '{"bracket": "a"}'])
def test_an_unreadable_bracket_is_damage(tmp_path: Path, text: str) -> None:
    folder = MadeUp(tmp_path / "main").begun()
    assert damage(folder) is None
    folder.halving.write_text(text)
    assert "halving.json" in str(damage(folder))


def test_what_was_stopped_is_in_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = MadeUp(tmp_path / "main")
    runs.finished(rank=1)
    runs.finished(rank=4)
    stopped = runs.begun(rank=16)
    stopped.write_stop("stopped at 50,176 tokens, rank 3 of 3 by gap after", outranked=True)
    assert main(["table", str(tmp_path / "main")]) == 0
    printed = capsys.readouterr().out
    assert "not in the table: 1 outranked" in printed
    assert "16" not in [cell.strip() for line in printed.splitlines() for cell in line.split("│")[1:2]]
    assert main(["status", str(tmp_path / "main")]) == 0
    printed = capsys.readouterr().out
    assert "stopped at 50,176 tokens, rank 3 of 3" in printed and "1 outranked" in printed
    summed_up(stopped)
    assert main(["table", str(tmp_path / "main")]) == 0
    assert "not in the table" not in capsys.readouterr().out
