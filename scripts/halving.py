"""Replay of recorded sweeps under the rule of successive halving: is the best run kept?

    python -m scripts.halving docs/results/halving.md --outputs outputs/rates outputs/rates_halving
    python -m scripts.halving docs/results/halving.md

The first command writes the curves of all runs of these sweeps beside the page (`halving/curves.json`),
and the figure. Both write the tables into the page, from the curves: each in place of the table after
its comment. A sweep `NAME_halving…` is `NAME` with `launcher.halving=train.lr`.

A *bracket* is the runs that differ only in the learning rate. Its recorded curves say what halving would
have stopped at any rungs: a run reads the same batches whether others go on or not.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Any

import plotly.graph_objects as go
from scipy import stats

import sae_lora
from sae_lora.common.plots import COLOURS, finished, line_and_markers, write_svgs
from sae_lora.config.execution import LauncherConfig
from sae_lora.launcher.halving import SHARES
from sae_lora.records.factors import text, values_of, varying
from sae_lora.records.halving import places, rank_of, rounded_up
from sae_lora.report.fits import mean_and_margin
from scripts import pages
from scripts.pages import markdown, whole

_FACTOR = "train.lr"
_MEASURE = "ce_gap"
_ON = "_halving"
"""Part of the name of a sweep that was run with halving."""
_DEFAULT = "default"
"""The sweep on the default's own budget."""
_KEEP = LauncherConfig().keep
_NEAR = 0.005
"""A share of the gap that is less than the spread between seeds."""
_ORDERS = 50
"""Random orders of arrival in the replay of runs that come one after the other."""

Row = dict[str, Any]
Bracket = list[Row]


@dataclass(frozen=True)
class Rule:
    """Rungs as shares of the training, and the share of the runs that goes on."""

    shares: tuple[float, ...]
    keep: float

    def __str__(self) -> str:
        return f"{', '.join(_fraction(share) for share in self.shares)}; keep {_fraction(self.keep)}"


RULES = [
    Rule(shares, keep)
    for shares in ((1 / 8,), (1 / 2,), (1 / 4, 1 / 2), SHARES, (1 / 8, 1 / 2, 3 / 4))
    for keep in (3 / 4, 2 / 3, 1 / 2, 1 / 3)
]


def _fraction(value: float) -> str:
    return str(Fraction(value).limit_denominator(8))


def record(runs: Iterable[Any]) -> list[Row]:
    """The curves of runs, with what tells their brackets apart."""
    runs = list(runs)
    factors = {run: values_of(run.config, {}) for run in runs}
    names = [name for name in varying(list(factors.values())) if name != _FACTOR]
    rows = []
    for run, values in factors.items():
        curve = run.curve()
        rows.append(
            {
                "sweep": run.folder.parent.name,
                "bracket": " ".join(f"{name}={text(values[name])}" for name in names),
                "lr": values[_FACTOR],
                "state": run.state,
                "keep": run.config["launcher"].get("keep"),
                **{name: curve[name].tolist() for name in ("tokens", "train_seconds", _MEASURE)},
            }
        )
    return sorted(rows, key=lambda row: (row["sweep"], row["bracket"], row["lr"]))


def brackets(rows: Sequence[Row]) -> list[Bracket]:
    """The brackets of the sweeps that were run without halving."""
    groups: dict[tuple[str, str], Bracket] = {}
    for row in rows:
        if _ON not in row["sweep"]:
            groups.setdefault((row["sweep"], row["bracket"]), []).append(row)
    return list(groups.values())


def _number(row: Row, share: float) -> int:
    """The number of the first evaluation after this share of the training."""
    return rounded_up(share * (len(row["tokens"]) - 1))


@dataclass(frozen=True)
class Outcome:
    """A bracket after halving."""

    kept: bool
    """True if the run that is best at the end was not stopped."""
    lost: float
    """The share of the gap that the best remaining run closes less than that run."""
    saved: float
    """Share of the training tokens that halving saved."""


def _outcome(bracket: Bracket, ends: Sequence[int]) -> Outcome:
    """The outcome if the runs ended after these evaluations."""
    final = [row[_MEASURE][-1] for row in bracket]
    last = [len(row["tokens"]) - 1 for row in bracket]
    remaining = [gap for gap, end, whole_run in zip(final, ends, last, strict=True) if end == whole_run]
    used = sum(row["tokens"][end] for row, end in zip(bracket, ends, strict=True))
    asked = sum(row["tokens"][-1] for row in bracket)
    lost = (min(remaining) - min(final)) / bracket[0][_MEASURE][0]
    return Outcome(min(remaining) == min(final), lost, 1 - used / asked)


def _ends(bracket: Bracket, rule: Rule) -> list[int]:
    """The last evaluation of each run, if all reach each rung at the same time."""
    ends = [len(row["tokens"]) - 1 for row in bracket]
    alive = list(range(len(bracket)))
    for share in rule.shares:
        values = {str(i): [bracket[i][_MEASURE][_number(bracket[i], share)]] for i in alive}
        for i in list(values):
            if rank_of(values, i, _MEASURE) > places(len(values), rule.keep):
                ends[int(i)] = _number(bracket[int(i)], share)
                alive.remove(int(i))
    return ends


def at_once(bracket: Bracket, rule: Rule) -> Outcome:
    """The replay of runs that reach each rung at the same time, as in a pack."""
    return _outcome(bracket, _ends(bracket, rule))


def one_by_one(bracket: Bracket, rule: Rule, order: Sequence[int]) -> Outcome:
    """The replay of runs that train one after the other, in this order."""
    ends = [len(row["tokens"]) - 1 for row in bracket]
    arrived: list[int] = []
    for new in order:
        arrived.append(new)
        for share in rule.shares:
            number = _number(bracket[new], share)
            reached = [i for i in arrived if ends[i] >= _number(bracket[i], share)]
            values = {str(i): [bracket[i][_MEASURE][_number(bracket[i], share)]] for i in reached}
            if rank_of(values, str(new), _MEASURE) > places(len(values), rule.keep):
                ends[new] = number
                break
    return _outcome(bracket, ends)


def _orders(number: int) -> list[list[int]]:
    """Random orders of this number of runs, the same at every call."""
    draw = random.Random(0)
    return [draw.sample(range(number), number) for _ in range(_ORDERS)]


def _of(kept: int, number: int) -> str:
    """A share of brackets with its 95% interval (Wilson)."""
    interval = stats.binomtest(kept, number).proportion_ci(method="wilson")
    return f"{kept} of {number} ({100 * interval.low:.0f}–{100 * interval.high:.0f}%)"


def _points(values: Sequence[float], digits: int = 1) -> str:
    middle, margin = mean_and_margin(values)
    return f"{100 * middle:.{digits}f} ± {100 * margin:.{digits}f}"


def replay(rows: Sequence[Row]) -> str:
    """The table of the rules, for runs that are compared at the same time."""
    columns: dict[str, list[str]] = {}
    for rule in RULES:
        ended = [at_once(bracket, rule) for bracket in brackets(rows)]
        lost = [outcome.lost for outcome in ended]
        for name, cell in {
            "rungs; keep": str(rule),
            "best run kept": _of(sum(outcome.kept for outcome in ended), len(ended)),
            "within half a point": str(sum(each < _NEAR for each in lost)),
            "lost, points of the gap": _points(lost, 2),
            "largest loss": f"{100 * max(lost):.2f}",
            "tokens saved, %": _points([outcome.saved for outcome in ended]),
        }.items():
            columns.setdefault(name, []).append(cell)
    return markdown(columns)


def arrivals(rows: Sequence[Row]) -> str:
    """The table of the rules, for runs that train one after the other."""
    columns: dict[str, list[str]] = {}
    for rule in (rule for rule in RULES if rule.shares == SHARES):
        ended = [
            one_by_one(bracket, rule, order)
            for bracket in brackets(rows)
            for order in _orders(len(bracket))
        ]
        for name, cell in {
            "rungs; keep": str(rule),
            "best run kept": f"{100 * mean(outcome.kept for outcome in ended):.1f}%",
            "lost, points of the gap": f"{100 * mean(outcome.lost for outcome in ended):.2f}",
            "tokens saved": f"{100 * mean(outcome.saved for outcome in ended):.1f}%",
        }.items():
            columns.setdefault(name, []).append(cell)
    return markdown(columns)


def _early(bracket: Bracket, share: float) -> tuple[float, int, bool]:
    """Kendall's tau between the order after a share and that at the end; the rank of the final best
    then; and true if the best then stays the best."""
    then = [row[_MEASURE][_number(row, share)] for row in bracket]
    final = [row[_MEASURE][-1] for row in bracket]
    best = final.index(min(final))
    rank = 1 + sum(gap < then[best] for gap in then)
    tau: Any = stats.kendalltau(then, final)
    return float(tau.statistic), rank, rank == 1


_EIGHTHS = [number / 8 for number in range(1, 8)]


def order(rows: Sequence[Row]) -> str:
    """The table of how early the curves are in their final order."""
    groups = brackets(rows)
    early = {share: [_early(bracket, share) for bracket in groups] for share in _EIGHTHS}
    return markdown(
        {
            "share of the training": [f"{share:g}" for share in _EIGHTHS],
            "Kendall's tau with the final order": [
                f"{mean(tau for tau, _, _ in early[share]):.2f}" for share in _EIGHTHS
            ],
            "the best then is the final best": [
                _of(sum(same for *_, same in early[share]), len(groups)) for share in _EIGHTHS
            ],
            "worst rank of the final best": [
                str(max(rank for _, rank, _ in early[share])) for share in _EIGHTHS
            ],
        }
    )


def _of_all(number: int, of: int) -> str:
    return f"{number} of {of}"


def live(rows: Sequence[Row]) -> str:
    """The table of the sweeps that were run with halving and without."""
    columns: dict[str, list[str]] = {}
    for name in sorted({row["sweep"] for row in rows if _ON in row["sweep"]}):
        on = [row for row in rows if row["sweep"] == name]
        keys = {(row["bracket"], row["lr"]) for row in on}
        off = [
            row
            for row in rows
            if row["sweep"] == name.partition(_ON)[0] and (row["bracket"], row["lr"]) in keys
        ]
        best = {row["bracket"]: row for row in sorted(off, key=lambda row: -row[_MEASURE][-1])}
        kept = [row for row in on if row["state"] == "done" and row["lr"] == best[row["bracket"]]["lr"]]
        differing = [row for row in kept if row[_MEASURE] != best[row["bracket"]][_MEASURE]]
        assert not differing, "halving has changed the results of runs that went on"
        totals = {
            measure: [sum(row[measure][-1] for row in part) for part in (off, on)]
            for measure in ("tokens", "train_seconds")
        }
        for heading, cell in {
            "sweep; keep": f"{name.partition(_ON)[0]}; {_fraction(on[0]['keep'])}",
            "runs stopped": _of_all(sum(row["state"] == "outranked" for row in on), len(on)),
            "best kept": _of_all(len(kept), len(best)),
            "tokens, thousands": " → ".join(whole(tokens / 1000 for tokens in totals["tokens"])),
            "seconds": " → ".join(whole(totals["train_seconds"])),
            "saved": " / ".join(
                f"{100 * (1 - after / before):.0f}%" for before, after in totals.values()
            ),
        }.items():
            columns.setdefault(heading, []).append(cell)
    return markdown(columns)


def _of_default(rows: Sequence[Row]) -> list[Row]:
    """The runs on the default's own budget, by which the rule was not chosen."""
    return [row for row in rows if row["sweep"] == _DEFAULT]


def _others(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["sweep"] != _DEFAULT]


TABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "replay": lambda rows: replay(_others(rows)),
    "replay_default": lambda rows: replay(_of_default(rows)),
    "arrivals": lambda rows: arrivals(_others(rows)),
    "order": lambda rows: order(_others(rows)),
    "order_default": lambda rows: order(_of_default(rows)),
    "live": live,
}


def figure(rows: Sequence[Row]) -> go.Figure:
    """The curves of the bracket whose order changes most; dotted after the default rule stops them."""
    every = brackets(rows)
    largest = [bracket for bracket in every if len(bracket) == max(map(len, every))]
    bracket = min(largest, key=lambda bracket: _early(bracket, SHARES[0])[0])
    drawn = go.Figure()
    for number, (row, end) in enumerate(zip(bracket, _ends(bracket, Rule(SHARES, _KEEP)), strict=True)):
        style = line_and_markers(COLOURS[number % len(COLOURS)], number)
        style["line"]["dash"] = "solid"
        x, y = row["tokens"], row[_MEASURE]
        drawn.add_scatter(x=x[: end + 1], y=y[: end + 1], name=f"{row['lr']:g}", **style)
        dotted = style["line"] | {"dash": "dot"}
        drawn.add_scatter(x=x[end:], y=y[end:], mode="lines", showlegend=False, line=dotted)
    titles = {"xaxis": "training tokens", "yaxis": "CE gap (nats per token)", "legend": "learning rate"}
    return finished(drawn.update_layout({f"{part}_title_text": title for part, title in titles.items()}))


def with_tables(page: str, rows: Sequence[Row]) -> str:
    """The text of the page with the tables of these rows."""
    return pages.with_tables(page, lambda name: TABLES[name](rows))


def main() -> None:
    """Write the curves, the figure and the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--outputs", type=Path, nargs="+")
    given = parser.parse_args()
    curves = given.page.with_suffix("") / "curves.json"
    rows: list[Row] = json.loads(curves.read_text()) if curves.exists() else []
    if given.outputs:
        names = {path.name for path in given.outputs}
        rows = [row for row in rows if row["sweep"] not in names]
        rows += [row for path in given.outputs for row in record(sae_lora.load_sweep(path))]
        curves.parent.mkdir(parents=True, exist_ok=True)
        curves.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        write_svgs({"curves": figure(rows)}, curves.parent)
    given.page.write_text(with_tables(given.page.read_text(), rows))


if __name__ == "__main__":
    main()
