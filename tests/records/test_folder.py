"""The run folder: files are complete or absent, results are kept, and a crash leaves it readable."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from sae_lora.common.errors import UserError
from sae_lora.common.files import new_folder, write_atomically
from sae_lora.records.folder import RunFolder, in_full
from sae_lora.records.metrics import METRICS
from sae_lora.records.schema import CurvePoint, Summary, gap_closed, rounding_error
from tests.support.sweeps import MadeUp, curve_point


def test_gap_closed() -> None:
    assert gap_closed(2.0, 3.0, 2.25, 0) == pytest.approx(0.75)
    assert gap_closed(2.0, 3.0, 3.0, 0) == 0
    assert gap_closed(2.0, 3.0, 3.5, 0) == pytest.approx(-0.5)
    assert gap_closed(2.0, 2.0, 2.0, 0) is None
    assert gap_closed(2.0, 1.9, 2.0, 0) is None


@pytest.mark.parametrize(("relative", "tokens"), [(2**-24, 1024), (2**-8, 32_768)])
def test_a_gap_that_rounding_explains_has_no_closed_share(relative: float, tokens: int) -> None:
    """In float32 and in bfloat16, with the default number of held-out tokens."""
    rounding = rounding_error(relative, tokens)
    assert gap_closed(3.0, 3.0 + 9e-16, 3.5, rounding) is None
    assert gap_closed(3.0, 3.0 + 0.9 * rounding, 3.5, rounding) is None
    assert gap_closed(3.0, 3.001, 3.0005, rounding) == pytest.approx(0.5)


def test_curve_round_trip_and_a_truncated_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_point(curve_point(0))
    folder.append_point(curve_point(1))
    assert folder.read_curve() == [curve_point(0), curve_point(1)]
    with folder.curve.open("a") as file:
        file.write('{"step": 2, "tok')
    assert folder.read_curve() == [curve_point(0), curve_point(1)]


def test_a_curve_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kl of the evaluation after 0 tokens is not finite"):
        RunFolder(tmp_path).append_point(dataclasses.replace(curve_point(0), kl=float("nan")))


def test_states(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "sweep" / "run")
    assert not folder.is_finished
    folder.write_config("a: 1\n")
    folder.write_config("a: 2\n")
    assert folder.config.read_text() == "a: 2\n"
    folder.write_failure("why", "the whole story")
    assert folder.has_failed
    folder.summary.write_text("{}")
    assert folder.is_finished
    assert not folder.has_failed


def test_results_of_unfinished_attempts_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for attempt in (1, 2):
        folder.append_point(curve_point(attempt))
        folder.set_aside(curve=True)
        assert not folder.curve.exists()
    curves = sorted(tmp_path.glob("unfinished-*/curve.jsonl"))
    assert [json.loads(path.read_text())["step"] for path in curves] == [1, 2]
    folder.set_aside(curve=True)
    assert len(list(tmp_path.glob("unfinished-*"))) == 2


def test_a_hash_stands_for_a_run_also_if_its_folder_was_renamed(tmp_path: Path) -> None:
    folder = MadeUp(tmp_path).finished()
    run_hash = folder.read_summary()["hash"]
    assert in_full(tmp_path / run_hash) == folder.path
    named = folder.path.rename(tmp_path / f"tiny-{run_hash}")
    assert in_full(tmp_path / run_hash) == named
    assert in_full(tmp_path / "01234567") == tmp_path / "01234567"


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "adapter") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "adapter") as temporary:
        (temporary / "whole").write_text("x")
    assert (tmp_path / "adapter" / "whole").read_text() == "x"


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir"):
        RunFolder(tmp_path / "file" / "sweep" / "run").write_config("a: 1\n")


def test_the_summary_keeps_its_promised_fields() -> None:
    names = {field.name for field in dataclasses.fields(Summary)}
    promised = (
        "base_ce spliced_ce student_ce initial_gap ce_gap gap_closed kl l0 fvu trainable_parameters "
        "train_tokens train_seconds model sae data environment version"
    )
    assert set(promised.split()) <= names


def test_every_measure_is_in_the_list_of_metrics() -> None:
    for schema in (CurvePoint, Summary):
        fields = dataclasses.fields(schema)
        measures = {field.name for field in fields if field.type in (float, float | None)}
        assert "kl" in measures
        assert measures <= METRICS.keys()
