"""Distances to the plain model: zero without a change, and else equal to a direct computation."""

from pathlib import Path

import pytest
import torch

from sae_lora.config.enums import Suite
from sae_lora.config.execution import EvaluationConfig
from sae_lora.config.schema import LoRAConfig
from sae_lora.evaluation import run_suites, suite_records
from sae_lora.evaluation.bootstrap import Interval
from sae_lora.evaluation.mechanism import evaluate
from sae_lora.evaluation.subject import Cell
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes.loading import IdentitySAE
from sae_lora.splice.hooks import Reading, Splice
from sae_lora.splice.positions import Special
from tests.support.coders import topk_sae
from tests.support.families import D_MODEL, N_BLOCKS, random_tokens, small_model
from tests.support.points import run_here
from tests.support.subjects import Made, quick_points_in

pytestmark = pytest.mark.slow  # many seconds in all

QUICK = EvaluationConfig(resamples=50)
ADAPTERS = LoRAConfig(rank=2, blocks="all")
SPLICES = (Splice(1, topk_sae()),)


def values(intervals: list[Interval]) -> list[float]:
    assert all(interval.value is not None for interval in intervals)
    return [interval.value for interval in intervals if interval.value is not None]


def test_without_a_change_all_distances_are_zero(model: LanguageModel) -> None:
    """With an SAE without error and adapters whose B is zero."""
    subject = Made(model, (Splice(1, IdentitySAE()),), ADAPTERS, filled=False)
    result = evaluate(subject, QUICK)
    assert list(result.distance) == ["spliced", "student", "adapted"]
    for distance in result.distance.values():
        assert values(distance["l2"]) == [0.0] * N_BLOCKS
        assert values(distance["cosine"]) == pytest.approx([0.0] * N_BLOCKS, abs=1e-12)
    assert result.shortened is None


class Rotated:
    """An SAE without error but for rounding: it rotates its input, and back."""

    def __init__(self) -> None:
        noise = torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(0))
        self._rotation = torch.linalg.qr(noise)[0]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self._rotation

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return feature_acts @ self._rotation.T


def test_a_distance_that_rounding_explains_cannot_be_shortened(model: LanguageModel) -> None:
    result = evaluate(Made(model, (Splice(1, Rotated()),), ADAPTERS), QUICK)
    assert 0 < values(result.distance["spliced"]["l2"])[-1] < 1e-5 * values(result.norm)[-1]
    assert result.shortened is None


def test_distances_equal_those_of_transformers_hidden_states(model: LanguageModel) -> None:
    """For the adapted cell, without any hook. Transformers' last hidden state is after the norm."""
    subject = Made(model, (Splice(1, IdentitySAE()),), ADAPTERS)
    with torch.no_grad():
        states = [
            torch.stack(lm.model(subject.tokens, output_hidden_states=True).hidden_states).double()
            for lm in (subject.with_adapters, model)
        ]
    moved, clean = (hidden[1:N_BLOCKS] for hidden in states)
    cosine = (moved * clean).sum(-1) / (moved.norm(dim=-1) * clean.norm(dim=-1))
    result = evaluate(subject, QUICK)
    adapted = result.distance["adapted"]
    l2 = (moved - clean).norm(dim=-1).mean((1, 2))
    assert l2.min() > 0.01
    assert values(adapted["l2"])[:-1] == pytest.approx(l2.tolist(), rel=1e-5)
    assert values(adapted["cosine"])[:-1] == pytest.approx((1 - cosine).mean((1, 2)).tolist(), rel=1e-4)
    assert values(result.norm)[:-1] == pytest.approx(clean.norm(dim=-1).mean((1, 2)).tolist(), rel=1e-5)
    assert len(adapted["l2"]) == N_BLOCKS


def test_the_distance_after_the_saes_block_is_its_error() -> None:
    subject = Made(small_model("llama"), SPLICES, LoRAConfig(rank=2))
    errors = []

    def observe(reading: Reading) -> None:
        errors.append((reading.resid - reading.recon).double().norm(dim=-1))

    for tokens in subject.batches():
        subject.hidden(Cell.spliced, tokens, observe)
    distance = evaluate(subject, QUICK).distance
    spliced, student, adapted = (values(by_kind["l2"]) for by_kind in distance.values())
    assert spliced[0] == student[0] == adapted[0] == 0.0
    assert spliced[1] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-6)
    assert adapted[1] == 0.0 and adapted[2] > 0  # only blocks after the SAE have adapters
    assert student[1] == spliced[1] and student[2] != spliced[2]
    assert min(spliced[1:]) > 0


def test_the_removed_share_is_of_the_distance_after_the_last_block() -> None:
    subject = Made(small_model("llama"), SPLICES, LoRAConfig(rank=2))
    result = evaluate(subject, QUICK)
    assert result.shortened is not None
    for kind in ("l2", "cosine"):
        spliced, student = (values(result.distance[cell][kind])[-1] for cell in ("spliced", "student"))
        share = result.shortened[kind]
        assert share.value == pytest.approx(1 - student / spliced, rel=1e-9)
        assert share.low <= share.value <= share.high


def test_special_tokens_that_keep_their_activation_are_left_out() -> None:
    tokens = random_tokens(batch=4, length=10, seed=9)
    special = torch.unique(tokens[:, 0])
    subject = Made(
        small_model("llama"),
        (Splice(1, topk_sae(), special=Special(tuple(special.tolist()))),),
        ADAPTERS,
        tokens=tokens,
    )
    counted = ~torch.isin(tokens, special)
    result = evaluate(subject, QUICK)
    assert result.tokens == int(counted.sum()) < tokens.numel()
    moved, clean = (subject.streams(cell, tokens)[2][counted] for cell in (Cell.adapted, Cell.base))
    expected = float((moved - clean).double().norm(dim=-1).mean())
    assert values(result.distance["adapted"]["l2"])[2] == pytest.approx(expected, rel=1e-5)
    # All tokens are measured if none keeps its activation.
    replaced = Made(small_model("llama"), SPLICES, tokens=tokens)
    assert evaluate(replaced, QUICK).tokens == tokens.numel()


def test_the_first_sequences_are_read() -> None:
    model = small_model("llama")
    tokens = random_tokens(batch=6, length=12, seed=3)
    limited = evaluate(Made(model, SPLICES, tokens=tokens), EvaluationConfig(resamples=50, sequences=3))
    expected = evaluate(Made(model, SPLICES, tokens=tokens[:3]), QUICK)
    assert limited.sequences == expected.sequences == 3
    assert values(limited.distance["student"]["l2"]) == pytest.approx(
        values(expected.distance["student"]["l2"])
    )


def test_equal_sequences_have_an_interval_of_no_width() -> None:
    repeated = random_tokens(batch=1, length=12).expand(5, -1)
    for tokens, has_no_width in ((repeated, True), (random_tokens(batch=5, length=12), False)):
        result = evaluate(Made(small_model("llama"), SPLICES, tokens=tokens), QUICK)
        last = result.distance["spliced"]["l2"][-1]
        assert last.low is not None and last.high is not None
        assert (last.high - last.low < 1e-9 * last.high) == has_no_width


def test_the_shape_of_the_residual_stream() -> None:
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
def test_the_record_has_the_cells_of_the_run(method: str, cells: list[str], tmp_path: Path) -> None:
    (folder,) = run_here(quick_points_in(tmp_path)(f"method={method}"))
    config = EvaluationConfig(resamples=20, sequences=3)
    assert run_suites.evaluate(folder, [Suite.mechanism], config) == []
    record = suite_records.read(folder, Suite.mechanism)
    assert record is not None
    assert record.settings == {"resamples": 20, "sequences": 3}
    results = record.results
    assert list(results["distance"]) == cells
    assert results["sequences"] == 3
    assert (results["shortened"] is None) == ("spliced" not in cells)
    if "spliced" in cells:
        l2 = [interval["value"] for interval in results["distance"]["spliced"]["l2"]]
        assert l2[:3] == [0.0] * 3 and l2[3] > 0  # the embedded SAE is after block 3
