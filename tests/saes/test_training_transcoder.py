"""Transcoders in training: they learn, are saved in sae-lens's format, and resume to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from sae_lora.config.enums import TRANSCODING, Architecture, Hook, Reads
from sae_lora.config.schema import SAEChoice, SAEConfig
from sae_lora.saes.places import TRANSCODERS, hooks_of
from sae_lora.saes.training import training_sae
from sae_lora.saes.training.sae_trainer import SteppedSAETrainer
from sae_lora.saes.training.spliced_sae import SplicedSAE
from sae_lora.saes.training.training_transcoder import TrainingTranscoder
from sae_lora.splice.hooks import decoded
from tests.support.families import D_MODEL
from tests.support.learners import CPU, WIDTH, residuals
from tests.support.trainings import same

STEPS = 16
SAVED_AS = {
    (Architecture.transcoder, False): "transcoder",
    (Architecture.transcoder, True): "skip_transcoder",
    (Architecture.batchtopk_transcoder, False): "jumprelu_transcoder",
    (Architecture.batchtopk_transcoder, True): "jumprelu_skip_transcoder",
}
_MAP = torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(4))


def pairs(seed: int) -> Tensor:
    """Inputs and a function of them, 30 times as large, side by side."""
    inputs = residuals(seed)
    return torch.cat([inputs, 5 * (inputs @ _MAP).relu()], -1)


@pytest.fixture(params=SAVED_AS, ids=lambda kind: f"{kind[0].name}-{kind[1]}")
def kind(request: pytest.FixtureRequest) -> tuple[Architecture, bool]:
    return request.param


def new(kind: tuple[Architecture, bool]) -> SplicedSAE:
    """A new transcoder, fitted to the pairs."""
    torch.manual_seed(1)
    config = SAEConfig(architecture=kind[0], skip=kind[1])
    choice = SAEChoice(block=1, hook=Hook.mlp_out, reads=Reads.mlp_in, width=WIDTH, l0=4)
    made = training_sae.new(config, choice, D_MODEL, CPU, {"model_name": "small"})
    spliced = SplicedSAE(made, dead_after_steps=4)
    spliced.fit_scale(pairs(0))
    return spliced


def trainer(spliced: SplicedSAE) -> SteppedSAETrainer:
    return SteppedSAETrainer(
        spliced.sae,
        steps=STEPS,
        batch_tokens=len(pairs(0)),
        lr=1e-2,
        scale=float(spliced.scale),
        warm_up_steps=2,
        decay_steps=4,
        dead_window_steps=4,
        sampling_window_steps=4,
    )


def trained(kind: tuple[Architecture, bool]) -> SplicedSAE:
    """A transcoder after its training. Its skip connection, if it has one, is not zero."""
    spliced = new(kind)
    steps = trainer(spliced)
    for step in range(STEPS):
        steps.step(pairs(step))
    spliced.drop_frozen()
    return spliced.eval()


def fvu(spliced: SplicedSAE, values: Tensor) -> float:
    inputs, targets = values.split(D_MODEL, -1)
    with torch.no_grad():
        recon = decoded(spliced, spliced.encode(inputs), inputs)
    return float((recon - targets).square().sum() / (targets - targets.mean(0)).square().sum())


def test_it_learns_the_target_and_not_its_input(kind: tuple[Architecture, bool]) -> None:
    assert fvu(trained(kind), pairs(99)) < 0.7 * fvu(new(kind).eval(), pairs(99))


def test_the_units_of_the_target_do_not_matter(kind: tuple[Architecture, bool]) -> None:
    spliced = new(kind)
    values = pairs(3)
    inputs, targets = (spliced.scale * part for part in values.double().split(D_MODEL, -1))
    assert isinstance(spliced.sae, TrainingTranscoder)
    scaled = targets * spliced.sae.target_scale
    ratio = scaled.norm(dim=-1).mean() / inputs.norm(dim=-1).mean()
    assert float(ratio) == pytest.approx(1, 0.1)


def test_sae_lens_alone_reloads_the_same_bits(kind: tuple[Architecture, bool], tmp_path: Path) -> None:
    spliced = trained(kind)
    spliced.save(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == SAVED_AS[kind]
    assert loaded.cfg.metadata["hook_name"] == hooks_of(1, Reads.mlp_in)["hook_name"]
    assert loaded.cfg.metadata["hook_name_out"] == "blocks.1.hook_mlp_out"
    inputs = pairs(9)[:, :D_MODEL]
    with torch.no_grad():
        assert torch.equal(loaded(inputs), decoded(spliced, spliced.encode(inputs), inputs))


def test_all_four_classes_are_written() -> None:
    assert sorted(SAVED_AS.values()) == sorted(TRANSCODERS)
    assert {architecture for architecture, _ in SAVED_AS} == set(TRANSCODING)


def test_in_training_it_computes_what_it_is_saved_as(kind: tuple[Architecture, bool]) -> None:
    """Latents of BatchTopK are in the units of scaled inputs in training."""
    spliced, values = trained(kind), pairs(7)
    inputs = values[:, :D_MODEL]
    with torch.no_grad():
        spliced.train()
        latents = spliced.encode(values)
        ours = decoded(spliced, latents, values)
        spliced.eval()
        frozen = spliced.frozen
        if kind[0] is Architecture.batchtopk_transcoder:
            latents = latents / spliced.scale
        theirs = decoded(frozen, latents, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_stopped_training_resumes_to_the_last_bit(kind: tuple[Architecture, bool]) -> None:
    whole = trained(kind)
    first, second = new(kind), new(kind)
    steps = trainer(first)
    for step in range(7):
        steps.step(pairs(step))
    tensors, values = steps.state()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = trainer(second)
    resumed.restore(copies, values)
    for step in range(7, STEPS):
        resumed.step(pairs(step))
    assert same(second.sae.state_dict(), whole.sae.state_dict())


def test_a_saved_transcoder_can_be_trained_further(
    kind: tuple[Architecture, bool], tmp_path: Path
) -> None:
    """Its trainable copy computes the same, and learns."""
    spliced = trained(kind)
    spliced.save(tmp_path)
    loaded: Any = SAE.load_from_disk(tmp_path)
    copied = SplicedSAE(training_sae.trainable(loaded), dead_after_steps=4)
    assert fvu(copied.eval(), pairs(9)) == pytest.approx(fvu(spliced, pairs(9)), rel=1e-4)
    copied.train()
    values = pairs(9)
    optimizer = torch.optim.Adam(copied.parameters(), lr=1e-3)
    for _ in range(20):
        copied.encode(values)
        assert copied.last_forward is not None
        (copied.last_forward.mse / values[:, D_MODEL:].square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    copied.drop_frozen()
    assert fvu(copied.eval(), values) < fvu(spliced, values)
