"""Distances to the plain model are zero where nothing is changed, and elsewhere what they say."""

from pathlib import Path

import pytest
import torch

from sae_lora.config.enums import Suite
from sae_lora.config.evaluation import EvaluationConfig
from sae_lora.config.schema import LoRAConfig
from sae_lora.evaluation import run_suites, suite_records
from sae_lora.evaluation.bootstrap import Interval
from sae_lora.evaluation.mechanism import evaluate
from sae_lora.evaluation.subject import Cell
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes.loading import IdentitySAE
from sae_lora.splice.hooks import Reading, Splice
from tests.support.coders import topk_sae
from tests.support.families import D_MODEL, N_BLOCKS, random_tokens, small_model
from tests.support.points import run_here
from tests.support.subjects import Made, quick_points_in

pytestmark = pytest.mark.slow  # many seconds in all

QUICK = EvaluationConfig(resamples=50)
ADAPTERS = LoRAConfig(rank=2, blocks="all")
SPLICES = (Splice(1, topk_sae(), keeps=False),)


def values(found: list[Interval]) -> list[float]:
    assert all(one.value is not None for one in found)
    return [one.value for one in found if one.value is not None]


def test_what_changes_nothing_moves_nothing(model: LanguageModel) -> None:
    """An SAE that puts back what it reads, and adapters whose B is zero."""
    subject = Made(model, (Splice(1, IdentitySAE(), keeps=False),), ADAPTERS, filled=False)
    found = evaluate(subject, QUICK)
    assert list(found.distance) == ["spliced", "student", "adapted"]
    for moved in found.distance.values():
        assert values(moved["l2"]) == [0.0] * N_BLOCKS
        assert values(moved["cosine"]) == pytest.approx([0.0] * N_BLOCKS, abs=1e-12)
    assert found.shortened is None


def test_distances_are_those_of_transformers_own_hidden_states(model: LanguageModel) -> None:
    """Of the adapted cell, as transformers gives it and without any hook; the last is behind a norm."""
    subject = Made(model, (Splice(1, IdentitySAE(), keeps=False),), ADAPTERS)
    with torch.no_grad():
        states = [
            torch.stack(one.model(subject.tokens, output_hidden_states=True).hidden_states).double()
            for one in (subject.with_adapters, model)
        ]
    moved, clean = (one[1:N_BLOCKS] for one in states)
    cosine = (moved * clean).sum(-1) / (moved.norm(dim=-1) * clean.norm(dim=-1))
    found = evaluate(subject, QUICK)
    adapted = found.distance["adapted"]
    l2 = (moved - clean).norm(dim=-1).mean((1, 2))
    assert l2.min() > 0.01
    assert values(adapted["l2"])[:-1] == pytest.approx(l2.tolist(), rel=1e-5)
    assert values(adapted["cosine"])[:-1] == pytest.approx((1 - cosine).mean((1, 2)).tolist(), rel=1e-4)
    assert values(found.norm)[:-1] == pytest.approx(clean.norm(dim=-1).mean((1, 2)).tolist(), rel=1e-5)
    assert len(adapted["l2"]) == N_BLOCKS


def test_an_sae_moves_from_its_own_block_on_and_by_its_error_there() -> None:
    subject = Made(small_model("llama"), SPLICES, LoRAConfig(rank=2))
    errors = []

    def observe(reading: Reading) -> None:
        errors.append((reading.resid - reading.recon).double().norm(dim=-1))

    for tokens in subject.batches():
        subject.hidden(Cell.spliced, tokens, observe)
    distance = evaluate(subject, QUICK).distance
    spliced, student, adapted = (values(one["l2"]) for one in distance.values())
    assert spliced[0] == student[0] == adapted[0] == 0.0
    assert spliced[1] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-6)
    assert adapted[1] == 0.0 and adapted[2] > 0  # adapters stand after the SAE alone
    assert student[1] == spliced[1] and student[2] != spliced[2]
    assert min(spliced[1:]) > 0


def test_the_share_is_of_the_last_blocks_distance() -> None:
    subject = Made(small_model("llama"), SPLICES, LoRAConfig(rank=2))
    found = evaluate(subject, QUICK)
    assert found.shortened is not None
    for kind in ("l2", "cosine"):
        spliced, student = (values(found.distance[cell][kind])[-1] for cell in ("spliced", "student"))
        share = found.shortened[kind]
        assert share.value == pytest.approx(1 - student / spliced, rel=1e-9)
        assert share.low <= share.value <= share.high


def test_special_tokens_that_keep_their_activation_are_left_out() -> None:
    tokens = random_tokens(batch=4, length=10, seed=9)
    special = torch.unique(tokens[:, 0])
    subject = Made(
        small_model("llama"),
        (Splice(1, topk_sae(), keeps=True),),
        ADAPTERS,
        tokens=tokens,
        special_ids=special,
    )
    counted = ~torch.isin(tokens, special)
    found = evaluate(subject, QUICK)
    assert found.tokens == int(counted.sum()) < tokens.numel()
    moved, clean = (subject.streams(cell, tokens)[2][counted] for cell in (Cell.adapted, Cell.base))
    expected = float((moved - clean).double().norm(dim=-1).mean())
    assert values(found.distance["adapted"]["l2"])[2] == pytest.approx(expected, rel=1e-5)
    # Where none keeps its activation, all are measured.
    replaced = Made(small_model("llama"), SPLICES, tokens=tokens)
    assert evaluate(replaced, QUICK).tokens == tokens.numel()


def test_the_first_sequences_are_read() -> None:
    model = small_model("llama")
    tokens = random_tokens(batch=6, length=12, seed=3)
    few = evaluate(Made(model, SPLICES, tokens=tokens), EvaluationConfig(resamples=50, sequences=3))
    alone = evaluate(Made(model, SPLICES, tokens=tokens[:3]), QUICK)
    assert few.sequences == alone.sequences == 3
    assert values(few.distance["student"]["l2"]) == pytest.approx(
        values(alone.distance["student"]["l2"])
    )


def test_sequences_that_are_alike_leave_no_doubt() -> None:
    alike = random_tokens(batch=1, length=12).expand(5, -1)
    for tokens, sure in ((alike, True), (random_tokens(batch=5, length=12), False)):
        found = evaluate(Made(small_model("llama"), SPLICES, tokens=tokens), QUICK)
        last = found.distance["spliced"]["l2"][-1]
        assert last.low is not None and last.high is not None
        assert (last.high - last.low < 1e-9 * last.high) == sure


def test_the_residual_stream_has_the_models_width() -> None:
    subject = Made(small_model("gpt2"), SPLICES, ADAPTERS)
    for cell in Cell:
        streams = subject.streams(cell, subject.tokens)
        assert [stream.shape for stream in streams] == [(*subject.tokens.shape, D_MODEL)] * N_BLOCKS


@pytest.mark.parametrize(
    ("method", "cells"),
    [
        ("lora", ["spliced", "student", "adapted"]),
        ("linear_adapter", ["spliced", "student"]),
        ("e2e", ["student"]),
    ],
)
def test_each_cell_that_a_run_has_is_kept_in_its_folder(
    method: str, cells: list[str], tmp_path: Path
) -> None:
    (folder,) = run_here(quick_points_in(tmp_path)(f"method={method}"))
    config = EvaluationConfig(resamples=20, sequences=3)
    assert run_suites.evaluate(folder, [Suite.mechanism], config) == []
    there = suite_records.read(folder, Suite.mechanism)
    assert there is not None
    assert there.settings == {"resamples": 20, "sequences": 3}
    results = there.results
    assert list(results["distance"]) == cells
    assert results["sequences"] == 3
    assert (results["shortened"] is None) == ("spliced" not in cells)
    if "spliced" in cells:
        l2 = [one["value"] for one in results["distance"]["spliced"]["l2"]]
        assert l2[:3] == [0.0] * 3 and l2[3] > 0  # the embedded SAE sits after block 3
