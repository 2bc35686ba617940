"""Waits, kernels and memory of steps on a GPU, counted without one, at the sizes of real models.

    python -m scripts.gpu_counts docs/results/gpu_counted.json --page docs/performance.md

A step of each pack runs on torch's fake tensors, which have shapes and no numbers, on a stand-in for
CUDA (`tests/support/fake_cuda.py`). Nothing is timed. It needs a C++ compiler. A pack takes one to ten
minutes, and the record is written after each. `--only 3 7` counts only these packs, `--only` none.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lora.common.console import say
from sae_lora.common.files import as_json, write_atomically
from scripts import pages
from tests.support.fake_cuda import Case, count

FIVE = (1, 4, 16, 64, 256)
CASES = (
    Case("gemma-2-2b", (16,)),
    Case("gemma-2-2b", (64,)),
    Case("gemma-2-2b", (256,)),
    Case("gemma-2-2b", FIVE),
    Case("gemma-2-2b", (16,) * 8),
    Case("gemma-2-2b", (64,) * 8),
    Case("gemma-2-2b", (256,) * 8),
    Case("gemma-2-2b", (16,), batch=4),
    Case("gemma-2-2b", FIVE, batch=4),
    Case("gemma-2-2b", FIVE, saes=5),
    Case("gemma-2-2b", (16,), width=524_288),
    Case("gemma-2-2b", FIVE, saes=5, width=524_288),
    Case("gemma-2-9b", (16,)),
    Case("gemma-2-9b", (64,) * 4),
    Case("gemma-2-9b", FIVE),
    Case("gemma-2-9b", (16,) * 8),
    Case("gemma-2-9b", (64,), batch=4),
    Case("gemma-2-27b", (64,), width=131_072),
    Case("llama-3-8b", (16,)),
    Case("llama-3-8b", FIVE),
    Case("llama-3-8b", (16,), batch=4),
    Case("gemma-2-2b", (16,), published=True, overrides={"train.compile": "off"}),
    Case("gemma-2-2b", (16,), published=True),
    Case("gemma-2-2b", (16,), overrides={"train.compile": "off"}),
    Case("gemma-2-2b", FIVE, overrides={"train.compile": "off"}),
)
_NAMES = {
    "gemma-2-2b": "Gemma-2-2B",
    "gemma-2-9b": "Gemma-2-9B",
    "gemma-2-27b": "Gemma-2-27B",
    "llama-3-8b": "Llama-3-8B",
}
Row = dict[str, Any]


def rows_of(counted: dict[str, Row]) -> str:
    """The table of the packs that were counted."""
    columns: dict[str, list[str]] = {}
    for case in CASES:
        row = counted.get(_key(case))
        if row is None:
            continue
        runs = len(case.ranks) * case.saes
        estimated = "" if case.published else f"{row['estimated'] / 1e9:.1f}"
        for heading, cell in {
            "model, ranks": _title(case),
            "waits": f"{sum(row['waits'].values())}",
            "kernels per run": f"{row['kernels'] / runs:,.0f}",
            "GB moved per run": f"{row['moved'] / 1e9 / runs:.0f}",
            "projected ms per run": f"{1e3 * row['seconds'] / runs:.0f}",
            "peak, GB": f"{row['peak'] / 1e9:.1f}",
            "estimated, GB": estimated,
        }.items():
            columns.setdefault(heading, []).append(cell)
    return pages.markdown(columns)


PROFILED = (0, 3, 9, 21, 22)
"""Numbers of the packs whose projected time is shown by what it is for."""
_PARTS = {
    "products": "products",
    "attention": "attention",
    "rest": "other kernels",
    "starts": "starts of kernels",
}


def parts_of(counted: dict[str, Row]) -> str:
    """The table of what the projected time of packs is for, in milliseconds per run."""
    columns: dict[str, list[str]] = {}
    for case in map(CASES.__getitem__, PROFILED):
        row = counted.get(_key(case))
        if row is None:
            continue
        runs = len(case.ranks) * case.saes
        columns.setdefault("model, ranks", []).append(_title(case))
        for name, heading in _PARTS.items():
            columns.setdefault(heading, []).append(f"{1e3 * row['parts'].get(name, 0.0) / runs:.1f}")
        columns.setdefault("all", []).append(f"{1e3 * row['seconds'] / runs:.1f}")
    return pages.markdown(columns)


TABLES = {"counted": rows_of, "parts": parts_of}
"""The tables of the page by the names in its comments."""


def _title(case: Case) -> str:
    """The first cell of a pack's row."""
    return f"{_NAMES[case.model]}, {_named(case)}{_way(case)}"


def _named(case: Case) -> str:
    """The ranks of a pack, and its differences from one SAE of 16k latents and one sequence."""
    width = "" if case.width == CASES[0].width else f" of {case.width // 1024}k latents"
    saes = f"; {case.saes} SAEs{width}" if case.saes > 1 else width and f"; SAE{width}"
    return f"{_ranks(case)}{saes}" + (f"; {case.batch} sequences" if case.batch > 1 else "")


def _way(case: Case) -> str:
    """The loop, if it is not that of this package, and whether blocks are compiled, if it differs."""
    is_compiled = not case.overrides
    if case.published:
        return "; published loop" + ", compiled" * is_compiled
    return "" if is_compiled else "; not compiled"


def _ranks(case: Case) -> str:
    same = len(set(case.ranks)) == 1
    ranks = f"{len(case.ranks)} × {case.ranks[0]}" if same else ", ".join(map(str, case.ranks))
    return ranks.removeprefix("1 × ")


def _key(case: Case) -> str:
    saes = f"; {case.saes} SAEs" if case.saes > 1 else ""
    return f"{case.model} {_ranks(case)}{saes} width {case.width} batch {case.batch}{_way(case)}"


def main() -> None:
    """Count, and write the record and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument(
        "--page", type=Path, help="page with tables after <!-- counted --> and <!-- parts -->"
    )
    parser.add_argument("--only", type=int, nargs="*", help="numbers of packs, from 0")
    given = parser.parse_args()
    counted: dict[str, Row] = json.loads(given.record.read_text()) if given.record.exists() else {}
    chosen: Sequence[int] = range(len(CASES)) if given.only is None else given.only
    for number in chosen:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            (row,) = count([CASES[number]], Path(folder))
        counted[_key(CASES[number])] = dataclasses.asdict(row)
        write_atomically(given.record, as_json(counted))
        say(f"{_key(CASES[number])}: {time.monotonic() - start:.0f} s")
    if given.page is not None:
        page = given.page.read_text()
        given.page.write_text(pages.with_tables(page, lambda name: TABLES[name](counted)))


if __name__ == "__main__":
    main()
