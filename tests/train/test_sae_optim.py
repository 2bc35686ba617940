"""SAEs trained through the model: the gradient of the stated loss, and all other state."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from sae_lora.config.enums import Hook, Method, Reduction
from sae_lora.config.schema import LoRAConfig
from sae_lora.models.hookpoints import resid_post
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes.training import training_sae
from sae_lora.splice.hooks import Splice, reconstructed
from sae_lora.splice.positions import NOT_SPECIAL, Special
from sae_lora.splice.student import Student
from sae_lora.splice.trunk import Trunk
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import D_MODEL, random_tokens, small_model
from tests.support.learners import OF_SAES, WIDTH, K, residuals
from tests.support.stepping import (
    SPECIAL,
    TOKENS,
    build_training,
    frozen_standard,
    gradients,
    spliced_sae,
    step,
    whole_kl,
)
from tests.support.trainings import CONFIG, evaluator

MODEL = small_model("gpt2")
"""A family that computes entirely in float64 if it is converted to float64."""
LLAMA = small_model("llama")
HOOKPOINT = resid_post(1)
PLAIN = dataclasses.replace(CONFIG, grad_clip=None)
SCALE = 0.4
COEFFICIENT = 0.3


def double(model: LanguageModel) -> LanguageModel:
    return LanguageModel(copy.deepcopy(model.model).double())


class Parts(NamedTuple):
    """The parts of a loss, mean over tokens."""

    kl: Tensor
    mse: Tensor
    penalty: Tensor


def written_out(
    weights: dict[str, Tensor], architecture: str, scale: float, exact: LanguageModel, special: Special
) -> Parts:
    """The parts of the loss of one SAE, written out in float64.

    Args:
        weights: The SAE's weights, by name.
        architecture: standard, jumprelu or topk.
        scale: The SAE's input is multiplied by this.
        exact: The model in float64.
        special: The positions that keep their activation.
    """
    with torch.no_grad():
        teacher = exact.model(TOKENS, use_cache=False).logits.log_softmax(-1)
        resid = exact.resid_entering(2, TOKENS)
    applied = ~special.positions(TOKENS)
    inputs = resid[applied] * scale
    pre_activations = (inputs - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    norms, penalty = weights["W_dec"].norm(dim=1), torch.zeros((), dtype=torch.float64)
    match architecture:
        case "standard":
            latents = pre_activations.relu()
            penalty = COEFFICIENT * (latents * norms).sum(-1).mean()
        case "jumprelu":
            active = pre_activations > weights["threshold"]
            latents = pre_activations * active
            penalty = COEFFICIENT * active.double().sum(-1).mean()
        case _:  # latents are multiplied by the decoder's norms
            values, indices = (pre_activations * norms).topk(K, dim=-1)
            latents = torch.zeros_like(pre_activations).scatter(-1, indices, values.relu()) / norms
    recon = latents @ weights["W_dec"] + weights["b_dec"]
    mse = (recon - inputs).square().sum(-1).mean()
    student = resid.masked_scatter(applied[..., None], recon / scale)
    learner = exact.logits(exact.hidden(TOKENS, 2, student)).log_softmax(-1)
    return Parts((teacher.exp() * (teacher - learner)).sum(-1).mean(), mse, penalty)


def loss_of(parts: Parts, balance: float, *, mse: bool) -> Tensor:
    """The loss as `SAEGradientState` states it, with a = `balance` constant."""
    if mse:
        return 0.5 * (balance * parts.kl + parts.mse) + parts.penalty
    return parts.kl + parts.penalty / balance


@pytest.mark.parametrize("special", [NOT_SPECIAL, SPECIAL])
@pytest.mark.parametrize("mse", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_the_gradient_is_that_of_the_stated_loss(architecture: str, mse: bool, special: Special) -> None:
    """Compared with central differences of the loss, written out in float64."""
    changes: dict[str, Any] = {}
    if architecture != "topk":
        changes["sparsity_coefficient"] = COEFFICIENT
    if architecture == "jumprelu":
        changes["k"] = None  # the penalty is proportional to the number of active latents
    sae = spliced_sae(architecture, scale=SCALE, **changes)
    run = build_training(MODEL, Method.sae_finetune, sae, train=PLAIN, mse=mse, special=special)
    slopes = gradients(MODEL, run.training)
    slopes = {name.removeprefix(f"{HOOKPOINT}/sae."): slope for name, slope in slopes.items()}
    weights = {name: weight.detach().double() for name, weight in sae.sae.named_parameters()}
    assert slopes.keys() == weights.keys()
    exact = double(MODEL)

    def parts(distance: float, direction: dict[str, Tensor]) -> Parts:
        shifted = {name: weight + distance * direction.get(name, 0) for name, weight in weights.items()}
        return written_out(shifted, architecture, SCALE, exact, special)

    start = parts(0, {})
    balance = float(start.mse / start.kl)
    assert architecture == "topk" or start.penalty > 0
    generator = torch.Generator().manual_seed(3)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "all"):
        moving = [key for key in weights if key != "threshold"] if name == "all" else [name]
        direction = {
            key: torch.randn(weights[key].shape, generator=generator, dtype=torch.float64)
            for key in moving
        }
        above, below = (loss_of(parts(sign * 1e-6, direction), balance, mse=mse) for sign in (1, -1))
        expected = float(above - below) / 2e-6
        slope = float(sum((slopes[key].double() * part).sum() for key, part in direction.items()))
        steepness = float(sum(slopes[key].double().square().sum() for key in direction)) ** 0.5
        assert slope == pytest.approx(expected, rel=1e-3, abs=1e-3 * steepness), name
        assert steepness > 0


def test_several_saes_are_one_loss() -> None:
    """The first SAE changes the input of the second; errors and penalties of both are added."""
    saes = [spliced_sae("standard", sparsity_coefficient=COEFFICIENT, seed=seed) for seed in (3, 4)]
    run = build_training(MODEL, Method.sae_finetune, *saes, train=PLAIN)
    result = gradients(MODEL, run.training, micro_batch=3)
    loss = whole_kl(MODEL, MODEL, run.training.student.splices)
    first, second = (sae.last_forward for sae in saes)
    assert first is not None and second is not None
    mse, penalty = first.mse + second.mse, first.aux + second.aux
    balance = mse.item() / loss.item()
    expected = 0.5 * (balance * loss + mse) + penalty
    slopes = torch.autograd.grad(expected, list(run.training.student.weights.values()))
    for gradient, slope in zip(result.values(), slopes, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("mse", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_micro_batches_add_up(architecture: str, mse: bool) -> None:
    """Also if the parts of a batch have different numbers of special positions."""
    results = []
    for micro_batch in (None, 1, 3):
        sae = spliced_sae(architecture, scale=SCALE)
        run = build_training(MODEL, Method.sae_finetune, sae, train=PLAIN, mse=mse, special=SPECIAL)
        results.append(gradients(MODEL, run.training, micro_batch=micro_batch))
        assert sae.since_active.max() == 1
    counts = (~SPECIAL.positions(TOKENS)).sum(-1)
    assert len(set(counts.tolist())) > 1
    for result in results[1:]:
        for name, gradient in result.items():
            torch.testing.assert_close(gradient, results[0][name], rtol=1e-3, atol=1e-5)


def test_the_balance_worked_by_hand() -> None:
    """A TopK SAE without dead latents has no penalty, so that the loss is only KL and MSE."""
    sae = spliced_sae("topk", scale=SCALE)
    runs = {
        mse: build_training(MODEL, Method.sae_finetune, sae, train=PLAIN, mse=mse)
        for mse in (True, False)
    }
    combined, of_kl = (gradients(MODEL, run.training) for run in runs.values())
    loss = runs[True].training.loss
    assert loss == pytest.approx(whole_kl(MODEL, MODEL, [Splice(1, sae)]).item(), rel=1e-5)
    inputs = SCALE * MODEL.resid_entering(2, TOKENS).flatten(0, 1)
    error = (sae.sae(inputs) - inputs).square().sum(-1).mean()
    of_mse = torch.autograd.grad(error, list(sae.sae.parameters()))
    balance = error.item() / loss
    for name, of_error in zip(combined, of_mse, strict=True):
        expected = 0.5 * (balance * of_kl[name] + of_error)
        torch.testing.assert_close(combined[name], expected, rtol=1e-3, atol=1e-4 * balance)


def test_the_reduction_of_the_kl_does_not_matter_with_mse() -> None:
    """a · KL equals MSE in both cases. Without MSE, the summed KL and 1 / a are larger by a factor of
    the sequence length."""
    results: dict[tuple[Reduction, bool], dict[str, Tensor]] = {}
    for reduction in Reduction:
        config = dataclasses.replace(PLAIN, kl_reduction=reduction)
        for mse in (True, False):
            sae = spliced_sae("standard")
            run = build_training(MODEL, Method.sae_finetune, sae, train=config, mse=mse)
            results[reduction, mse] = gradients(MODEL, run.training)
    for mse, factor in ((True, 1), (False, TOKENS.shape[1])):
        summed = results[Reduction.sequence_sum, mse]
        mean = results[Reduction.token_mean, mse]
        for name in mean:
            torch.testing.assert_close(summed[name], factor * mean[name], rtol=1e-4, atol=1e-5)


FROZEN: dict[str, Callable[[], SAE[Any]]] = {
    "topk": topk_sae,
    "jumprelu": jumprelu_sae,
    "standard": frozen_standard,
}


class TestLowRank:
    """LoRA on the SAE's two matrices."""

    @pytest.mark.parametrize("name", FROZEN)
    def test_only_a_and_b_are_trained(self, name: str) -> None:
        original = FROZEN[name]()
        originals = copy.deepcopy(original.state_dict())
        run = build_training(MODEL, Method.sae_finetune, original, rank=2)
        start = run.weights
        assert {key.rpartition("/")[2] for key in start} == {
            f"sae.parametrizations.{matrix}.0.lora_{half}"
            for matrix in ("W_enc", "W_dec")
            for half in "AB"
        }
        assert sum(weight.numel() for weight in start.values()) == 2 * 2 * (D_MODEL + WIDTH)
        (sae,) = run.training.student.modules.values()
        frozen = {
            key: value.clone() for key, value in sae.sae.state_dict().items() if "lora_" not in key
        }
        for _ in range(3):
            step(MODEL, run.training)
        result = sae.sae.state_dict()
        assert all(torch.equal(result[key], value) for key, value in frozen.items())
        assert not any(torch.equal(value, start[key]) for key, value in run.weights.items())
        assert all(torch.equal(value, originals[key]) for key, value in original.state_dict().items())

    @pytest.mark.parametrize("name", FROZEN)
    def test_an_untrained_adapter_changes_nothing(self, name: str) -> None:
        original = FROZEN[name]()
        student = build_training(MODEL, Method.sae_finetune, original, rank=2).training.student
        trunk = Trunk(MODEL, TOKENS, student.cuts)
        (sae,) = student.modules.values()
        with torch.no_grad():
            assert torch.equal(student.hidden(trunk), trunk.hidden(student.before))
            sae.eval()
            assert torch.equal(student.hidden(trunk), trunk.hidden(student.before))

    @pytest.mark.parametrize("name", FROZEN)
    def test_evaluation_and_saving_merge_lora(self, name: str, tmp_path: Path) -> None:
        """Also several times in the middle of training."""
        original = FROZEN[name]()
        run = build_training(MODEL, Method.sae_finetune, original, rank=2)
        for number in range(2):
            step(MODEL, run.training)
            evaluator(MODEL)([run.training.student])
            run.artifact.save(tmp_path / str(number))
        added = {
            matrix: run.weights[f"{HOOKPOINT}/sae.parametrizations.{matrix}.0.lora_B"]
            @ run.weights[f"{HOOKPOINT}/sae.parametrizations.{matrix}.0.lora_A"]
            for matrix in ("W_enc", "W_dec")
        }
        saved = SAE.load_from_disk(tmp_path / "1" / HOOKPOINT)
        for key, value in original.state_dict().items():
            torch.testing.assert_close(saved.state_dict()[key], value + added.get(key, 0))
        assert all((part != 0).any() for part in added.values())
        earlier = SAE.load_from_disk(tmp_path / "0" / HOOKPOINT)
        assert not torch.equal(earlier.W_enc, saved.W_enc)


class TestSpecialPositions:
    """At positions that keep their activation, an SAE neither reads nor changes anything."""

    @pytest.mark.parametrize("architecture", OF_SAES)
    def test_they_are_neither_read_nor_changed(self, architecture: str) -> None:
        keep = SPECIAL.positions(TOKENS)
        assert 0 < keep.sum() < keep.numel() / 2
        sae, second = spliced_sae(architecture, scale=SCALE), spliced_sae(architecture, scale=SCALE)
        resid = residuals(5, TOKENS.numel()).unflatten(0, TOKENS.shape)
        changed = torch.where(keep[..., None], 1e3 * torch.randn(D_MODEL), resid)
        readings: list = []
        with torch.no_grad():
            result = reconstructed(Splice(1, sae, special=SPECIAL), resid, TOKENS, readings.append)
            second_result = reconstructed(Splice(1, second, special=SPECIAL), changed, TOKENS)
        assert torch.equal(result[keep], resid[keep])
        assert torch.equal(second_result[keep], changed[keep])
        assert torch.equal(result[~keep], second_result[~keep])
        (reading,) = readings
        assert len(reading.latents) == (~keep).sum()
        assert torch.equal(reading.recon, result[~keep])
        assert not torch.equal(result[~keep], resid[~keep])

    @pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
    def test_the_other_positions_share_the_active_latents(self, architecture: str) -> None:
        """They get k latents each on average, also if the norms of special positions are large."""
        keep = SPECIAL.positions(TOKENS)
        resid = residuals(5, TOKENS.numel()).unflatten(0, TOKENS.shape)
        resid[keep] *= 100
        sae, readings = spliced_sae(architecture), []
        with torch.no_grad():
            reconstructed(Splice(1, sae, special=SPECIAL), resid, TOKENS, readings.append)
        active = (readings[0].latents != 0).sum(-1)
        assert active.sum() == K * (~keep).sum()
        assert len(set(active.tolist())) > 1

    def test_special_positions_do_not_enter_the_error(self) -> None:
        """Only the SAE's error ignores them; the model still reads them."""
        sae = spliced_sae("topk")
        run = build_training(MODEL, Method.sae_finetune, sae, train=PLAIN, special=SPECIAL)
        trunk = Trunk(MODEL, TOKENS, run.training.student.cuts)
        run.training.hidden(trunk)
        inputs = MODEL.resid_entering(2, TOKENS)[~SPECIAL.positions(TOKENS)]
        error = (sae.sae(inputs) - inputs).square().sum(-1).mean()
        assert float(run.training._mse / run.training._tokens) == pytest.approx(error.item(), rel=1e-5)
        assert int(run.training._tokens) == len(inputs)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_latents_are_dead_by_the_stated_rule(
    micro_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A latent is dead if it was inactive in more than `dead_after` steps, without special positions."""
    dead_after = 2
    sae = spliced_sae("topk", dead_after=dead_after)
    run = build_training(MODEL, Method.e2e, sae, special=SPECIAL, steps=8)
    passes: list[tuple[Tensor, Tensor]] = []
    plain = training_sae.forward

    def watched(coder: Any, resid: Tensor, dead: Tensor, number: int) -> training_sae.Forward:
        forward = plain(coder, resid, dead, number)
        passes.append((dead.clone(), (forward.latents != 0).any(0)))
        assert number == run.training.step
        return forward

    monkeypatch.setattr(training_sae, "forward", watched)
    silent = torch.zeros(WIDTH)
    for number in range(8):
        passes.clear()
        tokens = random_tokens(batch=2, length=16, seed=number)
        step(MODEL, run.training, tokens=tokens, micro_batch=micro_batch)
        assert all(torch.equal(dead, silent > dead_after) for dead, _ in passes)
        active = torch.stack([active for _, active in passes]).any(0)
        silent = torch.where(active, 0, silent + 1)
        assert torch.equal(sae.since_active, silent)
    assert 0 < (silent > dead_after).sum() < WIDTH


def test_dead_latents_have_a_gradient() -> None:
    """Inactive latents have a gradient only if they count as dead."""
    results = []
    for dead_after in (0, 100):
        sae = spliced_sae("topk", dead_after=dead_after)
        sae.since_active[:5] = 1
        with torch.no_grad():
            sae.sae.b_enc[:5] = -50
        run = build_training(MODEL, Method.e2e, sae, train=PLAIN)
        results.append(gradients(MODEL, run.training)[f"{HOOKPOINT}/sae.W_dec"])
    assert (results[0][:5] != 0).any()
    assert (results[1][:5] == 0).all()


@pytest.mark.parametrize("hook", [Hook.resid_post, Hook.mlp_out])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard"])
def test_recomputation_changes_no_bit(architecture: str, hook: Hook) -> None:
    """Also with two backward passes through the blocks, and with an SAE in training inside a block."""
    states = []
    for recomputes in (False, True):
        config = dataclasses.replace(CONFIG, activation_checkpointing=recomputes)
        saes = [spliced_sae(architecture, seed=seed, dead_after=0) for seed in (3, 4)]
        run = build_training(LLAMA, Method.sae_finetune, *saes, train=config, hook=hook, special=SPECIAL)
        for _ in range(3):
            step(LLAMA, run.training, micro_batch=2)
        states.append(run.training.state().tensors)
        assert all(sae.last_forward is None for sae in saes)
    plain, recomputed = states
    assert [name for name, value in plain.items() if not torch.equal(recomputed[name], value)] == []


@pytest.mark.parametrize("architecture", OF_SAES)
@pytest.mark.parametrize("kind", [Method.e2e, Method.sae_finetune])
def test_an_evaluation_changes_no_state(kind: Method, architecture: str) -> None:
    """Also the thresholds, which sae-lens changes outside the optimiser."""
    sae = spliced_sae(architecture, scale=SCALE)
    run = build_training(MODEL, kind, sae)
    step(MODEL, run.training)
    originals = {name: value.clone() for name, value in run.training.state().tensors.items()}
    first = evaluator(MODEL)([run.training.student])
    second = evaluator(MODEL)([run.training.student])
    tensors = run.training.state().tensors
    assert [name for name, value in originals.items() if not torch.equal(tensors[name], value)] == []
    assert first == second
    assert sae.training


def test_evaluation_equals_that_of_the_saved_sae(tmp_path: Path) -> None:
    """A BatchTopK SAE is evaluated with its threshold, in the units of the model's residuals."""
    sae = spliced_sae("batchtopk", scale=SCALE)
    run = build_training(MODEL, Method.e2e, sae)
    for _ in range(3):
        step(MODEL, run.training)
    (evaluation,) = evaluator(MODEL)([run.training.student])
    run.artifact.save(tmp_path)
    loaded = SAE.load_from_disk(tmp_path / HOOKPOINT)
    splices = (Splice(1, loaded),)
    student = Student(MODEL, (), splices, first=2, weights={}, before=splices)
    (expected,) = evaluator(MODEL)([student])
    assert evaluation.student_ce == expected.student_ce
    assert evaluation.kl == expected.kl
    assert evaluation.per_sae[HOOKPOINT]["l0"] == expected.per_sae[HOOKPOINT]["l0"]
    assert evaluation.spliced_ce != expected.spliced_ce


def test_adapters_that_stay_zero_change_nothing_for_the_sae() -> None:
    """LoRA's B is zero before training, so the student is that of `sae_finetune`."""
    both = build_training(MODEL, Method.lora_sae, topk_sae(), train=PLAIN, lora_lr=0)
    alone = build_training(MODEL, Method.sae_finetune, topk_sae(), train=PLAIN)
    for _ in range(3):
        step(MODEL, both.training)
        step(MODEL, alone.training)
    weights = both.training.student.weights
    assert weights.keys() == alone.training.student.weights.keys()
    for name, weight in alone.training.student.weights.items():
        torch.testing.assert_close(weights[name], weight)


@pytest.mark.parametrize("blocks", ["after", "all"])
def test_adapters_learn_from_the_kl_alone_and_at_their_own_rate(blocks: str) -> None:
    """With a rate of almost zero for the SAE, they are those of `lora` at their rate."""
    lora = LoRAConfig(rank=2, blocks=blocks)
    still = dataclasses.replace(PLAIN, lr=1e-12)
    both = build_training(MODEL, Method.lora_sae, topk_sae(), train=still, lora=lora, lora_lr=1e-3)
    faster = dataclasses.replace(PLAIN, lr=1e-3)
    alone = build_training(MODEL, Method.lora, topk_sae(), train=faster, lora=lora)
    for _ in range(3):
        step(MODEL, both.training)
        step(MODEL, alone.training)
    for name, weight in alone.training.student.weights.items():
        torch.testing.assert_close(both.training.student.weights[name], weight, rtol=1e-3, atol=1e-6)
