"""Writes docs/metrics.md from the table of metrics: `python -m scripts.metrics_page`."""

from pathlib import Path

from sae_lora.records.metrics import METRICS

FILE = Path(__file__).parents[1] / "docs" / "metrics.md"
_HEAD = """\
# Metrics

What is measured of a run, from `sae_lora/records/metrics.py` (`python -m scripts.metrics_page` writes
this page). Cross-entropies and KL are means over held-out tokens.

| name | field | unit | better | what it is |
|---|---|---|---|---|
"""


def page() -> str:
    """The page as Markdown."""
    rows = []
    for metric in METRICS.values():
        cells = metric.name, f"`{metric.key}`", metric.unit, metric.better, metric.text
        rows.append(f"| {' | '.join(cells)} |")
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    FILE.write_text(page())
