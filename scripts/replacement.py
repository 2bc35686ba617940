"""The tables of the page about replacement models, from the record of `sae-lora compare replacement`.

sae-lora compare replacement outputs/replacement --to docs/results/replacement
python -m scripts.replacement docs/results/replacement
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sae_lora.records.factors import label, text
from sae_lora.records.metrics import METRICS
from sae_lora.report.repeats import mean_of
from scripts import pages

Row = dict[str, Any]


def ways(rows: list[Row]) -> str:
    """A row for each way: gap, KL and top-1 agreement, means over seeds with 95% intervals."""
    names = list(rows[0]["settings"])
    columns = {label(name): [text(row["settings"][name]) for row in rows] for name in names}
    columns["trained weights"] = pages.whole(row["trained_weights"] for row in rows)
    for name in ("gap_closed", "kl", "top1"):
        metric = METRICS["top1_agreement" if name == "top1" else name]
        columns[metric.name] = [mean_of(row[name]).written(metric.written) for row in rows]
    return pages.markdown(columns)


def before(rows: list[Row]) -> str:
    """The model with all transcoders before training."""
    first = rows[0]
    columns = {"": ["before training"]}
    for name in ("initial_gap", "initial_kl", "initial_top1"):
        metric = METRICS["top1_agreement" if name == "initial_top1" else name]
        columns[metric.name] = [mean_of(first[name]).written(metric.written)]
    return pages.markdown(columns)


def blocks(rows: list[Row]) -> str:
    """CE that each block adds, in thousandths of a nat per token, before training and after it."""
    columns: dict[str, list[str]] = {"block": [str(block["block"]) for block in rows[0]["blocks"]]}
    columns["alone"] = _thousandths(rows[0], "alone")
    columns["with all others"] = _thousandths(rows[0], "before")
    for row in _of_one_rank(rows):
        columns[_named(row)] = _thousandths(row, "after")
    return pages.markdown(columns)


def _thousandths(row: Row, name: str) -> list[str]:
    return [f"{1e3 * block[name]:+.1f}" for block in row["blocks"]]


def depth(rows: list[Row]) -> str:
    """Distance of the residual stream to the plain model's after each block, relative to its norm."""
    distances = rows[0]["distance"]["before"]
    columns = {"after block": [str(number) for number in range(len(distances))]}
    columns["before training"] = pages.percent(distances)
    for row in _of_one_rank(rows):
        columns[_named(row)] = pages.percent(row["distance"]["after"])
    return pages.markdown(columns)


def _of_one_rank(rows: list[Row]) -> list[Row]:
    """The ways with the default rank, and those without one."""
    return [row for row in rows if row["settings"].get("rank") in (16, None)]


def _named(row: Row) -> str:
    return ", ".join(text(value) for value in row["settings"].values() if value is not None)


TABLES = {"ways": ways, "before": before, "blocks": blocks, "depth": depth}


def with_tables(page: str, folder: Path) -> str:
    """The text of the page with the tables of the record in a folder."""
    rows = json.loads((folder / "replacement.json").read_text())
    return pages.with_tables(page, lambda name: TABLES[name](rows))


def main() -> None:
    """Write the tables into the page beside the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="docs/results/replacement; its page is beside it")
    folder: Path = parser.parse_args().folder
    page = folder.with_suffix(".md")
    page.write_text(with_tables(page.read_text(), folder))


if __name__ == "__main__":
    main()
