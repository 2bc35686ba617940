"""The tables of the page about replacement models, from the record of `sae-lora compare replacement`.

    sae-lora compare replacement outputs/replacement --to docs/results/replacement
    python -m scripts.replacement docs/results/replacement --graphs outputs/replacement

`--graphs` also copies the results of the suite `circuits` of the sweep's runs with seed 0 and rank 16.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sae_lora.common.files import as_json, write_atomically
from sae_lora.config.enums import Suite
from sae_lora.evaluation.suite_records import read
from sae_lora.records.factors import label, text, values_of
from sae_lora.records.folder import runs_of
from sae_lora.records.metrics import METRICS
from sae_lora.report.repeats import mean_of
from scripts import pages

Row = dict[str, Any]
Graphs = dict[str, dict[str, Any]]
"""Results of the suite `circuits` by what a run trained."""


def ways(rows: list[Row]) -> str:
    """A row for each way: gap, KL and top-1 agreement, means over seeds with 95% intervals."""
    names = list(rows[0]["settings"])
    columns = {label(name): [text(row["settings"][name]) for row in rows] for name in names}
    columns["trained weights"] = pages.whole(row["trained_weights"] for row in rows)
    for heading, name in {
        "gap closed": "gap_closed",
        "KL closed": "kl_closed",
        "top-1 gain": "top1_gain",
    }.items():
        columns[heading] = [mean_of(row[name]).written(METRICS["gap_closed"].written) for row in rows]
    columns["seeds"] = [str(len(row["kl_closed"])) for row in rows]
    return pages.markdown(columns)


def before(rows: list[Row]) -> str:
    """The model with all transcoders before training."""
    first = max(rows, key=lambda row: len(row["initial_kl"]))
    columns = {"": ["before training"]}
    for name in ("initial_gap", "initial_kl", "initial_top1"):
        metric = METRICS["top1_agreement" if name == "initial_top1" else name]
        columns[metric.name] = [mean_of(first[name]).written(metric.written)]
    return pages.markdown(columns)


def blocks(rows: list[Row]) -> str:
    """CE that each block adds, in thousandths of a nat per token, before training and after it."""
    columns: dict[str, list[str]] = {"block": [str(block["block"]) for block in rows[0]["blocks"]]}
    columns["alone"] = _thousandths(_of_one_rank(rows)[0], "alone")
    columns["with all others"] = _thousandths(_of_one_rank(rows)[0], "before")
    for row in _of_one_rank(rows):
        columns[_named(row)] = _thousandths(row, "after")
    return pages.markdown(columns)


def _thousandths(row: Row, name: str) -> list[str]:
    return [f"{1e3 * block[name]:+.1f}" for block in row["blocks"]]


def depth(rows: list[Row]) -> str:
    """Distance of the residual stream to the plain model's after each block, relative to its norm."""
    distances = _of_one_rank(rows)[0]["distance"]["before"]
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


def graphs(results: Graphs) -> str:
    """Scores of attribution graphs, means over prompts with 95% intervals, before and after each way."""
    columns: dict[str, list[str]] = {"": ["before training", *results]}
    first = next(iter(results.values()))["means"]["spliced"]
    for name in ("replacement", "completeness", "error_nodes"):
        after = [each["means"]["student"][name] for each in results.values()]
        columns[name.replace("_", " ")] = [_bounded(number) for number in (first[name], *after)]
    changes = [_bounded(each["change"]["replacement"]) for each in results.values()]
    columns["change of replacement"] = ["", *changes]
    return pages.markdown(columns)


def prompts(results: Graphs) -> str:
    """The replacement score of each prompt, before training and after each way."""
    first = next(iter(results.values()))
    columns = {"prompt": [f"`{json.dumps(text)[1:-1]}`" for text in first["prompts"]]}
    of_ways = {"before": first["graphs"]["spliced"]}
    of_ways |= {name: each["graphs"]["student"] for name, each in results.items()}
    for name, of_prompts in of_ways.items():
        columns[name] = [f"{graph['replacement']:.3f}" for graph in of_prompts]
    return pages.markdown(columns)


def _bounded(number: dict[str, float]) -> str:
    return f"{number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}]"


TABLES = {"ways": ways, "before": before, "blocks": blocks, "depth": depth}
OF_GRAPHS = {"graphs": graphs, "prompts": prompts}


def with_tables(page: str, folder: Path) -> str:
    """The text of the page with the tables of the records in a folder."""
    rows = json.loads((folder / "replacement.json").read_text())
    results = json.loads((folder / "circuits.json").read_text())
    return pages.with_tables(
        page, lambda name: TABLES[name](rows) if name in TABLES else OF_GRAPHS[name](results)
    )


def collected(sweep: Path) -> Graphs:
    """The results of the suite `circuits` of the sweep's runs with seed 0 and rank 16, or no rank."""
    results = {}
    for folder in runs_of(sweep):
        record = read(folder, Suite.circuits)
        factors = values_of(folder.read_config(), {})
        if record is not None and factors["seed"] == 0 and factors["rank"] in (16, None):
            values = [factors[name] for name in ("method", "targets") if factors[name] is not None]
            results[", ".join(map(text, values))] = record.results
    return results


def main() -> None:
    """Write the tables into the page beside the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="docs/results/replacement; its page is beside it")
    parser.add_argument("--graphs", type=Path, metavar="SWEEP", help="outputs/<sweep>")
    given = parser.parse_args()
    folder: Path = given.folder
    if given.graphs is not None:
        write_atomically(folder / "circuits.json", as_json(collected(given.graphs)))
    page = folder.with_suffix(".md")
    page.write_text(with_tables(page.read_text(), folder))


if __name__ == "__main__":
    main()
