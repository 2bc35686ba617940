"""Ways to adapt a model with many transcoders, from made-up runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from sae_lora.common.errors import UserError
from sae_lora.comparisons import replacement
from sae_lora.evaluation.suite_records import Record, write
from sae_lora.models.hookpoints import resid_post
from sae_lora.records.folder import RunFolder
from sae_lora.report.repeats import mean_of
from scripts import replacement as pages_of
from tests.comparisons.test_comparisons import BASE_CE, cells, curve, folders
from tests.support.commands import REPOSITORY
from tests.support.sweeps import MadeUp

BLOCKS = (0, 1)
SPLICED_CE = 4.0


def sae(block: int, student_ce: float, **changed: Any) -> dict[str, Any]:
    """A block that adds 0.1 · (block + 1) alone, twice of it before training, half of it after it."""
    alone = 0.1 * (block + 1)
    return {
        "block": block,
        "hookpoint": resid_post(block),
        "alone_ce": BASE_CE + alone,
        "alone_fvu": 0.5,
        "fvu": 0.5,
        "left_out_ce": student_ce - alone / 2,
        "spliced_left_out_ce": SPLICED_CE - 2 * alone,
    } | changed


def distances(scale: float) -> list[dict[str, float]]:
    return [{"value": scale * (block + 1), "low": 0.0, "high": 9.0} for block in BLOCKS]


def tell(sweep: MadeUp, targets: str, rank: int, seed: int, ce: float) -> RunFolder:
    config = {
        "lora.targets": targets,
        "lora.rank": rank,
        "train.seed": seed,
        "sae.used": sweep.saes_at(*BLOCKS),
    }
    saes = [sae(block, ce) for block in BLOCKS]
    folder = sweep.told(
        f"{targets}-{rank}-{seed}", curve((0, 0, 0, SPLICED_CE), (100, 1, 1, ce)), config, sae=saes
    )
    results = {
        "norm": distances(10.0),
        "distance": {"spliced": {"l2": distances(4.0)}, "student": {"l2": distances(4 - rank / 10)}},
    }
    write(folder, Record("mechanism", {}, results, {}, 1.0))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> MadeUp:
    """LoRA on attention with two ranks and two seeds each, and on all with one rank and one seed."""
    sweep = MadeUp(tmp_path / "sweep")
    for rank, ce in ((1, 3.5), (16, 3.0)):
        for seed in (0, 1):
            tell(sweep, "attn", rank, seed, ce + seed / 10)
    tell(sweep, "all", 16, 0, 2.5)
    return sweep


def test_ways_are_means_over_seeds(sweep: MadeUp) -> None:
    ways = {tuple(way.settings.values()): way for way in replacement.compare(folders(sweep))}
    by_settings = {(way.settings["rank"], way.settings["targets"]): way for way in ways.values()}
    assert set(by_settings) == {(1, "attn"), (16, "attn"), (16, "all")}
    way = by_settings[16, "attn"]
    assert mean_of(way.gap_closed).value == pytest.approx(1 - 1.05 / 2)
    assert way.kl_closed == pytest.approx([1 - 1 / 0.8, 1 - 1.1 / 0.8])
    assert way.top1_gain == [0, 0]
    for block in BLOCKS:
        measured = way.blocks[block]
        alone = 0.1 * (block + 1)
        assert (measured.alone, measured.before, measured.after) == pytest.approx(
            (alone, 2 * alone, alone / 2)
        )
    assert way.distance["before"] == pytest.approx([0.4, 0.4])
    assert way.distance["after"] == pytest.approx([0.24, 0.24])
    rows = cells(replacement.table(list(ways.values())))
    assert len(rows) == 3 and all(row[-1] in ("1", "2") for row in rows)


def test_the_figures(sweep: MadeUp) -> None:
    figures = replacement.figures(folders(sweep))
    assert set(figures) == {"replacement_rank", "replacement_blocks", "replacement_depth"}
    lines = {trace.name: list(trace.x) for trace in figures["replacement_rank"].data if trace.showlegend}
    assert lines["attn"] == [1, 16]
    bars = [trace.name for trace in figures["replacement_blocks"].data]
    assert bars[:2] == ["alone in the plain model", "with all others, before training"]
    assert "attn, rank 16" in bars and "all, rank 16" in bars
    depth = figures["replacement_depth"].data
    assert depth[0].name == "before training"


def test_older_runs_and_runs_without_the_suite(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    folder = tell(sweep, "attn", 4, 0, 3.0)
    (folder.evaluation / "mechanism.json").unlink()
    summary = folder.read_summary()
    for each in summary["sae"]:
        del each["spliced_left_out_ce"]
    folder.summary.write_text(json.dumps(summary))
    (way,) = replacement.compare([folder])
    assert way.distance == {} and way.blocks[0].before is None
    assert set(replacement.figures([folder])) == {"replacement_rank", "replacement_blocks"}


def test_a_sweep_without_several_saes_is_refused(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    sweep.told("one", [], {})
    with pytest.raises(UserError, match="no finished run has several SAEs"):
        replacement.compare(folders(sweep))


def test_the_tables_of_the_page_are_those_of_its_record() -> None:
    page = REPOSITORY / "docs/results/replacement.md"
    assert pages_of.with_tables(page.read_text(), page.with_suffix("")) == page.read_text()
