"""SAEs in training are those of sae-lens, and so are the SAEs that they are saved as."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUTrainingSAE,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
)
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from safetensors.torch import load_file

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.models.hookpoints import Place
from sae_lora.saes.metadata import stated
from sae_lora.saes.places import trained_at
from sae_lora.saes.sparse import SparseSAE
from sae_lora.saes.training import training_sae
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import D_MODEL
from tests.support.learners import HOOKPOINT, OF_SAES, WIDTH, K, in_training, learner, new, residuals
from tests.support.trainings import same

SCALE = 0.37
SAVED_AS = {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}


@pytest.fixture(params=OF_SAES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_sae_lens_reloads_the_same_sae(architecture: str, scale: float, tmp_path: Path) -> None:
    sae = in_training(architecture)
    training_sae.save(sae, tmp_path, scale)
    loaded, expected = SAE.load_from_disk(tmp_path), training_sae.inference(sae, scale)
    assert same(loaded.state_dict(), expected.state_dict())
    assert loaded.cfg == expected.cfg
    assert loaded.cfg.architecture() == SAVED_AS.get(architecture, architecture)
    latents = loaded.encode(residuals(9))
    assert torch.equal(latents, expected.encode(residuals(9)))
    assert torch.equal(loaded.decode(latents), expected.decode(latents))
    assert (latents != 0).any()


def test_saved_files_equal_those_of_sae_lens_after_its_fold(architecture: str, tmp_path: Path) -> None:
    sae = in_training(architecture)
    training_sae.save(sae, tmp_path / "ours", SCALE)
    sae.fold_activation_norm_scaling_factor(SCALE)
    sae.save_inference_model(tmp_path / "theirs")
    ours, theirs = (
        load_file(tmp_path / name / "sae_weights.safetensors") for name in ("ours", "theirs")
    )
    assert same(ours, theirs)
    ours, theirs = (
        json.loads((tmp_path / name / "cfg.json").read_text()) for name in ("ours", "theirs")
    )
    assert ours == theirs
    assert ours["metadata"]["model_name"] == "small"
    assert trained_at(stated(ours), "sae.path", "ours") == Place.named(HOOKPOINT)


def test_the_scale_is_folded_in(architecture: str) -> None:
    """On unscaled residuals it computes the same as on scaled residuals, divided by the scale."""
    sae = in_training(architecture)
    resid = residuals(9)
    expected = training_sae.inference(sae)(SCALE * resid) / SCALE
    torch.testing.assert_close(training_sae.inference(sae, SCALE)(resid), expected, rtol=1e-4, atol=1e-4)
    if architecture not in SAVED_AS:
        torch.testing.assert_close(sae(SCALE * resid) / SCALE, expected, rtol=1e-4, atol=1e-4)


def test_inference_and_save_change_neither_the_sae_nor_the_random_state(
    architecture: str, tmp_path: Path
) -> None:
    sae = in_training(architecture)
    sae.cfg.metadata.seen = {"layers": [1, 2]}
    original, random = copy.deepcopy(sae), torch.get_rng_state()
    frozen = training_sae.inference(sae, SCALE)
    training_sae.save(sae, tmp_path, SCALE)
    assert same(sae.state_dict(), original.state_dict())
    assert sae.cfg == original.cfg
    assert torch.equal(torch.get_rng_state(), random)
    assert not frozen.training
    assert not any(weight.requires_grad for weight in frozen.parameters())
    original = {
        name: weight.clone() for name, weight in training_sae.inference(sae).state_dict().items()
    }
    copied = training_sae.inference(sae)
    copied.cfg.metadata.seen["layers"].append(3)
    assert sae.cfg.metadata.seen == {"layers": [1, 2]}
    with torch.no_grad():
        for weight in sae.parameters():
            weight.zero_()
    assert same(copied.state_dict(), original)


def random_weights(sae: SAE[Any]) -> SAE[Any]:
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.normal_(std=0.4)
    return sae.requires_grad_(False).eval()


PRETRAINED = {
    "topk": lambda: random_weights(TopKSAE(TopKSAEConfig(D_MODEL, WIDTH, k=K))),
    "jumprelu": jumprelu_sae,
    "jumprelu with thresholds below zero": lambda: random_weights(jumprelu_sae()),
    "standard": lambda: random_weights(StandardSAE(StandardSAEConfig(D_MODEL, WIDTH))),
    "standard without b_dec": lambda: random_weights(
        StandardSAE(StandardSAEConfig(D_MODEL, WIDTH, apply_b_dec_to_input=False))
    ),
    "standard that normalises": lambda: random_weights(
        StandardSAE(StandardSAEConfig(D_MODEL, WIDTH, normalize_activations="layer_norm"))
    ),
    "gated": lambda: random_weights(GatedSAE(GatedSAEConfig(D_MODEL, WIDTH))),
    "batchtopk, saved": lambda: training_sae.inference(in_training("batchtopk"), SCALE),
    "matryoshka, saved": lambda: training_sae.inference(in_training("matryoshka"), SCALE),
}


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_trainable_copy_computes_the_same(name: str) -> None:
    original = PRETRAINED[name]()
    weights, random = copy.deepcopy(original.state_dict()), torch.get_rng_state()
    sae = training_sae.trainable(original)
    assert torch.equal(torch.get_rng_state(), random)
    resid = residuals(9)
    expected = original(resid)
    assert (original.encode(resid) != 0).any()
    for copied in (sae, training_sae.inference(sae)):
        assert torch.equal(copied.encode(resid), original.encode(resid))
        assert torch.equal(copied(resid), expected)
    forward = training_sae.forward(sae, resid, torch.zeros(WIDTH, dtype=torch.bool), 0)
    assert torch.equal(forward.recon, expected)
    (forward.mse + forward.aux).backward()
    for weight in sae.parameters():
        assert weight.grad is not None
        weight.data.zero_()
    assert same(original.state_dict(), weights)


def test_a_rescaled_topk_sae_stays_rescaled() -> None:
    """The rows of its decoder, of norm 1 up to rounding, are divided by their norms again."""
    original = training_sae.inference(in_training("topk"), SCALE)
    assert original.cfg.rescale_acts_by_decoder_norm
    sae = training_sae.trainable(original)
    assert sae.cfg.rescale_acts_by_decoder_norm
    assert sae.cfg.k == K
    resid = residuals(9)
    assert torch.equal(sae(resid), original(resid))
    torch.testing.assert_close(training_sae.inference(sae)(resid), original(resid), rtol=1e-5, atol=1e-5)
    unscaled = training_sae.trainable(topk_sae(k=3))
    assert not unscaled.cfg.rescale_acts_by_decoder_norm
    assert unscaled.cfg.k == 3


def test_a_trained_sae_of_less_precision_is_trained_in_float32() -> None:
    original = jumprelu_sae().to(torch.bfloat16)
    sae = training_sae.trainable(SparseSAE(original))
    assert sae.cfg.dtype == "float32"
    for name, weight in sae.state_dict().items():
        assert weight.dtype == torch.float32
        assert weight.is_contiguous()
        assert torch.equal(weight, original.state_dict()[name].float())


def test_metadata_of_a_finetuned_sae_is_kept(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    original = training_sae.inference(in_training("standard"), SCALE)
    original.cfg.metadata.model_from_pretrained_kwargs = {"fold_ln": True}
    sae = training_sae.trainable(original, sparsity_coefficient=0.3)
    assert training_sae.coefficients(sae) == {"l1": 0.3}
    training_sae.save(sae, tmp_path)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == HOOKPOINT
    assert metadata["model_from_pretrained_kwargs"] == {"fold_ln": True}
    assert metadata["training_architecture_details"]["l1_coefficient"] == 0.3
    assert original.cfg.metadata.training_architecture_details["l1_coefficient"] == 1.0
    assert not recwarn.list  # sae-lens itself warns about such kwargs whenever it builds an SAE


def test_saes_that_cannot_be_trained_further_are_refused() -> None:
    pursuit = MatchingPursuitSAE(MatchingPursuitSAEConfig(D_MODEL, WIDTH))
    with pytest.raises(ConfigError, match=r"matching_pursuit.*\n.*topk, jumprelu, standard, gated"):
        training_sae.trainable(pursuit)
    normalising = {"normalize_activations": "layer_norm"}
    topk, gated = TopKSAEConfig(D_MODEL, WIDTH, k=K), GatedSAEConfig(D_MODEL, WIDTH)
    for refused in (TopKSAE(replace(topk, **normalising)), GatedSAE(replace(gated, **normalising))):
        with pytest.raises(ConfigError, match="it normalises its input"):
            training_sae.trainable(refused)
    with pytest.raises(UserError, match="cannot be scaled"):
        training_sae.inference(training_sae.trainable(PRETRAINED["standard that normalises"]()), SCALE)


def test_the_forward_pass_equals_sae_lenss_with_its_loss_in_two_parts(architecture: str) -> None:
    sae = in_training(architecture)
    reference = copy.deepcopy(sae)
    resid, dead = residuals(9), torch.arange(WIDTH) % 3 == 0
    with torch.no_grad():
        for module in (sae, reference):
            if isinstance(module, JumpReLUTrainingSAE):
                module.threshold[:5] = -0.1
    forward = training_sae.forward(sae, resid, dead, 5)
    names = {"jumprelu": "l0", "standard": "l1", "gated": "l1"}
    coefficients = {names[architecture]: 1.0} if architecture in names else {}
    expected = reference.training_forward_pass(TrainStepInput(resid, coefficients, dead, 5, False))
    torch.testing.assert_close(forward.mse + forward.aux, expected.loss)
    assert forward.aux.item() > 0
    assert torch.equal(forward.latents, expected.feature_acts)
    assert torch.equal(forward.recon, expected.sae_out)
    assert torch.equal(forward.mse, (forward.recon - resid).pow(2).sum(-1).mean())
    (forward.mse + forward.aux).backward()
    expected.loss.backward()
    for ours, theirs in zip(sae.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert same(sae.state_dict(), reference.state_dict())  # thresholds have changed equally


def test_residuals_of_less_precision_are_read_in_float32(architecture: str) -> None:
    """The gradient for a model in bfloat16 has the precision of the model."""
    rounded, dead = residuals(9).to(torch.bfloat16), torch.arange(WIDTH) % 3 == 0
    results = []
    for resid in (rounded, rounded.float()):
        resid.requires_grad_()
        sae = in_training(architecture)
        forward = training_sae.forward(sae, resid, dead, 0)
        (forward.mse + forward.aux).backward()
        assert resid.grad is not None
        assert resid.grad.dtype == resid.dtype
        results.append([forward.recon, forward.aux, sae.W_enc.grad, sae.b_dec.grad])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_the_loss_of_a_matryoshka_sae_includes_its_inner_groups() -> None:
    sae = in_training("matryoshka")
    assert isinstance(sae, MatryoshkaBatchTopKTrainingSAE)
    assert sae.cfg.matryoshka_widths == [8, 16, 32, 64]
    resid = residuals(9)
    forward = training_sae.forward(sae, resid, torch.zeros(WIDTH, dtype=torch.bool), 0)
    inner = torch.zeros(())
    for width in (8, 16, 32):
        latents = torch.where(torch.arange(WIDTH) < width, forward.latents, 0)
        inner = inner + (sae.decode(latents) - resid).pow(2).sum(-1).mean()
    torch.testing.assert_close(forward.aux, inner)


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "gated"])
def test_penalties_are_those_of_sae_lens(architecture: str) -> None:
    trainer = learner(architecture, sparsity_coefficient=0.7)
    for step in range(3):
        expected = trainer._trainer.get_coefficients()
        assert training_sae.coefficients(trainer.sae) == expected
        assert list(expected.values()) == [0.7]
        trainer.step(residuals(step))


def test_a_new_sae_has_sae_lenss_defaults() -> None:
    torch.manual_seed(1)
    sae = new("matryoshka", exclude_special_tokens=True)
    torch.manual_seed(1)
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D_MODEL, d_sae=WIDTH, k=K, matryoshka_widths=[8, 16, 32, 64]
    )
    expected = MatryoshkaBatchTopKTrainingSAE(config)
    assert same(sae.state_dict(), expected.state_dict())
    assert sae.cfg.metadata.hook_name == HOOKPOINT
    assert sae.cfg.metadata.exclude_special_tokens
    sae.cfg.metadata = expected.cfg.metadata
    assert sae.cfg == expected.cfg


@pytest.mark.parametrize(
    ("architecture", "name"), [("standard", "l1"), ("gated", "l1"), ("jumprelu", "l0")]
)
def test_the_sparsity_coefficient_is_sae_lenss_default_or_the_given_one(
    architecture: str, name: str
) -> None:
    for coefficient, expected in ((None, 1.0), (0.2, 0.2)):
        sae = new(architecture, sparsity_coefficient=coefficient)
        assert training_sae.coefficients(sae) == {name: expected}


def test_each_architecture_has_its_class_of_sae_lens() -> None:
    kinds = {name: type(new(name)) for name in OF_SAES}
    assert kinds["topk"] is TopKTrainingSAE
    assert kinds["standard"] is StandardTrainingSAE
    assert len(set(kinds.values())) == len(OF_SAES)
    assert all(issubclass(kind, TrainingSAE) for kind in kinds.values())


@pytest.mark.parametrize(
    ("architecture", "k"),
    [("topk", None), ("topk", 4.5), ("topk", 0), ("topk", 65), ("batchtopk", None), ("matryoshka", -1)],
)
def test_an_impossible_k_is_refused(architecture: str, k: float | None) -> None:
    with pytest.raises(ConfigError, match=r"sae\.l0.*\n.*64"):
        new(architecture, k=k)
