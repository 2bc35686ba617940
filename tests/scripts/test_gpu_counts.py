"""The record of steps that were counted without a GPU."""

import json
import re

from scripts import gpu_counts, pages
from tests.support.commands import REPOSITORY

RECORD = json.loads((REPOSITORY / "docs/results/gpu_counted.json").read_text())
PAGE = (REPOSITORY / "docs/performance.md").read_text()


def test_the_table_of_the_page_is_that_of_its_record() -> None:
    assert pages.with_tables(PAGE, lambda _: gpu_counts.rows_of(RECORD)) == PAGE
    assert re.findall(r"<!-- (\w+) -->", PAGE) == ["counted"]
    assert [*RECORD] == [gpu_counts._key(case) for case in gpu_counts.CASES]


def test_what_the_page_says_of_it() -> None:
    for case, row in zip(gpu_counts.CASES, RECORD.values(), strict=True):
        if case.published:
            continue
        sparse = case.saes if case.width >= 131_072 else 0
        assert sum(row["waits"].values()) == sparse
        assert abs(row["estimated"] / row["peak"] - 1) < 0.1
        assert row["planned"] == row["estimated"]
