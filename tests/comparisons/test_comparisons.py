"""Comparisons of made-up runs: values between points of a curve, tables and figures."""

import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from sae_lora.cli import main
from sae_lora.common.errors import UserError
from sae_lora.comparisons import layer_groups, time_to_ce
from sae_lora.comparisons import methods as budget
from sae_lora.comparisons import saes as per_block
from sae_lora.comparisons.interpolate import first_reached, value_at
from sae_lora.models.hookpoints import resid_post
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint, gap_closed
from tests.support.browser import in_a_browser
from tests.support.sweeps import MadeUp, summed_up

BASE_CE = 2.0


def curve(*points: tuple[int, float, float, float], spliced_ce: float = 4.0) -> list[CurvePoint]:
    """A curve from points of tokens, seconds, FLOPs and the student's CE."""
    return [
        CurvePoint(
            step=tokens // 10,
            tokens=tokens,
            train_seconds=seconds,
            train_flops=flops,
            base_ce=BASE_CE,
            spliced_ce=spliced_ce,
            student_ce=ce,
            ce_gap=ce - BASE_CE,
            gap_closed=gap_closed(BASE_CE, spliced_ce, ce, 0),
            kl=ce - BASE_CE,
            top1_agreement=0.5,
            fvu=ce / 10,
            l0=8.0,
        )
        for tokens, seconds, flops, ce in points
    ]


BENT = curve((0, 0, 0, 4.0), (100, 10, 1e3, 3.0), (300, 20, 3e3, 2.5), (400, 40, 4e3, 2.75))
"""Fast at first, and worse at the end than in between."""


@pytest.mark.parametrize(
    ("over", "amount", "field", "expected"),
    [
        ("tokens", 100, "train_seconds", 10),  # at points
        ("tokens", 400, "student_ce", 2.75),
        ("tokens", 0, "student_ce", 4.0),
        ("tokens", 50, "student_ce", 3.5),  # between
        ("tokens", 250, "train_seconds", 17.5),
        ("train_seconds", 30, "ce_gap", 0.625),
        ("train_flops", 1.5e3, "tokens", 150),
        ("tokens", 1000, "train_seconds", 40),  # beyond the end
        ("train_seconds", 99, "student_ce", 2.75),
    ],
)
def test_the_value_of_a_field_at_an_amount_of_another(
    over: str, amount: float, field: str, expected: float
) -> None:
    assert value_at(BENT, over, amount, field) == pytest.approx(expected)


def test_before_the_first_point_the_first_is_read() -> None:
    assert value_at(BENT[1:], "tokens", 20, "train_seconds") == 10
    assert value_at(BENT[:1], "tokens", 20, "student_ce") == 4.0


def test_a_missing_value_of_the_first_point_counts_as_zero() -> None:
    (first,) = curve((0, 0, 0, 4.0))
    begun = [CurvePoint(**vars(first) | {"train_flops": None}), *BENT[1:]]
    assert value_at(begun, "tokens", 50, "train_flops") == pytest.approx(500)


@pytest.mark.parametrize(
    ("ce", "cost", "expected"),
    [
        (3.0, "train_seconds", 10),  # at a point
        (3.5, "tokens", 50),  # between
        (2.6, "train_flops", 2.6e3),
        (2.75, "train_seconds", 15),  # the first time, although it ends there again
        (2.5, "tokens", 300),
        (4.0, "train_seconds", 0),  # from the start
        (9.0, "tokens", 0),
    ],
)
def test_the_cost_until_a_cross_entropy_is_first_reached(ce: float, cost: str, expected: float) -> None:
    assert first_reached(BENT, "student_ce", ce, cost) == pytest.approx(expected)


def test_a_curve_that_starts_below_has_the_cost_of_its_first_point() -> None:
    assert first_reached(BENT[1:], "student_ce", 3.2, "train_seconds") == 10


def test_a_cross_entropy_that_is_never_reached() -> None:
    assert first_reached(BENT, "student_ce", 2.4, "tokens") is None


def cells(table: Table) -> list[list[str]]:
    """The cells of a table, row by row, without headings."""
    columns = (map(str, column.cells) for column in table.columns)
    return [list(row) for row in zip(*columns, strict=True)]


def assert_fits(table: Table, width: int = 100, folded: str | None = None) -> None:
    """Check that no cell is cut off, and that cells break only between words, except in one column."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    for column in table.columns:
        for word in " ".join(map(str, column.cells)).split() if column.header != folded else ():
            assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", printed), word


# ---- time_to_ce -----------------------------------------------------------------------------------

SAE = curve((0, 0, 0, 8.0), (400, 40, 4e3, 5.0), (1000, 100, 1e4, 4.0), spliced_ce=8.0)
"""Half of the tokens are between two points, at 50 seconds and 5e3 FLOPs."""
E2E = curve((0, 0, 0, 8.0), (500, 100, 2e4, 4.0), (1000, 200, 4e4, 3.0), spliced_ce=8.0)
LORA = curve((0, 0, 0, 5.0), (100, 10, 2e3, 3.5), (200, 20, 4e3, 2.5))
"""The final CE of E2E is between two points, at 15 seconds and 3e3 FLOPs."""


class Runs:
    """Runs of the three methods of `experiment=time_to_ce`.

    Args:
        home: The sweep's folder.
    """

    def __init__(self, home: Path) -> None:
        self.sweep = MadeUp(home)
        self.folders: list[RunFolder] = []

    def add(
        self, kind: str, points: Sequence[CurvePoint], seed: int = 0, block: int = 3, **keys: Any
    ) -> RunFolder:
        """Add a run; without points, it is unfinished. `keys` are more keys of its config."""
        used = self.sweep.saes_at(block)
        if "init" in keys:  # the SAE that the other run has saved
            used[0]["path"] = f"{keys['init']}/{keys.get('init_at', 1)}"
        config = {"method.kind": kind, "train.seed": seed, "sae.used": used} | keys
        name = f"{kind}-b{block}-s{seed}-at{keys.get('init_at', 1)}"
        folder = self.sweep.told(name, points, config)
        self.folders.append(folder)
        return folder

    def seed(
        self, seed: int, lora: Sequence[CurvePoint] = LORA, e2e: Sequence[CurvePoint] = E2E
    ) -> None:
        """Add the runs of a seed: the SAE, e2e, and LoRA around the SAE after half of its training."""
        sae = self.add("sae", SAE, seed)
        self.add("e2e", e2e, seed)
        self.add("lora", lora, seed, init=str(sae.path), init_at=0.5)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


def test_the_cost_of_lora_includes_its_sae_until_it_was_saved(runs: Runs) -> None:
    runs.seed(0)
    (branch,) = time_to_ce.compare(runs.folders)
    assert (branch.at, branch.seed) == (0.5, 0)
    assert (branch.ce, branch.lora_ce, branch.e2e_ce) == (3.0, 2.5, 3.0)
    assert branch.lora == pytest.approx({"train_seconds": 50 + 15, "train_flops": 5e3 + 3e3})
    assert branch.e2e == pytest.approx({"train_seconds": 200, "train_flops": 4e4})


def test_the_target_is_the_higher_final_ce(runs: Runs) -> None:
    """LoRA ends at 3.5, which e2e reaches after three quarters of its training."""
    runs.seed(0, lora=LORA[:2])
    (branch,) = time_to_ce.compare(runs.folders)
    assert (branch.ce, branch.lora_ce, branch.e2e_ce) == (3.5, 3.5, 3.0)
    assert branch.lora == pytest.approx({"train_seconds": 50 + 10, "train_flops": 5e3 + 2e3})
    assert branch.e2e == pytest.approx({"train_seconds": 150, "train_flops": 3e4})


def test_lora_that_starts_below_e2es_end_costs_only_its_sae(runs: Runs) -> None:
    runs.seed(0, e2e=E2E[:1])
    (branch,) = time_to_ce.compare(runs.folders)
    assert branch.ce == 8.0
    assert branch.lora == pytest.approx({"train_seconds": 50, "train_flops": 5e3})
    assert branch.e2e == {"train_seconds": 0, "train_flops": 0}


def test_shares_and_seeds_in_the_table(runs: Runs) -> None:
    """The e2e of the second seed is half as fast: 200/65 and 400/65 times sooner, with mean 4.6."""
    slow = [CurvePoint(**vars(point) | {"train_seconds": 2 * point.train_seconds}) for point in E2E]
    runs.seed(0)
    runs.seed(1, e2e=slow)
    runs.add("lora", LORA, init=str(runs.folders[0].path))  # around the final SAE: 100 + 15 s
    branches = time_to_ce.compare(runs.folders)
    assert [(branch.at, branch.seed) for branch in branches] == [(0.5, 0), (0.5, 1), (1.0, 0)]
    table = time_to_ce.table(branches)
    assert cells(table) == [
        [
            "50%",
            "2.500",
            "3.000",
            "65 s",
            "300 ± 1271 s",
            "4.6 ± 19.5",
            "5.0",
            "20.0 ± 84.7",
            "2",
        ],
        [
            "100%",
            "2.500",
            "3.000",
            "115 s",
            "200 s",
            "1.7",
            "3.1",
            "13.3",
            "1",
        ],
    ]
    assert_fits(table)


def test_only_runs_of_the_same_seed_and_block_are_paired(runs: Runs) -> None:
    runs.seed(0)
    sae = runs.folders[0].path
    runs.add("lora", LORA, seed=1, init=str(sae), init_at=0.5)  # no e2e of this seed
    runs.add("lora", LORA, block=5, init=str(sae), init_at=0.5)  # no e2e at this block
    runs.add("lora", LORA, seed=2)  # around an existing SAE instead of an SAE of the sweep
    runs.add("e2e", [], seed=1)  # not finished
    runs.add("e2e", E2E, seed=0, block=4)
    branches = time_to_ce.compare(runs.folders)
    assert [(branch.at, branch.seed) for branch in branches] == [(0.5, 0)]


@pytest.mark.parametrize(
    "methods", [(), ("sae",), ("sae", "lora"), ("sae", "e2e"), ("lora alone", "e2e")]
)
def test_a_missing_method_is_an_error(methods: tuple[str, ...], runs: Runs) -> None:
    sae = runs.add("sae", SAE)
    if "lora" in methods:
        runs.add("lora", LORA, init=str(sae.path))
    if "lora alone" in methods:
        runs.add("lora", LORA)
    if "e2e" in methods:
        runs.add("e2e", E2E)
    if "sae" not in methods:
        runs.folders.remove(sae)
    with pytest.raises(UserError, match="no finished run of method=lora that begins with an SAE"):
        time_to_ce.compare(runs.folders)


def test_the_saes_of_a_moved_sweep_are_read_from_its_new_folder(runs: Runs, tmp_path: Path) -> None:
    runs.seed(0)
    moved = runs.sweep.home.rename(tmp_path / "elsewhere")
    (branch,) = time_to_ce.compare([RunFolder(moved / folder.path.name) for folder in runs.folders])
    assert branch.lora["train_seconds"] == pytest.approx(65)
    assert budget.method_of(RunFolder(moved / runs.folders[2].path.name)) == "lora after sae"


def test_a_deleted_sae_is_an_error(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.seed(0)
    shutil.rmtree(runs.folders[0].path)
    for command in ("time-to-ce", "methods"):
        assert main(["compare", command, str(runs.sweep.home)]) == 1
        assert "the run that it began with no longer exists" in capsys.readouterr().err


def test_branches_of_the_figure_begin_at_the_time_that_the_sae_was_saved(runs: Runs) -> None:
    runs.seed(0)
    runs.seed(1)
    runs.add("lora", LORA, init=str(runs.folders[0].path))
    figure = time_to_ce.figures(runs.folders)["time_to_ce"]
    seconds = [trace for trace in figure.data if trace.xaxis in (None, "x")]
    assert [trace.name for trace in seconds] == ["reconstruction", "end to end", "LoRA", "LoRA"]
    assert [trace.name for trace in figure.data if trace.showlegend] == [
        *("reconstruction", "end to end", "LoRA"),
    ]
    # Only the first seed is drawn; a logarithmic axis cannot show zero.
    assert [list(trace.x) for trace in seconds] == [
        [None, 40, 100],
        [None, 100, 200],
        [50, 60, 70],
        [100, 110, 120],
    ]
    assert list(seconds[2].y) == [5.0, 3.5, 2.5]
    flops = [trace for trace in figure.data if trace.xaxis == "x2"]
    assert [list(trace.x) for trace in flops[1:3]] == [[None, 2e4, 4e4], [5e3, 7e3, 9e3]]
    (line,) = {(shape.y0, shape.y1) for shape in figure.layout.shapes}
    assert line == (BASE_CE, BASE_CE)


# ---- budget ---------------------------------------------------------------------------------------


@pytest.fixture
def methods(tmp_path: Path) -> MadeUp:
    """Three methods. The last one is faster and is trained on more tokens.

    200 tokens take 20 and 30 seconds for LoRA, 40 for sae_finetune, and 10 for LoRA after it.
    """
    sweep = MadeUp(tmp_path / "methods")
    slow = [CurvePoint(**vars(point) | {"train_seconds": 1.5 * point.train_seconds}) for point in LORA]
    sweep.told("lora-s0", LORA, {"train.seed": 0}, trainable_parameters=1_310_720)
    sweep.told("lora-s1", slow, {"train.seed": 1}, trainable_parameters=1_310_720)
    sae = sweep.told(
        "sae_finetune-s0",
        curve((0, 0, 0, 4.0), (100, 20, 1e4, 3.0), (200, 40, 2e4, 2.75)),
        {"method.kind": "sae_finetune"},
        trainable_parameters=263_296,
    )
    sweep.told(
        "after-s0",
        curve((0, 0, 0, 2.8), (400, 20, 8e3, 2.0), spliced_ce=2.8),
        {"init": str(sae.path), "sae.used": [sweep.saes_at(3)[0] | {"path": str(sae.path)}]},
        trainable_parameters=1_310_720,
    )
    sweep.told("mezo-s0", [], {"method.kind": "mezo"})
    return sweep


def folders(sweep: MadeUp) -> list[RunFolder]:
    return [RunFolder(path.parent) for path in sorted(sweep.home.glob("*/config.yaml"))]


def test_methods_after_the_same_tokens_and_after_the_same_seconds(methods: MadeUp) -> None:
    """After 200 tokens, and after the 10 seconds that the fastest run takes for them."""
    outcomes = budget.compare(folders(methods))
    assert [outcome.method for outcome in outcomes] == [
        "lora after sae_finetune",
        "lora",
        "sae_finetune",
    ]
    lora_after_sae, lora, sae = outcomes
    assert lora_after_sae.gap_after_tokens == pytest.approx([0.4])
    assert lora.gap_after_tokens == pytest.approx([0.5, 0.5])
    assert sae.gap_after_tokens == pytest.approx([0.75])
    assert lora_after_sae.gap_after_seconds == pytest.approx([0.4])
    # 10 of 20 seconds is a point; 10 of 30, two thirds of the way to it; 10 of 40, half of the way.
    assert lora.gap_after_seconds == pytest.approx([1.5, 3.0 - 2 / 3 * 1.5])
    assert sae.gap_after_seconds == pytest.approx([1.5])
    assert lora_after_sae.seconds == pytest.approx([10])
    assert lora_after_sae.flops == pytest.approx([4e3])
    assert lora.seconds == pytest.approx([20, 30]) and sae.flops == pytest.approx([2e4])
    assert [outcome.initial_gap for outcome in outcomes] == pytest.approx([0.8, 2.0, 2.0])
    assert [outcome.trained_weights for outcome in outcomes] == [1_310_720, 1_310_720, 263_296]
    assert lora_after_sae.fvu == [0.2] and lora.fvu == [0.25, 0.25]


def test_means_over_seeds_in_the_table(methods: MadeUp) -> None:
    table = budget.table(budget.compare(folders(methods)))
    assert cells(table)[1] == [
        *("lora", "+2.000", "+0.500", "+1.750 ± 3.177"),
        *("0.250", "1,310,720", "25 ± 64", "4.0e+03", "2"),
    ]
    assert cells(table)[2][2] == "+0.750"
    assert_fits(table)


@pytest.mark.case("A9")
def test_each_setting_of_a_method_is_a_row(tmp_path: Path) -> None:
    """Ranks and blocks are not averaged as if they were seeds; packs are said to be packs."""
    sweep = MadeUp(tmp_path / "ranks")
    for rank in (1, 4):
        for block in (3, 5):
            for seed in (0, 1):
                sweep.finished(rank=rank, block=block, seed=seed)
    outcomes = budget.compare(folders(sweep))
    settings = {(row.settings["block"], row.settings["rank"]) for row in outcomes}
    assert settings == {("3", "1"), ("3", "4"), ("5", "1"), ("5", "4")}
    assert all(len(row.gap_after_tokens) == 2 for row in outcomes)
    table = budget.table(outcomes)
    assert [str(column.header) for column in table.columns][:3] == ["method", "SAE at block", "rank"]
    assert table.caption is None
    for folder in folders(sweep):
        summed_up(folder, trained_together=4)
    assert "shares of a pack's time" in str(budget.table(budget.compare(folders(sweep))).caption)


def test_no_run_is_finished(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "none")
    sweep.told("begun", [], {})
    for compare in (budget.compare, layer_groups.compare, per_block.compare, time_to_ce.compare):
        with pytest.raises(UserError):
            compare(folders(sweep))


# ---- several SAEs ---------------------------------------------------------------------------------


def measured(block: int, **costs: float) -> dict[str, Any]:
    """The entry of an SAE in a summary."""
    return {"block": block, "hookpoint": resid_post(block), "width": 1024} | costs


@pytest.fixture
def several(tmp_path: Path) -> MadeUp:
    """Three runs, with two SAEs, three SAEs and one SAE."""
    sweep = MadeUp(tmp_path / "several")
    for rank, blocks in ((4, (2, 5)), (8, (1, 3, 5)), (16, (3,))):
        saes = [
            measured(
                block,
                fvu=0.25 + block / 100,
                **(
                    {
                        "alone_ce": BASE_CE + block / 10,
                        "alone_fvu": 0.125 * block,
                        "left_out_ce": 2.5 - block / 10,
                    }
                    if len(blocks) > 1
                    else {}
                ),
            )
            for block in blocks
        ]
        config = {"lora.rank": rank, "sae.used": sweep.saes_at(*blocks)}
        sweep.told(f"r{rank}", LORA, config, sae=saes)
    return sweep


def test_a_row_for_each_sae(several: MadeUp) -> None:
    """CE alone is minus the plain model's CE; CE without the SAE is minus the student's CE, 2.5."""
    table = per_block.table(per_block.compare(folders(several)))
    rows = cells(table)
    assert {tuple(row[:5]) for row in rows if row[0] == "2"} == {
        ("2", "+2.000", "+0.500", "75.0%", resid_post(2))
    }
    assert sorted(row[5:] for row in rows) == [
        ["0.125", "0.260", "+0.100", "-0.100"],
        ["0.250", "0.270", "+0.200", "-0.200"],
        ["0.375", "0.280", "+0.300", "-0.300"],
        ["0.625", "0.300", "+0.500", "-0.500"],
        ["0.625", "0.300", "+0.500", "-0.500"],
    ]
    assert [row[0] for row in rows if row[0]] in (["2", "3"], ["3", "2"])
    assert_fits(table, folded="hook point")


def test_no_run_has_several_saes(several: MadeUp) -> None:
    with pytest.raises(UserError, match="has several SAEs that were also evaluated one by one"):
        per_block.compare([RunFolder(several.home / "r16")])


def test_each_sae_in_the_figure(several: MadeUp) -> None:
    figure = per_block.by_block(per_block.compare(folders(several)), ["three", "two"])
    assert [trace.name for trace in figure.data] == ["three", "three", "two", "two"]
    assert [trace.name for trace in figure.data if trace.showlegend] == ["three", "two"]
    assert [list(trace.x) for trace in figure.data] == [[1, 3, 5], [1, 3, 5], [2, 5], [2, 5]]
    assert list(figure.data[2].y) == [0.25, 0.625]
    assert list(figure.data[1].y) == pytest.approx([0.1, 0.3, 0.5])
    assert len({trace.line.color for trace in figure.data}) == 2


def test_the_cost_of_all_saes_is_drawn_beside_the_sum_of_each(several: MadeUp) -> None:
    alone, untrained, trained = per_block.figures(folders(several))["multi_sae"].data
    assert list(alone.x) == ["2+5", "1+3+5"]
    assert list(alone.y) == pytest.approx([0.7, 0.9])
    assert list(untrained.y) == pytest.approx([2.0, 2.0])
    assert list(trained.y) == pytest.approx([0.5, 0.5])


# ---- groups ---------------------------------------------------------------------------------------

DISTANCES = [
    [0.0, 0.1, 0.3, 0.5],
    [0.1, 0.0, 0.2, 0.4],
    [0.3, 0.2, 0.0, 0.3],
    [0.5, 0.4, 0.3, 0.0],
]
"""Distances between four blocks. The last block is in no group."""
WAYS: dict[str, tuple[list[list[int]], bool, float]] = {
    "three": ([[0], [1], [2]], False, 0.0),
    "two": ([[0, 1], [2]], False, 0.05),
    "two-evenly": ([[0, 2], [1]], True, 0.15),
    "one": ([[0, 1, 2]], False, 0.3),
}


@pytest.fixture
def groups(tmp_path: Path) -> MadeUp:
    """SAEs for groups of blocks in four ways, and LoRA around three of them."""
    sweep = MadeUp(tmp_path / "groups")
    sweep.told("another", LORA, {})  # LoRA around an existing SAE
    for number, (name, (partition, evenly, amad)) in enumerate(WAYS.items()):
        shared_by = {block: group for group in partition for block in group}
        config = {
            "method.kind": "sae",
            "sae.used": sweep.saes_at(0, 1, 2, group=shared_by),
        }
        saes = [
            measured(
                block,
                fvu=0.5,
                alone_fvu=0.125 * (block + number),
                alone_ce=2 + 0.25 * block,
                left_out_ce=2.0,
            )
            for block in range(3)
        ]
        ce = 3.0 + number / 4
        run = sweep.told(f"sae-{name}", curve((0, 0, 0, 9.0), (1000, 9, 1e4, ce)), config, sae=saes)
        record = {
            "groups": partition,
            "amad": amad,
            "amad_by_count": [0.3, 0.05, 0.0],
            "distances": DISTANCES,
            "evenly": evenly,
            "sae_flops_saved": 1 - len(partition) / 3,
        }
        run.groups.write_text(json.dumps(record))
        if name == "one":  # its LoRA run is not finished
            sweep.told(f"lora-{name}", [], {"init": str(run.path)})
        else:
            lora = curve((0, 0, 0, ce), (100, 9, 1e3, ce - 0.5))
            sweep.told(f"lora-{name}", lora, {"init": str(run.path), "sae.used": config["sae.used"]})
    return sweep


def test_each_way_of_sharing_blocks_has_the_lora_around_it(groups: MadeUp) -> None:
    rows = layer_groups.compare(folders(groups))
    assert [(row.groups, row.evenly, row.amad) for row in rows] == [
        WAYS[name] for name in ("one", "two", "two-evenly", "three")
    ]
    assert [row.gap for row in rows] == pytest.approx([1.75, 1.25, 1.5, 1.0])
    assert rows[0].gaps_with_lora == []
    assert [row.gaps_with_lora for row in rows[1:]] == [[pytest.approx(gap)] for gap in (0.75, 1.0, 0.5)]
    assert [row.fvu_alone for row in rows] == pytest.approx([0.5, 0.25, 0.375, 0.125])
    assert [row.ce_alone for row in rows] == pytest.approx([0.25] * 4)
    assert [row.sae_flops_saved for row in rows] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0])


def test_a_sweep_of_groups_may_be_moved(groups: MadeUp, tmp_path: Path) -> None:
    groups.home = groups.home.rename(tmp_path / "elsewhere")
    gaps = [row.gaps_with_lora for row in layer_groups.compare(folders(groups))]
    assert gaps == [[], *([pytest.approx(gap)] for gap in (0.75, 1.0, 0.5))]


def test_several_lora_runs_around_the_same_saes_are_averaged(groups: MadeUp) -> None:
    saes = groups.home / "sae-three"
    used = RunFolder(saes).read_config()["sae"]["used"]
    again = {"init": str(saes), "sae.used": used, "train.seed": 1}
    groups.told("again", curve((0, 0, 0, 3.0), (100, 9, 1e3, 2.9)), again)
    *_, three = layer_groups.compare(folders(groups))
    assert sorted(three.gaps_with_lora) == pytest.approx([0.5, 0.9])
    assert cells(layer_groups.table([three]))[0][-1] == "+0.700 ± 2.541"
    groups.told("other", curve((0, 0, 0, 3.0), (100, 9, 1e3, 2.9)), again | {"lora.rank": 1})
    with pytest.raises(UserError, match="differ in rank, and means are taken over seeds only"):
        layer_groups.compare(folders(groups))


def test_groups_whose_saes_were_not_evaluated_alone_are_left_out(groups: MadeUp) -> None:
    """This is the case with `train.eval_each_sae=false`."""
    for number, name in enumerate(WAYS):
        run = RunFolder(groups.home / f"sae-{name}")
        summary = run.read_summary()
        for sae in summary["sae"]:
            del sae["alone_ce"], sae["alone_fvu"]
        run.summary.write_text(json.dumps(summary))
        if number < len(WAYS) - 1:
            assert len(layer_groups.compare(folders(groups))) == len(WAYS) - 1 - number
    with pytest.raises(UserError, match=r"train\.eval_each_sae"):
        layer_groups.compare(folders(groups))


def test_ways_of_sharing_blocks_in_the_table(groups: MadeUp) -> None:
    table = layer_groups.table(layer_groups.compare(folders(groups)))
    assert cells(table) == [
        ["1", "0–2", "0.300", "67%", "0.500", "+0.250", "+1.750", "–"],
        ["2", "0–1 2", "0.050", "33%", "0.250", "+0.250", "+1.250", "+0.750"],
        ["2 (evenly)", "0,2 1", "0.150", "33%", "0.375", "+0.250", "+1.500", "+1.000"],
        ["3", "0 1 2", "0.000", "0%", "0.125", "+0.250", "+1.000", "+0.500"],
    ]
    assert_fits(table)


def test_many_blocks_with_gaps_fit_too() -> None:
    """A model of 26 blocks with two groups of every second block."""
    halves = [list(range(0, 25, 2)), list(range(1, 25, 2))]
    table = layer_groups.table([layer_groups.Shared(halves, False, 0.2, 0.92, 0.3, 0.1, 1.0, [0.5])])
    assert_fits(table, folded="blocks")


def test_the_figures_of_groups(groups: MadeUp) -> None:
    figures = layer_groups.figures(folders(groups))
    assert set(figures) == {"distances", "tree", "amad", "blocks"}
    (heatmap,) = figures["distances"].data
    assert [list(row) for row in heatmap.z] == DISTANCES
    # Frames and marks are of the run with the fewest groups, but more than one.
    assert len(figures["distances"].layout.shapes) == 2
    by_distance, chosen = figures["amad"].data
    assert list(by_distance.y) == [0.3, 0.05, 0.0]
    assert (list(chosen.x), list(chosen.y)) == ([2], [0.05])
    # Two merges of three blocks, at their largest distances, and the blocks below.
    *merges, leaves = figures["tree"].data
    assert sorted(max(merge.y) for merge in merges) == pytest.approx([0.1, 0.3])
    assert sorted(leaves.customdata) == [0, 1, 2]
    # Without the equal groups, each run has a line of FVU and a line of CE.
    names = [trace.name for trace in figures["blocks"].data]
    assert names == [name for name in ("1 group", "2 groups", "3 groups") for _ in range(2)]
    assert list(figures["blocks"].data[2].y) == [0.125, 0.25, 0.375]


def test_groups_of_equal_size_are_drawn_if_there_are_no_others(groups: MadeUp) -> None:
    figures = layer_groups.figures([RunFolder(groups.home / "sae-two-evenly")])
    assert list(figures["amad"].data[1].x) == [2]
    assert [trace.name for trace in figures["blocks"].data] == ["2 groups"] * 2


# ---- commands -------------------------------------------------------------------------------------


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Path]]:
    """Figures and their files, which are listed instead of written."""
    pictures: list[tuple[Any, Path]] = []
    monkeypatch.setattr("sae_lora.common.plots.try_pictures", lambda files: pictures.extend(files) or [])
    return pictures


def test_the_command_for_time_to_ce(
    runs: Runs, pictures: list[tuple[Any, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.seed(0)
    to = tmp_path / "docs" / "runs"
    assert main(["compare", "time-to-ce", str(runs.sweep.home)]) == 0
    assert not to.exists()
    assert main(["compare", "time-to-ce", str(runs.sweep.home), "--to", str(to)]) == 0
    assert " 3.1 " in capsys.readouterr().out
    (branch,) = json.loads((to / "time_to_ce.json").read_text())
    assert branch["lora"]["train_seconds"] == pytest.approx(65)
    assert [path for _, path in pictures] == [to / "time_to_ce.svg"]


def test_the_command_for_methods(
    methods: MadeUp,
    pictures: list[tuple[Any, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", "methods", str(methods.home), "--to", str(tmp_path / "to")]) == 0
    assert "lora after sae_finetune" in capsys.readouterr().out
    outcomes = json.loads((tmp_path / "to/methods.json").read_text())
    assert [row["method"] for row in outcomes] == ["lora after sae_finetune", "lora", "sae_finetune"]
    figures = {path.name: figure for figure, path in pictures}
    axes = "tokens", "train_seconds", "train_flops"
    assert set(figures) == {f"methods_{axis}.svg" for axis in axes}
    tokens = figures["methods_tokens.svg"].data
    named = [trace.name for trace in tokens if trace.showlegend]
    assert sorted(named) == ["lora", "lora after sae_finetune", "sae_finetune"]
    assert sorted(tuple(trace.y) for trace in tokens)[0] == pytest.approx((0.8, 0.0))


def test_the_command_for_several_saes(
    several: MadeUp,
    pictures: list[tuple[Any, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", "saes", str(several.home), "--to", str(tmp_path / "to")]) == 0
    assert resid_post(2) in capsys.readouterr().out
    assert len(json.loads((tmp_path / "to/multi_sae.json").read_text())) == 2
    assert [path for _, path in pictures] == [tmp_path / "to/multi_sae.svg"]
    assert main(["compare", "saes", str(several.home / "r16")]) == 1
    assert "several SAEs" in capsys.readouterr().err


def test_the_command_for_groups(
    groups: MadeUp,
    pictures: list[tuple[Any, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", "groups", str(groups.home), "--to", str(tmp_path / "to")]) == 0
    assert "2 (evenly)" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "to/groups.json").read_text())) == 4
    names = {path.name for _, path in pictures}
    assert names == {f"{name}.svg" for name in ("distances", "tree", "amad", "blocks")}


@pytest.mark.parametrize("command", ["methods", "saes", "groups", "time-to-ce"])
def test_a_sweep_without_finished_runs_is_one_message(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MadeUp(tmp_path / "sweep").told("begun", [], {})
    assert main(["compare", command, str(tmp_path / "sweep")]) == 1
    assert capsys.readouterr().err.startswith("error: no")


def test_without_a_browser_the_numbers_are_still_written(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("\nImage export needs the kaleido package,\nand more words.")

    monkeypatch.setattr("plotly.io.write_images", fail)
    runs.seed(0)
    assert main(["compare", "time-to-ce", str(runs.sweep.home), "--to", str(tmp_path / "to")]) == 0
    assert "left out: no pictures (Image export needs the kaleido package)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["time_to_ce.json"]


@pytest.mark.slow
@in_a_browser
def test_pictures_for_papers(runs: Runs, tmp_path: Path) -> None:
    runs.seed(0)
    assert main(["compare", "time-to-ce", str(runs.sweep.home), "--to", str(tmp_path)]) == 0
    assert (tmp_path / "time_to_ce.svg").read_bytes().startswith(b"<svg")
