"""The measurement on a GPU, rehearsed with small shapes on this machine."""

import json
from pathlib import Path

import pytest

from scripts import gpu_session


@pytest.mark.slow
def test_every_row_of_steps_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu_session", str(to), "--tiny", "--parts", "steps"])
    gpu_session.main()
    record = json.loads(to.read_text())
    assert record["errors"] == {}
    assert [row["what"] for row in record["steps"]] == ["here"] * 5 + ["published loop"] * 2
    for row in record["steps"]:
        runs = len(row["ranks"]) * row["saes"]
        assert 0 < row["ms_least"] <= row["ms"] <= row["ms_most"]
        assert row["ms_per_run"] == pytest.approx(row["ms"] / runs)


def test_a_row_that_fails_is_recorded_and_the_next_is_measured(tmp_path: Path) -> None:
    session = gpu_session.Session(tiny=True, to=tmp_path / "gpu.json")

    def failing() -> None:
        raise RuntimeError("too large")

    session._change("first", failing)
    session._change("second", lambda: None)
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["errors"] == {"first": "RuntimeError: too large"}
    assert [row["what"] for row in record["changes"]] == ["second"]
