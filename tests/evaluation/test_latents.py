"""The suite `latents`: measures of made-up latents, effects against finite differences, whole runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_lora.cli import main
from sae_lora.config.enums import Suite
from sae_lora.evaluation import suite_records
from sae_lora.evaluation.latents.activations import CONTEXTS, Activations
from sae_lora.evaluation.latents.effects import cosines, derivative, directions, gram, promoted
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import Splice, spliced
from sae_lora.splice.positions import Special
from tests.support.coders import topk_sae
from tests.support.families import D_MODEL, random_tokens
from tests.support.points import run_here
from tests.support.subjects import quick_points_in

D_SAE = 6


def made_up(tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Latents of two models: equal, twice as large, another, never active, and two that are swapped."""
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(tokens, D_SAE, generator=generator) - 0.6
    before = before.clamp(min=0)
    before[:, 3] = 0
    after = before.clone()
    after[:, 1] *= 2
    after[:, 2] = torch.rand(tokens, generator=generator)
    after[:, [4, 5]] = before[:, [5, 4]]
    return before, after


@pytest.mark.parametrize("at_once", [400, 37, 1])
def test_activations_of_made_up_latents(at_once: int) -> None:
    before, after = made_up()
    seen = Activations(D_SAE, torch.device("cpu"))
    places = torch.arange(400)
    for parts in zip(*(each.split(at_once) for each in (places, before, after)), strict=True):
        seen.add(*parts)
    assert seen.tokens == 400
    torch.testing.assert_close(seen.density[0], (before > 0).double().mean(0))
    for latent in (0, 1, 2, 4):
        expected = np.corrcoef(before[:, latent], after[:, latent])[0, 1]
        assert float(seen.correlation[latent]) == pytest.approx(expected, abs=1e-6)
    assert seen.correlation[:2].tolist() == pytest.approx([1, 1])
    assert seen.overlap[:2].tolist() == [1, 1]
    assert seen.overlap[3].isnan() and seen.correlation[3].isnan()
    means = (seen.mean[1] / seen.mean[0])[:2]
    assert means.tolist() == pytest.approx([1, 2])
    for latent in (2, 4):
        tops = [set(each[:, latent].topk(CONTEXTS).indices.tolist()) for each in (before, after)]
        jaccard = len(tops[0] & tops[1]) / len(tops[0] | tops[1])
        assert float(seen.overlap[latent]) == pytest.approx(jaccard)
    assert torch.equal(seen.places[0, :, 4].sort().values, seen.places[1, :, 5].sort().values)
    assert (seen.places[:, :, 3] == -1).all()


def test_an_adapter_that_rescales_turns_nothing_and_one_that_swaps_turns_two() -> None:
    """Hand-worked: two latents write the two directions of a vocabulary of two pairs of tokens."""
    matrix = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    decoder = torch.eye(2)
    products = gram(matrix)
    cosine, ratio = cosines(decoder, decoder @ (3 * torch.eye(2)), products)
    assert cosine.tolist() == pytest.approx([1, 1]) and ratio.tolist() == pytest.approx([3, 3])
    swapped = decoder @ torch.tensor([[0.0, 1], [1, 0]])
    cosine, ratio = cosines(decoder, swapped, products)
    assert cosine.tolist() == pytest.approx([0, 0]) and ratio.tolist() == pytest.approx([1, 1])
    effect = promoted(torch.stack([decoder[0], swapped[0]]), matrix, count=1)
    assert effect.ids[:, :, 0].tolist() == [[0, 2], [1, 3]]
    assert effect.values[:, :, 0].tolist() == [[1, 1], [-1, -1]]
    assert effect.bounds.tolist() == [[-1, 1], [-1, 1]]
    assert effect.histogram.sum(1).tolist() == [4, 4]
    assert effect.histogram[:, [0, 20, -1]].tolist() == [[1, 2, 1], [1, 2, 1]]


def test_a_change_that_is_equal_for_all_tokens_is_no_effect() -> None:
    matrix = torch.tensor([[1.0, 5], [-1, 5]])
    cosine, _ = cosines(torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 100]]), gram(matrix))
    assert cosine.tolist() == pytest.approx([1])


@pytest.mark.parametrize("block", [1, 2])
def test_the_derivative_is_that_of_finite_differences(model: LanguageModel, block: int) -> None:
    splice = Splice(block, topk_sae(), special=Special((0,)))
    tokens = random_tokens()
    counted = ~splice.special.positions(tokens)
    matrices = derivative(model, (splice,), splice.hookpoint, tokens, counted)
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))

    def read(step: float) -> Tensor:
        def add(module: object, arguments: object, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            changed = first + step * direction * counted[..., None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        with spliced(model, (splice,), tokens), torch.no_grad():
            handle = model.module_at(splice.hookpoint).register_forward_hook(add)
            hidden = model.hidden(tokens)
            handle.remove()
        return hidden.double().where(counted[..., None], 0.0).sum(1) / counted.sum(1)[:, None]

    step = 1e-2
    expected = (read(step) - read(-step)) / (2 * step)
    torch.testing.assert_close(matrices.double() @ direction.double(), expected, rtol=2e-2, atol=2e-3)


def test_directions_are_the_decoders_rows() -> None:
    sae = topk_sae()
    torch.testing.assert_close(directions(sae, 64, torch.device("cpu")), sae.W_dec, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_runs(tmp_path: Path) -> None:
    """An adapter that learns nothing changes no latent; one behind the SAE changes no activation."""
    point = quick_points_in(tmp_path)
    few = "layer.index=3", "train.train_tokens=512", "data.validation_tokens=1024"
    nothing, behind = run_here(
        point(*few, "lora.init=kaiming", "train.lr=1e-30"),
        point(*few, "lora.rank=4", "train.lr=1e-2"),
    )
    (new,) = run_here(point(*few, "method=sae", "sae=new", "sae.width=64", "sae.l0=4"))
    limit = "latents_effect_tokens=256"
    for run in (nothing, behind):
        assert main(["evaluate", str(run.path), "--suite", "latents", "--set", limit]) == 0
    assert main(["evaluate", str(new.path), "--suite", "latents"]) == 1
    changes = []
    for run in (nothing, behind):
        record = suite_records.read(run, Suite.latents)
        assert record is not None
        changes.append(record.results["saes"]["blocks.3.hook_resid_post"])
    unchanged, changed = changes
    assert unchanged["turned"] == {"value": 0, "low": 0, "high": 0}
    assert unchanged["cosine"]["value"] == pytest.approx(1, abs=1e-6)
    assert unchanged["norm_ratio"] == pytest.approx(1, abs=1e-5)
    assert unchanged["promoted"]["value"] == pytest.approx(1, abs=1e-3)
    assert changed["cosine"]["value"] < 0.999
    for change in changes:
        assert change["correlation"]["value"] == pytest.approx(1)
        assert (change["overlap"]["value"], change["contexts_changed"]["value"]) == (1, 0)
    arrays = load_file(behind.evaluation / "latents.safetensors")
    cosine = arrays["blocks.3.hook_resid_post/cosine"]
    assert len(cosine) == changed["latents"] == 1024
