"""Write docs/metrics.md and docs/configuration.md: `python -m scripts.reference_pages`."""

import enum
import operator
from itertools import groupby
from pathlib import Path
from typing import Any

from sae_lora.config.compose import CONF, default
from sae_lora.config.reference import documented_keys, groups
from sae_lora.config.serialize import written
from sae_lora.records.metrics import METRICS

DOCS = Path(__file__).parents[1] / "docs"
_METRICS = """\
# Metrics

The measures of a run, from `sae_lora/records/metrics.py`. Cross-entropies and KL are means over held-out
tokens. `python -m scripts.reference_pages` writes this page.

| name | field | unit | better | meaning |
|---|---|---|---|---|
"""
_CONFIGURATION = """\
# Configuration reference

Every config group with its options, and every key with its default value. `sae-lora launch --help`
prints the same with the values of your own command line. Choose an option with `group=option`, set a
value with `key=value`. `python -m scripts.reference_pages` writes this page from `conf/` and the schema.

"""


def metrics() -> str:
    """The metrics page, as Markdown."""
    rows = []
    for metric in METRICS.values():
        rows.append(
            f"| {metric.name} | `{metric.key}` | {metric.unit} | {metric.better} | {metric.text} |"
        )
    return _METRICS + "\n".join(rows) + "\n"


def configuration() -> str:
    """The configuration reference, as Markdown, with the options and keys of each group."""
    sections: dict[str, str] = {}
    for group, options in groups().items():
        rows = [f"| `{option}` | {_about(group, option)} |" for option in options]
        sections[group] = "\n".join([f"## `{group}`\n", "| option | |", "|---|---|", *rows, ""])
    for group, keys in groupby(documented_keys(), operator.attrgetter("group")):
        rows = [
            f"| `{key.name}` | {_code(operator.attrgetter(key.name)(default()))} | {_cell(key.kind)} "
            f"| {_cell(key.text)} |"
            for key in keys
        ]
        sections.setdefault(group, "## The whole run\n")
        sections[group] += "\n".join(["", "| key | default | type | |", "|---|---|---|---|", *rows, ""])
    return _CONFIGURATION + "\n".join(sections.values())


def _about(group: str, option: str) -> str:
    """The description of an option: the comment of its file, without the command."""
    lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
    comments = [line for line in lines if line.startswith("#") and "# @package" not in line]
    prose = [line.removeprefix("# ") for line in comments if "python launch.py" not in line]
    return _cell(" ".join(line for line in prose if not line.startswith("  ")))


def _code(value: Any) -> str:
    plain = value.name if isinstance(value, enum.Enum) else value
    return f"`{written(plain)}`"


def _cell(text: str) -> str:
    """Text with escaped `|`, which would end a cell of a table."""
    return text.replace("|", "\\|")


PAGES = {"metrics.md": metrics, "configuration.md": configuration}
"""Functions that make the pages, by file."""

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
