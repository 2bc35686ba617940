"""Special positions: one rule, with the same result wherever it is used."""

import pytest
import torch
from torch import Tensor

from sae_lora.config.enums import SAEFamily
from sae_lora.config.schema import SAEChoice, SAEConfig
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.run.sinks import dominant_positions
from sae_lora.saes.loading import IdentitySAE, LoadedSAE, splices
from sae_lora.saes.training.activation_buffer import ActivationBuffer, activations
from sae_lora.splice.hooks import Reading, Splice, spliced
from sae_lora.splice.mlp_input import Stream
from sae_lora.splice.positions import (
    NOT_SPECIAL,
    OUTLIER,
    Special,
    exceeds_median,
    variance_by_position,
)
from sae_lora.splice.student import Student
from sae_lora.train.evaluator import Evaluator
from tests.support.coders import topk_sae
from tests.support.families import D_MODEL, random_tokens, small_model
from tests.support.trainings import evaluator, student

TOKENS = random_tokens(batch=4, length=12, seed=8)
POST = str(Place(1))


def with_sink(position: int, family: str = "llama", size: float = 300.0) -> LanguageModel:
    """A model whose residual stream after block 1 is very large at one position of each sequence."""
    model = small_model(family)
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2))

    def enlarge(module: object, arguments: object, output: Tensor) -> Tensor:
        result = output.clone()
        result[:, position] += size * direction
        return result

    model.blocks[1].register_forward_hook(enlarge)
    return model


def test_positions_by_token_place_and_norm() -> None:
    tokens = torch.tensor([[5, 1, 2, 1], [2, 2, 1, 2]])
    assert not NOT_SPECIAL.positions(tokens).any()
    assert Special((1,)).positions(tokens).tolist() == [
        [False, True, False, True],
        [False, False, True, False],
    ]
    first = Special(first=True)
    assert first.positions(tokens).nonzero().tolist() == [[0, 0], [1, 0]]
    begins = torch.tensor([[False, True, False, False], [False] * 4])  # padding, and a cached sequence
    assert torch.equal(first.positions(tokens, begins=begins), begins)
    norms = torch.tensor([[1.0, 2.0, 3.0, 31.0], [1.0, 1.0, 1.0, 9.0]])
    by_norm = Special(norm_multiple=10)
    assert not by_norm.positions(tokens).any()
    result = by_norm.positions(tokens, torch.stack([norms, torch.zeros(2, 4)], dim=-1))
    assert result.nonzero().tolist() == [[0, 3]]  # the median of the first row is 2
    both = Special((5,), norm_multiple=10).positions(tokens, norms[..., None])
    assert both.nonzero().tolist() == [[0, 0], [0, 3]]


def test_variance_by_position_worked_by_hand() -> None:
    """Values 0, 2 at position 0 and 1, 1 at position 1: all of the variance is at position 0."""
    resid = torch.tensor([[[0.0], [1.0], [50.0]], [[2.0], [1.0], [-9.0]]])
    counted = torch.tensor([[True, True, False], [True, True, False]])
    assert variance_by_position(resid, counted).tolist() == [1, 0, 0]
    assert variance_by_position(torch.ones(2, 2, 1), torch.ones(2, 2).bool()).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("family", "asked", "excluded", "keep_first", "expected"),
    [
        (SAEFamily.disk, None, (5, 7), None, Special((5, 7))),
        (SAEFamily.disk, None, True, None, Special((1, 2))),
        (SAEFamily.disk, None, False, None, NOT_SPECIAL),
        (SAEFamily.disk, None, False, True, Special(first=True)),
        (SAEFamily.disk, False, (5, 7), None, NOT_SPECIAL),
        (SAEFamily.gemma_scope, None, False, None, Special((1, 2))),
        (SAEFamily.new, None, True, None, Special((1, 2), first=True)),
        (SAEFamily.new, None, True, False, Special((1, 2))),
        (SAEFamily.new, False, True, None, NOT_SPECIAL),
    ],
)
@pytest.mark.case("A3")
def test_the_rule_of_an_sae_is_that_of_its_training_unless_configured(
    family: SAEFamily,
    asked: bool | None,
    excluded: bool | tuple[int, ...],
    keep_first: bool | None,
    expected: Special,
) -> None:
    """Also an explicit list of token ids in its metadata."""
    config = SAEConfig(
        family=family,
        keep_special_tokens=asked,
        keep_first=keep_first,
        used=[SAEChoice(block=1)],
    )
    (splice,) = splices(config, [LoadedSAE(IdentitySAE(), {}, excluded)], (1, 2))
    assert splice.special == expected


@pytest.mark.case("A3")
def test_two_saes_of_a_run_may_differ() -> None:
    config = SAEConfig(family=SAEFamily.disk, used=[SAEChoice(block=1), SAEChoice(block=2)])
    saes = [LoadedSAE(topk_sae(), {}, (3, 5)), LoadedSAE(topk_sae(seed=2), {}, (7,))]
    row = splices(config, saes, (1, 2))
    readings: list[Reading] = []
    model = small_model("llama")
    with torch.no_grad(), spliced(model, row, TOKENS, readings.append):
        model.hidden(TOKENS)
    for reading, ids in zip(readings, ((3, 5), (7,)), strict=True):
        assert len(reading.resid) == int((~torch.isin(TOKENS, torch.tensor(ids))).sum())


@pytest.mark.parametrize(
    "special", [Special(first=True), Special(norm_multiple=10), Special((1,), True, 10)], ids=str
)
@pytest.mark.case("A6")
def test_training_splicing_and_metrics_leave_out_the_same_positions(special: Special) -> None:
    model = with_sink(0)
    kept = special.positions(TOKENS)
    kept[:, 0] = True
    (resids,) = activations(model, [Stream(POST)], [TOKENS], special)
    assert len(resids[POST]) == int((~kept).sum())
    buffer = ActivationBuffer(model, {"sae": [Stream(POST)]}, special, 0, 1)
    served = buffer.serve(0, iter([TOKENS]))["sae"]
    assert sorted(map(tuple, served.tolist())) == sorted(map(tuple, resids[POST].tolist()))
    readings: list[Reading] = []
    splice = Splice(1, topk_sae(), special=special)
    with torch.no_grad(), spliced(model, [splice], TOKENS, readings.append):
        changed = model.resid_entering(2, TOKENS)
    (reading,) = readings
    assert torch.equal(reading.resid, resids[POST])
    assert torch.equal(changed[:, 0], model.resid_entering(2, TOKENS)[:, 0])


def measures(model: LanguageModel, special: Special) -> dict[str, float]:
    """The measures of an SAE that reconstructs only the sink."""
    evaluate: Evaluator = evaluator(model)
    base: Student = student(model, Sink())
    splices = tuple(splice._replace(special=special) for splice in base.splices)
    frozen = Student(base.model, splices, (), 2, {}, splices)
    (evaluation,) = evaluate([frozen])
    return evaluation.per_sae[POST]


class Sink(IdentitySAE):
    """An SAE that reconstructs large activations exactly, and others as zero."""

    def decode(self, feature_acts: Tensor) -> Tensor:
        return torch.where(feature_acts.norm(dim=-1, keepdim=True) > 100, feature_acts, 0)


@pytest.mark.case("A6")
def test_a_sink_makes_fvu_small_and_fvu_without_outliers_does_not_see_it() -> None:
    plain = measures(with_sink(0), NOT_SPECIAL)
    assert plain["fvu"] < 0.05 < 0.9 < plain["fvu_without_outliers"]
    kept = measures(with_sink(0), Special(first=True))
    assert kept["fvu"] == pytest.approx(plain["fvu_without_outliers"], rel=1e-6)
    assert kept["fvu_without_outliers"] == kept["fvu"]


@pytest.mark.parametrize(
    ("position", "advice"), [(0, "sae.keep_first=true"), (3, "sae.outlier_norm=10")]
)
@pytest.mark.case("A6")
def test_a_position_that_holds_most_of_the_variance_is_noted(position: int, advice: str) -> None:
    plain, kept = (
        Splice(1, topk_sae(), special=rule) for rule in (NOT_SPECIAL, Special(norm_multiple=10))
    )
    model = with_sink(position)
    notes = dominant_positions(model, [plain, kept], TOKENS)
    assert list(notes) == [plain]
    assert f"position {position} of the sequences holds 9" in notes[plain]
    assert advice in notes[plain]
    assert dominant_positions(small_model("llama"), [plain], TOKENS) == {}


def test_outliers_are_relative_to_their_own_sequence() -> None:
    """So that they do not depend on the batch."""
    resid = torch.ones(2, 5, 3)
    resid[1] *= 100
    assert not exceeds_median(resid, OUTLIER).any()
