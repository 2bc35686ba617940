"""Tables of finished runs show the factors in which the runs differ."""

from pathlib import Path

import pytest
import yaml

from sae_lora.common.console import duration, percent, show
from sae_lora.config.enums import Suite
from sae_lora.evaluation import suite_records
from sae_lora.evaluation.headlines import headlines
from sae_lora.evaluation.suite_records import Record
from sae_lora.records.factors import text
from sae_lora.records.folder import RunFolder
from sae_lora.report.results import comparison_table
from sae_lora.report.tables import evaluation_tables, run_table
from tests.support.sweeps import finished, summed_up


def test_the_table_has_a_column_per_varying_factor_and_the_rest_in_its_title(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [finished(tmp_path, f"run{rank}", rank, 3, rank / 10) for rank in (1, 4)]
    table = comparison_table([*folders, RunFolder(tmp_path / "unfinished")])
    headers = [str(column.header) for column in table.columns]
    assert headers[0] == "rank"
    assert "alpha" not in headers and "base CE" not in headers
    same = "model tiny, SAE at block 3, latents 1024, L0 8, base CE 1.000, spliced CE 1.000, gap before"
    assert table.title == f"{same} +1.000"
    assert table.row_count == 2
    show(table)
    printed = capsys.readouterr().out
    assert "gap closed" in printed and "40.0%" in printed and "40,960" in printed
    assert "…" not in printed


def test_one_run_and_runs_that_differ_in_several_ways(tmp_path: Path) -> None:
    first = finished(tmp_path, "one", 1, 3, None)
    assert comparison_table([first]).columns[0].header == "run"
    second = finished(tmp_path, "other", 4, 5, 0.5)
    headers = [str(column.header) for column in comparison_table([first, second]).columns]
    assert headers[:2] == ["SAE at block", "rank"]


def test_the_hook_is_a_column_if_runs_differ_in_it(tmp_path: Path) -> None:
    folders = [finished(tmp_path, f"run{block}", 4, block, 0.5) for block in (3, 5)]
    config = folders[1].read_config()
    (used,) = config["sae"]["used"]
    config["sae"]["used"] = [used, used | {"block": 6, "hook": "mlp_out"}]
    folders[1].config.write_text(yaml.safe_dump(config))
    summed_up(folders[1])
    columns = {str(column.header): list(column.cells) for column in comparison_table(folders).columns}
    assert columns["SAE at block"] == ["3", "5+6"]
    assert columns["hook"] == ["resid_post", "resid_post+mlp_out"]


def test_nothing_finished_is_an_empty_table(tmp_path: Path) -> None:
    assert comparison_table([RunFolder(tmp_path)]).row_count == 0


def test_one_run_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(run_table(finished(tmp_path, "run", 4, 3, None).read_summary()))
    printed = capsys.readouterr().out
    assert "–" in printed and "the SAE opens no gap above rounding errors" in printed
    assert "1 min 03 s" in printed


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (63, "1 min 03 s"), (7265, "2 h 01 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_percent() -> None:
    assert percent(0.4835) == "48.4%"
    assert percent(-0.1) == "-10.0%"
    assert percent(None) == "–"


def test_a_dash_stands_for_a_factor_that_a_run_does_not_have() -> None:
    """Data frames contain NaN if, for example, one run of several has no rank."""
    assert [text(value) for value in (None, float("nan"), 4.0, "all")] == ["–", "–", "4", "all"]


def test_the_table_of_a_suite_says_what_its_columns_are(tmp_path: Path) -> None:
    """With units, and the interval of each number that has one."""
    folder = finished(tmp_path, "run", 4, 3, 0.5)
    interval = {"value": 0.25, "low": 0.125, "high": 0.5}
    results = {
        "harm": interval,
        "recovered": {"zero": {"student": interval}},
        "distance": {"student": {"reverse_kl": interval}},
        "loss_change": {"student over spliced": {"worse": 0.4}},
        "saes": {"a": {"after": {"cosine": 0.9, "dead": 0.1}}},
    }
    suite_records.write(folder, Record("core", {}, results, {}, 1.0))
    (table,) = evaluation_tables([folder], [Suite.core])
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["harm\nnats/token"] == ["0.25 [0.125, 0.5]"]
    assert columns["tokens worse\nshare"] == ["0.4"]
    assert "harm: rise of the plain model's CE" in str(table.caption)
    assert "in brackets: 95% intervals" in str(table.caption)
    assert headlines(folder)["core/harm"] == 0.25
    (folder.evaluation / "core.json").write_text("{")  # a damaged record counts as a failure
    (table,) = evaluation_tables([folder], [Suite.core])
    assert "core.json is damaged" in str(list(table.columns)[-1]._cells)
