"""The tables of the page about the meaning of latents, from the records of `sae-lora compare latents`.

sae-lora compare latents outputs/latents --to docs/results/latents
python -m scripts.latents docs/results/latents
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sae_lora.comparisons.latents import MEASURES, written
from sae_lora.records.factors import label, text
from sae_lora.records.metrics import METRICS
from sae_lora.report.repeats import mean_of
from scripts import pages

Row = dict[str, Any]
FILE = "latents.json"


def _settings(rows: list[Row]) -> dict[str, list[str]]:
    """The columns of the settings in which these ways differ."""
    names = [name for name in rows[0]["settings"] if len({row["settings"][name] for row in rows}) > 1]
    return {label(name): [text(row["settings"][name]) for row in rows] for name in names}


def _closed(values: list[float | None]) -> str:
    return mean_of(values).written(METRICS["gap_closed"].written)


def changes(rows: list[Row]) -> str:
    """A row for each way: means over seeds with 95% intervals."""
    columns = _settings(rows)
    columns["gap closed"] = [_closed(row["gap_closed"]) for row in rows]
    for name, (heading, _) in MEASURES.items():
        columns[heading] = [written(name, row["changes"][name]) for row in rows]
    columns["seeds"] = [str(len(row["gap_closed"])) for row in rows]
    return pages.markdown(columns)


def seeds(rows: list[Row]) -> str:
    """The change from the plain model to the run, beside that from one seed's model to another's."""
    rows = [row for row in rows if row["between_seeds"]]
    columns = _settings(rows)
    for name in ("cosine", "overlap", "contexts_changed"):
        columns[MEASURES[name][0]] = [written(name, row["changes"][name]) for row in rows]
        columns[f"{MEASURES[name][0]}, two seeds"] = [
            written(name, row["between_seeds"][name]) for row in rows
        ]
    return pages.markdown(columns)


def finetuned(rows: list[Row]) -> str:
    """LoRA beside the finetuned SAEs whose gap closed is nearest."""
    rows = [row for row in rows if row["finetuned"]]
    columns = _settings(rows)
    columns["gap closed"] = [_closed(row["gap_closed"]) for row in rows]
    columns["finetuned"] = [_closed(row["finetuned"]["gap_closed"]) for row in rows]
    for name in ("cosine", "overlap", "contexts_changed"):
        columns[MEASURES[name][0]] = [written(name, row["changes"][name]) for row in rows]
        columns[f"{MEASURES[name][0]}, finetuned"] = [
            written(name, row["finetuned"]["changes"][name]) for row in rows
        ]
    return pages.markdown(columns)


TABLES = {"changes": changes, "seeds": seeds, "finetuned": finetuned}


def with_tables(page: str, folder: Path) -> str:
    """The text of the page with the tables of the record in a folder."""
    rows = json.loads((folder / FILE).read_text())
    return pages.with_tables(page, lambda name: TABLES[name](rows))


def main() -> None:
    """Write the tables into the page beside the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="docs/results/latents; its page is beside it")
    folder: Path = parser.parse_args().folder
    page = folder.with_suffix(".md")
    page.write_text(with_tables(page.read_text(), folder))


if __name__ == "__main__":
    main()
