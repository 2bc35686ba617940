"""An SAE trains as in sae-lens's loop, and a stopped training resumes to the last bit."""

import copy
import json
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file, save_file

from sae_lora.common.errors import UserError
from sae_lora.saes.training import training_sae
from sae_lora.saes.training.activation_buffer import ActivationBuffer
from sae_lora.saes.training.sae_trainer import SteppedSAETrainer
from sae_lora.saes.training.spliced_sae import SplicedSAE
from sae_lora.splice.mlp_input import Stream
from sae_lora.splice.positions import NOT_SPECIAL
from tests.support.families import D_MODEL, random_tokens, small_model
from tests.support.learners import (
    HOOKPOINT,
    OF_SAES,
    TOKENS,
    WIDTH,
    K,
    in_training,
    learner,
    new,
    residuals,
    trainer,
)
from tests.support.trainings import same

STEPS, SCALE = 24, 0.37


@pytest.fixture(params=OF_SAES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def taken(training: SteppedSAETrainer, first: int, last: int) -> list[float]:
    """The MSE of the steps from `first` to before `last`."""
    return [float(training.step(residuals(step))) for step in range(first, last)]


def dead(training: SteppedSAETrainer) -> int:
    return int(training._trainer.dead_neurons.sum())


def inference(training: SteppedSAETrainer) -> SAE[Any]:
    return training_sae.inference(training.sae, training.scale)


def scale_for(resid: torch.Tensor) -> float:
    """The scale that a new SAE takes from residuals `[token, d_in]`."""
    sae = SplicedSAE(new("topk"), dead_after_steps=10)
    sae.fit_scale(resid)
    return float(sae.scale)


def is_same(first: SteppedSAETrainer, second: SteppedSAETrainer) -> bool:
    """True if two trainings have the same state, to the last bit."""
    (tensors, values), (other_tensors, other_values) = first.state(), second.state()
    return values == other_values and same(tensors, other_tensors)


def through_files(state: tuple[dict[str, torch.Tensor], dict[str, Any]], folder: Path) -> Any:
    """The state after it was written to files and read again."""
    tensors, values = state
    save_file(tensors, folder / "tensors.safetensors")
    (folder / "state.json").write_text(json.dumps(values, allow_nan=False))
    return load_file(folder / "tensors.safetensors"), json.loads((folder / "state.json").read_text())


@pytest.mark.parametrize("stop", [3, 7, 18])
def test_a_stopped_training_resumes_to_the_last_bit(
    architecture: str, stop: int, tmp_path: Path
) -> None:
    """In the warm-up, at the end of a window, and while the rate falls."""
    whole = learner(architecture, scale=SCALE)
    losses = taken(whole, 0, stop)
    dead_before = dead(whole)
    assert dead_before > 0
    state = through_files(whole.state(), tmp_path)
    losses += taken(whole, stop, STEPS)

    resumed = learner(architecture)
    taken(resumed, 30, 32)  # `restore` does not need a fresh trainer
    resumed.restore(*state)
    assert dead(resumed) == dead_before
    assert taken(resumed, stop, STEPS) == losses[stop:]
    assert is_same(resumed, whole)
    assert resumed.scale == SCALE


def test_restoring_does_not_change_the_saved_state(tmp_path: Path) -> None:
    training = learner("batchtopk")
    taken(training, 0, 3)
    state = through_files(training.state(), tmp_path)
    expected = taken(training, 3, 8)
    for _ in range(2):
        training.restore(*state)
        assert taken(training, 3, 8) == expected


def test_a_training_may_be_saved_before_its_first_step(tmp_path: Path) -> None:
    whole = learner("topk", scale=SCALE)
    state = through_files(whole.state(), tmp_path)
    resumed = learner("topk")
    with torch.no_grad():
        resumed.sae.W_enc.normal_()
    resumed.restore(*state)
    assert resumed.scale == SCALE
    assert taken(resumed, 0, 5) == taken(whole, 0, 5)
    assert is_same(resumed, whole)


def test_dead_latents_change_the_training() -> None:
    """The tests above therefore cover dead latents: without them the weights differ."""
    training, without_dead = learner("topk"), learner("topk")
    without_dead._trainer.cfg.dead_feature_window = 1000
    assert taken(training, 0, 3) == taken(without_dead, 0, 3)
    assert taken(training, 3, STEPS)[-1] != taken(without_dead, 3, STEPS)[-1]
    assert dead(training) > 0
    assert dead(without_dead) == 0


def test_it_trains_as_in_sae_lenss_loop(architecture: str) -> None:
    ours = learner(architecture, scale=SCALE)
    theirs = SAETrainer(
        SAETrainerConfig(
            total_training_samples=STEPS * TOKENS,
            train_batch_size_samples=TOKENS,
            lr=1e-2,
            lr_end=1e-2,
            lr_warm_up_steps=STEPS // 4,
            lr_decay_steps=STEPS // 3,
            dead_feature_window=2,
            feature_sampling_window=7,
        ),
        learner(architecture).sae,
        map(residuals, range(STEPS)),
    )
    theirs.activation_scaler.scaling_factor = SCALE
    taken(ours, 0, STEPS)
    result, expected = inference(ours), training_sae.inference(theirs.fit())
    assert same(result.state_dict(), expected.state_dict())
    result.cfg.metadata = expected.cfg.metadata
    assert result.cfg == expected.cfg


def test_saving_does_not_disturb_it(architecture: str, tmp_path: Path) -> None:
    unsaved, saved = (learner(architecture, scale=SCALE) for _ in range(2))
    expected = taken(unsaved, 0, STEPS)
    losses = taken(saved, 0, 10)
    random = torch.get_rng_state()
    training_sae.save(saved.sae, tmp_path, saved.scale)
    at_save = inference(saved)
    assert torch.equal(torch.get_rng_state(), random)
    losses += taken(saved, 10, STEPS)
    assert losses == expected
    assert is_same(saved, unsaved)

    reloaded = SAE.load_from_disk(tmp_path)
    assert torch.equal(reloaded(residuals(50)), at_save(residuals(50)))
    assert reloaded.cfg == at_save.cfg
    assert not torch.equal(inference(saved).W_enc, at_save.W_enc)


def test_a_step_returns_the_mse_before_it() -> None:
    training = learner("standard", scale=SCALE)
    taken(training, 0, 4)
    initial, resid = copy.deepcopy(training.sae), SCALE * residuals(4)
    mse = training.step(residuals(4))
    expected = (initial.decode(initial.encode(resid)) - resid).pow(2).sum(-1).mean()
    torch.testing.assert_close(mse, expected.detach())
    assert not mse.requires_grad


def test_activations_of_less_precision_are_scaled_in_float32() -> None:
    first, second = (learner("topk", scale=SCALE) for _ in range(2))
    rounded = residuals(0).to(torch.bfloat16)
    assert first.step(rounded) == second.step(rounded.float())


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    training = learner("topk")
    rates = []
    for step in range(STEPS):
        rates.append(training.lr)
        training.step(residuals(step))
    rising = [(step + 1) / 6 for step in range(6)]
    falling = [1 - step / 8 for step in range(8)]
    assert rates == pytest.approx([1e-2 * share for share in (*rising, *repeat(1.0, 10), *falling)])
    assert training.lr == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("warm_up", "decay"), [(0, 0), (1, 0), (0, 10), (4, 6)])
def test_any_shares_of_the_steps_are_allowed(warm_up: int, decay: int) -> None:
    training = trainer(new("topk"), steps=10, warm_up_steps=warm_up, decay_steps=decay)
    rates = []
    for step in range(10):
        rates.append(training.lr)
        training.step(residuals(step))
    assert max(rates) == pytest.approx(1e-2)
    assert rates[0] == pytest.approx(1e-2 / max(warm_up, 1))
    assert rates[-1] == pytest.approx(1e-2 / max(decay, 1))


def test_the_scale_equals_sae_lenss() -> None:
    batches = [residuals(step) for step in range(4)]
    norms = torch.cat(batches).norm(dim=-1)
    scale = scale_for(torch.cat(batches))
    scaler = ActivationScaler()
    scaler.estimate_scaling_factor(batches[0].shape[-1], iter(batches), len(batches))
    assert scale == pytest.approx(scaler.scaling_factor)
    assert float((norms * scale).mean()) == pytest.approx(batches[0].shape[-1] ** 0.5)
    assert learner("topk", scale=scale).scale == scale


@pytest.mark.parametrize(("value", "tokens"), [(0.0, 5), (0.0, 0), (float("nan"), 5), (float("inf"), 5)])
def test_residuals_without_a_finite_norm_are_refused(value: float, tokens: int) -> None:
    with pytest.raises(UserError, match="cannot be scaled"):
        scale_for(torch.full((tokens, D_MODEL), value))


def test_batches_may_vary_in_size() -> None:
    """They vary if special positions are left out; sparsity is still counted per token."""
    training = learner("topk")
    for step, tokens in enumerate((48, 40, 47, 33)):
        training.step(residuals(step, tokens))
    assert float(training._trainer.feature_sparsity.sum()) == pytest.approx(K)


def test_a_latent_is_dead_by_sae_lenss_rule() -> None:
    training = learner("topk")
    silent = torch.zeros(WIDTH, dtype=torch.long)
    for step in range(10):
        assert dead(training) == (silent > 2).sum()
        active = (training.sae.encode(residuals(step)) != 0).any(0)
        training.step(residuals(step))
        silent = torch.where(active, 0, silent + 1)
    assert dead(training) == (silent > 2).sum() > 0


def test_a_trained_sae_can_be_trained_further() -> None:
    original = training_sae.inference(in_training("batchtopk"), SCALE)
    training = trainer(training_sae.trainable(original), steps=STEPS, decay_steps=STEPS)
    resid = residuals(60, 500)

    def mse(sae: SAE[Any]) -> float:
        return float((sae(resid) - resid).pow(2).sum(-1).mean())

    assert torch.equal(inference(training)(resid), original(resid))
    taken(training, 0, STEPS)
    assert mse(inference(training)) < 0.8 * mse(original)


def test_on_a_models_activations_it_learns_to_reconstruct(architecture: str) -> None:
    model = small_model("llama")
    steps = 80
    buffer = ActivationBuffer(
        model, {"sae": [Stream(HOOKPOINT)]}, NOT_SPECIAL, seed=0, batches_per_fill=4
    )
    batches = (random_tokens(batch=4, length=24, seed=seed) for seed in range(steps))
    first_served = buffer.serve(0, batches)["sae"]
    torch.manual_seed(0)
    training = trainer(
        new(architecture, sparsity_coefficient=0.02),
        steps=steps,
        batch_tokens=96,
        lr=4e-3,
        scale=scale_for(first_served),
        warm_up_steps=10,
        decay_steps=30,
        dead_window_steps=50,
        sampling_window_steps=40,
    )
    losses = []
    for step in range(steps):
        losses.append(float(training.step(buffer.serve(step, batches)["sae"])))
    first, last = sum(losses[:10]), sum(losses[-10:])
    assert last < 0.7 * first
    held_out = model.resid_entering(2, random_tokens(batch=8, length=24, seed=999)).flatten(0, 1)
    sae = inference(training)
    error = (sae(held_out) - held_out).pow(2).sum()
    fvu = float(error / (held_out - held_out.mean(0)).pow(2).sum())
    assert fvu < 0.75
    assert list(islice(batches, 1)) == []
