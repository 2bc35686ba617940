"""The record of steps that were counted without a GPU."""

import json
import re

import pytest

from scripts import gpu_counts, pages
from tests.support.commands import REPOSITORY

RECORD = json.loads((REPOSITORY / "docs/results/gpu_counted.json").read_text())
PAGE = (REPOSITORY / "docs/performance.md").read_text()


def test_the_tables_of_the_page_are_those_of_its_record() -> None:
    assert pages.with_tables(PAGE, lambda name: gpu_counts.TABLES[name](RECORD)) == PAGE
    assert re.findall(r"<!-- (\w+) -->", PAGE) == list(gpu_counts.TABLES)
    assert [*RECORD] == [gpu_counts._key(case) for case in gpu_counts.CASES]


def test_the_parts_of_the_projected_time_are_all_of_it() -> None:
    for number in gpu_counts.PROFILED:
        row = RECORD[gpu_counts._key(gpu_counts.CASES[number])]
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
        assert row["parts"]["starts"] == pytest.approx(2e-6 * row["kernels"])


def test_what_the_page_says_of_it() -> None:
    for case, row in zip(gpu_counts.CASES, RECORD.values(), strict=True):
        if case.published:
            continue
        sparse = case.saes if case.width >= 131_072 else 0
        assert sum(row["waits"].values()) == sparse
        assert abs(row["estimated"] / row["peak"] - 1) < 0.1
        assert row["planned"] == row["estimated"]
