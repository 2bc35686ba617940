"""Contributions of several SAEs: the plain model with only one, and the student without one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import cross_entropy

import sae_lora
from sae_lora.config.enums import Hook, Method, SAEFamily
from sae_lora.config.identity import train_steps
from sae_lora.config.schema import Config, LoRAConfig, MethodConfig, SAEConfig
from sae_lora.data import corpus
from sae_lora.models.hookpoints import Place, resid_post
from sae_lora.models.language_model import LanguageModel
from sae_lora.records.folder import RunFolder
from sae_lora.saes.training.spliced_sae import SplicedSAE
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Coder, Splice, spliced
from sae_lora.splice.kl import Comparison
from sae_lora.splice.positions import NOT_SPECIAL, Special
from sae_lora.splice.student import LoRAStudent, Student
from sae_lora.splice.trunk import Splices
from sae_lora.train import methods
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.train_state import TrainState
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import D_MODEL, N_BLOCKS, small_model
from tests.support.points import points_in, run_here
from tests.support.stepping import SPECIAL, spliced_sae, step
from tests.support.trainings import CONFIG, HELD_OUT, fill, whole_pass

pytestmark = pytest.mark.slow  # many seconds in all

PLACES: dict[str, tuple[Place, ...]] = {
    "outputs, also of the last block": (Place(1), Place(2), Place(N_BLOCKS - 1)),
    "within one block and behind it": (Place(1, Hook.attn_out), Place(1, Hook.mlp_out), Place(1)),
    "everywhere": (Place(0, Hook.mlp_out), Place(1), Place(2, Hook.attn_out), Place(2)),
}
SAES = (topk_sae(seed=1), jumprelu_sae(), topk_sae(k=2, seed=2), topk_sae(k=8, seed=3))


def splices_at(places: tuple[Place, ...], special: Special = NOT_SPECIAL) -> Splices:
    return tuple(
        Splice(place.block, sae, place.hook, special)
        for place, sae in zip(places, SAES[: len(places)], strict=True)
    )


def evaluator(model: LanguageModel, cache_bytes: float = 0) -> Evaluator:
    return Evaluator(model, HELD_OUT, 4, Comparison(Head.of(model), chunk_tokens=30), cache_bytes)


def check(model: LanguageModel, student: Student, evaluate: Evaluator) -> None:
    """Check all measurements of a student's SAEs against plain forward passes."""
    splices = [
        splice._replace(sae=splice.sae.frozen) if isinstance(splice.sae, SplicedSAE) else splice
        for splice in student.splices
    ]
    (whole,) = evaluate([student])
    full = whole_pass(student.model, splices)
    assert whole.student_ce == pytest.approx(full.ce, abs=1e-5)
    fvu = {name: figures["fvu"] for name, figures in whole.per_sae.items()}
    assert fvu == pytest.approx(full.fvu, rel=1e-4)
    contributions = evaluate.contributions(student)
    assert list(contributions) == [splice.hookpoint for splice in splices]
    for splice, (name, contribution) in zip(splices, contributions.items(), strict=True):
        alone = whole_pass(model, [splice])
        assert contribution.alone_ce == pytest.approx(alone.ce, abs=1e-5), name
        assert contribution.alone_fvu == pytest.approx(alone.fvu[name], rel=1e-4), name
        remaining = [other_splice for other_splice in splices if other_splice is not splice]
        left_out = whole_pass(student.model, remaining).ce
        assert contribution.left_out_ce == pytest.approx(left_out, abs=1e-5), name
        untrained = [other for other in student.before if other.hookpoint != name]
        before = whole_pass(model, untrained).ce
        assert contribution.spliced_left_out_ce == pytest.approx(before, abs=1e-5), name
        assert abs(left_out - full.ce) > 1e-4
        assert abs(alone.ce - whole.base_ce) > 1e-4
    assert len({contribution.left_out_ce for contribution in contributions.values()}) == len(
        contributions
    )
    # Contributions leave nothing in the cache that would change later evaluations.
    assert evaluate([student])[0].student_ce == whole.student_ce


@pytest.mark.parametrize("blocks", ["after", "all"])
@pytest.mark.parametrize("places", PLACES)
def test_contributions_of_a_lora_student(places: str, blocks: str) -> None:
    model = small_model("llama")
    student = LoRAStudent(model, splices_at(PLACES[places]), LoRAConfig(rank=2, blocks=blocks))
    fill(student.weights)
    check(model, student, evaluator(model, cache_bytes=1e9))


def test_contributions_in_every_family(model: LanguageModel) -> None:
    student = LoRAStudent(model, splices_at(PLACES["everywhere"]), LoRAConfig(rank=2))
    fill(student.weights)
    check(model, student, evaluator(model))


@pytest.mark.parametrize("blocks", ["after", [0], [3]])
def test_contributions_if_special_tokens_keep_their_activation(blocks: Any) -> None:
    """Adapters begin before, between and after SAEs."""
    model = small_model("gemma2")
    student = LoRAStudent(
        model, splices_at(PLACES["everywhere"], SPECIAL), LoRAConfig(rank=2, blocks=blocks)
    )
    fill(student.weights)
    keep = SPECIAL.positions(HELD_OUT)
    assert 0 < keep.sum() < keep.numel() / 2
    check(model, student, evaluator(model))


def training_of(
    model: LanguageModel, kind: Method, saes: Mapping[Place, Coder], special: Special = NOT_SPECIAL
) -> TrainState:
    """The training of SAEs at these places, or of maps on them."""
    is_new = any(isinstance(sae, SplicedSAE) for sae in saes.values())
    config = Config(
        sae=SAEConfig(family=SAEFamily.new if is_new else SAEFamily.disk),
        method=MethodConfig(kind=kind),
        train=CONFIG,
    )
    splices = tuple(Splice(place.block, sae, place.hook, special) for place, sae in saes.items())
    torch.manual_seed(0)
    return methods.build(config, model, splices, 6)[0]


@pytest.mark.parametrize("special", [NOT_SPECIAL, SPECIAL])
def test_contributions_of_saes_in_training(special: Special) -> None:
    """Also after a step, with an evaluator that measured them before; training modes are restored."""
    model = small_model("llama")
    run = training_of(
        model,
        Method.e2e,
        {
            Place(1): spliced_sae("topk", scale=0.4),
            Place(2, Hook.mlp_out): spliced_sae("standard", seed=4),
            Place(3): spliced_sae("topk", seed=5),
        },
        special,
    )
    evaluate = evaluator(model, cache_bytes=1e9)
    earlier = evaluate.contributions(run.student)
    for _ in range(2):
        step(model, run)
    modes = [module.training for module in run.student.modules.values()]
    assert modes == [True] * 3
    check(model, run.student, evaluate)
    assert [module.training for module in run.student.modules.values()] == modes
    later = evaluate.contributions(run.student)
    assert all(later[name].alone_ce != earlier[name].alone_ce for name in earlier)


def test_contributions_of_an_sae_that_several_blocks_share() -> None:
    """At each block: with only this SAE, and without it."""
    model, shared = small_model("llama"), spliced_sae("topk", scale=0.4)
    saes = {Place(0): shared, Place(1): spliced_sae("topk", seed=5), Place(2): shared}
    run = training_of(model, Method.e2e, saes)
    assert len(run.student.modules) == 2
    step(model, run)
    check(model, run.student, evaluator(model))


def test_contributions_of_saes_with_maps() -> None:
    """An SAE and its map are added and left out together."""
    model = small_model("gpt2")
    frozen: dict[Place, Coder] = {Place(0): topk_sae(seed=1), Place(2): jumprelu_sae()}
    run = training_of(model, Method.linear_adapter, frozen)
    step(model, run)
    with torch.no_grad():
        for weight in run.student.weights.values():
            weight.add_(
                0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(D_MODEL))
            )
    check(model, run.student, evaluator(model))
    plain = whole_pass(model, [Splice(0, frozen[Place(0)])])
    contributions = evaluator(model).contributions(run.student)
    assert abs(contributions[resid_post(0)].alone_ce - plain.ce) > 1e-4


@pytest.mark.parametrize("blocks", ["after", "all"])
def test_without_and_alone_share_the_trained_weights(blocks: str) -> None:
    model = small_model("llama")
    student = LoRAStudent(model, splices_at((Place(1), Place(2))), LoRAConfig(rank=2, blocks=blocks))
    without, alone = student.without(resid_post(1)), student.alone(resid_post(2), model)
    assert [splice.hookpoint for splice in without.splices] == [resid_post(2)]
    assert [splice.hookpoint for splice in alone.splices] == [resid_post(2)]
    assert student.without("blocks.0.hook_resid_post").splices == student.splices
    evaluate = evaluator(model)
    fill(student.weights, seed=1)
    first = evaluate([without, alone])
    fill(student.weights, seed=2)
    second = evaluate([without, alone])
    assert first[0].student_ce != second[0].student_ce
    assert first[1] == second[1]  # the plain model has no adapters


def test_a_single_sae_has_no_contribution() -> None:
    model = small_model("llama")
    student = LoRAStudent(model, splices_at((Place(1),)), LoRAConfig(rank=2))
    assert evaluator(model).contributions(student) == {}


class Measured(NamedTuple):
    """Two runs of two SAEs."""

    each: RunFolder
    """A run with contributions."""
    whole: RunFolder
    """The same run without contributions."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    home = tmp_path_factory.mktemp("outputs")
    overrides = "layer.index=[2,5]", "lora.blocks=all"
    point = points_in(home)
    (each,) = run_here(point(*overrides))
    (whole,) = run_here(point(*overrides, "train.eval_each_sae=false", "sweep=whole"))
    return Measured(each, whole)


def test_the_summary_has_the_contribution_of_each_sae(runs: Measured) -> None:
    adapted = sae_lora.load_adapted(runs.each)
    config = adapted.config
    tokens = corpus.load(
        config.data, adapted.tokenizer, train_steps(config) * config.train.batch_size, 4
    ).validation_tokens

    # The SAEs were not trained on special tokens.
    assert all(splice.special.ids for splice in adapted.splices)

    def ce(model: LanguageModel, *hookpoints: str) -> float:
        splices = [splice for splice in adapted.splices if splice.hookpoint in hookpoints]
        with torch.no_grad(), spliced(model, splices, tokens):
            logits = model.model(tokens, use_cache=False).logits[:, :-1].double()
        return float(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    first, second = runs.each.read_summary()["sae"]
    names = first["hookpoint"], second["hookpoint"]
    assert names == (resid_post(2), resid_post(5))
    assert runs.each.read_summary()["student_ce"] == pytest.approx(
        ce(adapted._adapted, *names), rel=1e-6
    )
    for sae, second_sae in ((first, second), (second, first)):
        assert sae["alone_ce"] == pytest.approx(ce(adapted._base, sae["hookpoint"]), rel=1e-6)
        assert sae["left_out_ce"] == pytest.approx(
            ce(adapted._adapted, second_sae["hookpoint"]), rel=1e-6
        )
        assert 0 < sae["alone_fvu"] < 2


def test_a_run_without_contributions_is_the_same(runs: Measured) -> None:
    each, whole = (folder.read_summary() for folder in runs)
    measured = {"alone_ce", "alone_fvu", "left_out_ce", "spliced_left_out_ce"}
    assert all(measured <= set(sae) for sae in each["sae"])
    assert not any(measured & set(sae) for sae in whole["sae"])
    assert each["hash"] == whole["hash"]
    assert runs.each.path.name == runs.whole.path.name
    curves = [[point.student_ce for point in folder.read_curve()] for folder in runs]
    assert curves[0] == curves[1] and len(curves[0]) == 3
