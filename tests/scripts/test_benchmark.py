"""The benchmark counts FLOPs, time and memory, and its command writes the record that it prints."""

import json
import multiprocessing
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from sae_lora.cli import main
from scripts.benchmark import compare, profile, rivals
from scripts.benchmark.compare import compare_evaluations, compare_saes, compare_steps
from scripts.benchmark.profile import work_of
from scripts.benchmark.shapes import Shape, Style
from tests.support.commands import REPOSITORY

CPU = torch.device("cpu")
TINY = Shape(
    d_model=16,
    d_mlp=32,
    n_blocks=3,
    n_heads=2,
    n_kv_heads=1,
    d_head=8,
    d_vocab=64,
    sae_block=0,
    d_sae=32,
    k=4,
)


def test_the_work_of_products() -> None:
    """Forward and backward pass of a product: three products of one size."""
    first = torch.ones(3, 5, requires_grad=True)
    second = torch.ones(5, 7, requires_grad=True)

    def call() -> None:
        (first @ second).sum().backward()

    work = work_of(call, CPU)
    assert work.flops == 3 * 2 * 3 * 5 * 7
    assert work.in_products < 1
    assert 0 < sum(work.operators.values()) <= 1 + 1e-9
    assert 0 < work.operators["aten::mm"] <= work.in_products
    assert work.flops_per_second > 0


def test_the_work_of_attention() -> None:
    """Two products forward; five backward: the scores again, and two for each of the two."""
    query, key, value = (torch.ones(2, 4, 6, 8, requires_grad=True) for _ in range(3))

    def call() -> None:
        attend(query, key, value, is_causal=True).sum().backward()

    work = work_of(call, CPU)
    assert work.flops == 7 * 2 * (2 * 4) * 6 * 6 * 8
    assert 0 < work.in_products < 1


def test_other_operations_count_as_memory_only() -> None:
    tensors: list[Tensor] = []
    work = work_of(lambda: tensors.append(torch.zeros(1000)), CPU)
    assert (work.flops, work.in_products, work.flops_per_second) == (0, 0, 0)
    assert work.peak_bytes == 4000


@pytest.mark.slow
def test_comparisons() -> None:
    options = 1, CPU, torch.float32
    for row in (
        compare_steps(Style.llama, TINY, 16, 5, *options),
        compare_evaluations(Style.gemma2, TINY, 16, *options),
        compare_saes(TINY, *options),
    ):
        assert row.times.least == row.times.median == row.times.most > 0
        assert row.seconds > 0
        assert 0 < row.work.in_products < 1


@pytest.mark.slow
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fork = multiprocessing.get_context("fork")  # a new process would import everything again
    monkeypatch.setattr(compare.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(compare, "SIZES", (1,))
    for shape in ("SMALL", "WIDE"):
        monkeypatch.setattr(compare, shape, TINY)
    small = partial(compare.head_memory, tokens=64, d_vocab=4096, d_model=32)
    monkeypatch.setattr(compare, "head_memory", small)
    monkeypatch.setitem(profile._SIDE, "cpu", 256)
    record = tmp_path / "here" / "record.json"
    assert main([*"benchmark --style llama --context 32 --rounds 1 --to".split(), str(record)]) == 0
    printed = capsys.readouterr().out
    written = json.loads(record.read_text())
    assert len(written["rows"]) == 2  # a pack of each size, and the evaluation
    assert all(row["what"] in printed for row in written["rows"])
    assert written["equalities"][0]["error"] == 0


@pytest.mark.slow
def test_rivals_train_the_same_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals, "SMALL", TINY)
    monkeypatch.setitem(profile._SIDE, "cpu", 256)
    record = tmp_path / "rivals.json"
    options = "--style llama --context 32 --rounds 1 --packs 1 2 --uncompiled"
    monkeypatch.setattr("sys.argv", ["rivals", str(record), *options.split()])
    rivals.main()
    rows = json.loads(record.read_text())["rows"]
    assert [row["runs"] for row in rows] == [1, 1, 1, 2, 2]
    assert all(row["error"] < 1e-3 and row["seconds"] > 0 and row["flops"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(row["what"] in printed for row in rows)


def test_the_tables_of_rivals_are_those_of_their_records() -> None:
    page = REPOSITORY / "docs/results/rivals.md"
    text = page.read_text()
    assert rivals.with_tables(text, page.with_suffix("")) == text
