"""Ways to adapt and the meaning of latents, from made-up runs."""

from pathlib import Path
from typing import Any

import pytest

from sae_lora.common.errors import UserError
from sae_lora.comparisons import latents
from sae_lora.evaluation.suite_records import Record, write
from sae_lora.records.folder import RunFolder
from scripts import latents as pages_of
from tests.comparisons.test_comparisons import cells, curve, folders
from tests.support.commands import REPOSITORY
from tests.support.sweeps import MadeUp

SPLICED_CE = 4.0


def interval(value: float | None) -> dict[str, float | None]:
    return {"value": value, "low": None, "high": None}


def tell(sweep: MadeUp, name: str, ce: float, turned: float | None, **config: Any) -> RunFolder:
    keys = {key.replace("__", "."): value for key, value in config.items()}
    folder = sweep.told(name, curve((0, 0, 0, SPLICED_CE), (100, 1, 1, ce)), keys)
    change = {measure: interval(0.9) for measure in latents.MEASURES} | {"turned": interval(turned)}
    write(folder, Record("latents", {}, {"saes": {"blocks.3.hook_resid_post": change}}, {}, 1.0))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> MadeUp:
    """LoRA with two ranks and two seeds each, and SAEs that were finetuned at two rates."""
    sweep = MadeUp(tmp_path / "sweep")
    for rank, ce in ((1, 3.6), (16, 3.2)):
        for seed in (0, 1):
            tell(sweep, f"r{rank}-{seed}", ce, rank / 100, lora__rank=rank, train__seed=seed)
    for number, ce in enumerate((3.5, 3.1)):
        finetuned = {"method__kind": "sae_finetune", "train__lr": 1e-4 * (number + 1)}
        tell(sweep, f"finetuned-{number}", ce, 0.5 + number / 10, **finetuned)
    return sweep


def test_each_way_stands_beside_the_finetuned_sae_of_the_nearest_gap(sweep: MadeUp) -> None:
    ways = latents.compare(folders(sweep))
    by_rank = {way.settings["rank"]: way for way in ways if way.settings["method"] == "lora"}
    assert [len(way.gap_closed) for way in by_rank.values()] == [2, 2]
    assert by_rank[1].changes["turned"] == [0.01, 0.01]
    for rank, turned in ((1, 0.5), (16, 0.6)):
        finetuned = by_rank[rank].finetuned
        assert finetuned is not None and finetuned["changes"]["turned"] == [turned]
    assert [way.finetuned for way in ways if way.settings["method"] != "lora"] == [None, None]
    assert all(way.between_seeds == {} for way in ways)  # these runs have no measured arrays
    rows = cells(latents.table(ways))
    assert len(rows) == 4 and rows[0][-1] == "2"


def test_the_figure(sweep: MadeUp) -> None:
    (figure,) = latents.figures(folders(sweep)).values()
    shown = {trace.name: trace for trace in figure.data if trace.showlegend}
    assert set(shown) == {"lora", "sae_finetune"}
    assert list(shown["lora"].y) == [0.9, 0.9]
    assert list(shown["lora"].x) == pytest.approx(sorted(shown["lora"].x))


def test_two_seeds_stand_beside_the_change(sweep: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lora.evaluation.latents import between

    measured = between.Between(0.02, 0.1, 0.98, 0.9, 0.8)
    monkeypatch.setattr(between, "between", lambda first, second: measured)
    ways = latents.compare(folders(sweep))
    assert [way.between_seeds.get("turned") for way in ways if way.settings["method"] == "lora"] == [
        [0.02]
    ] * 2
    rows = cells(latents.table(ways))
    assert "0.980" in rows[0] and "0.900" in rows[0]
    (figure,) = latents.figures(folders(sweep)).values()
    assert "lora: two seeds" in {trace.name for trace in figure.data}


def test_a_run_without_live_latents_has_no_measures(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    (way,) = latents.compare([tell(sweep, "dead", 3.5, None)])
    assert way.changes["turned"] == [None]
    assert "–" in cells(latents.table([way]))[0]


def test_a_sweep_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    sweep.told("one", curve((0, 0, 0, SPLICED_CE), (100, 1, 1, 3.0)), {})
    with pytest.raises(UserError, match=r"evaluate .*sweep --suite latents"):
        latents.compare(folders(sweep))


def test_the_tables_of_the_page_are_those_of_its_record() -> None:
    page = REPOSITORY / "docs/results/latents.md"
    assert pages_of.with_tables(page.read_text(), page.with_suffix("")) == page.read_text()
