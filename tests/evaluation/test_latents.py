"""The suite `latents`: measures of made-up latents, effects against finite differences, whole runs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import sync_playwright
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, Metaspace
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from sae_lora.cli import main
from sae_lora.config.enums import Suite
from sae_lora.evaluation import suite_records
from sae_lora.evaluation.latents import PAGE
from sae_lora.evaluation.latents.activations import CONTEXTS, Activations, Recorder
from sae_lora.evaluation.latents.between import Between, between
from sae_lora.evaluation.latents.contexts import BINS, TOKENS_BEFORE, WIDTH, Contexts
from sae_lora.evaluation.latents.effects import (
    cosines,
    derivative,
    directions,
    gram,
    promoted,
    slopes,
)
from sae_lora.evaluation.latents.tokens import texts_of
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Splice, spliced
from sae_lora.splice.positions import Special
from tests.support.browser import BROWSER
from tests.support.coders import jumprelu_sae, topk_sae
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


def test_contexts_and_histograms_of_made_up_latents() -> None:
    """One latent, active at places 3 and 4 of the first sequence and at the last of the second."""
    length = 30
    latents = torch.zeros(2, length, 2)
    latents[0, 3, 0], latents[0, 4, 0], latents[1, -1, 0] = 4.0, 1.0, 3.0
    counted = torch.ones(2, length, dtype=torch.bool)
    counted[:, 0] = False
    latents[:, 0, 0] = 100.0  # at a special position
    places = torch.arange(2 * length).view(2, length)
    seen = Activations(2, torch.device("cpu"))
    seen.add(places[counted], latents[counted], 2 * latents[counted])
    assert seen.highest.tolist() == [8, 0]
    contexts = Contexts(seen)
    for first in (0, 1):
        part = slice(first, first + 1)
        contexts.add(0, first * length, latents[part], counted[part])
    order = seen.places[0, :, 0].tolist()
    assert order[:3] == [3, 2 * length - 1, 4]
    whole = contexts.activations[0, :3, 0].tolist()
    assert whole[0] == [0] * TOKENS_BEFORE + [128, 32] + [0] * (WIDTH - TOKENS_BEFORE - 2)
    assert whole[1] == [0] * TOKENS_BEFORE + [96] + [0] * (WIDTH - TOKENS_BEFORE - 1)
    assert whole[2] == [0] * (TOKENS_BEFORE - 1) + [128, 32] + [0] * (WIDTH - TOKENS_BEFORE - 1)
    assert not contexts.activations[:, :, 1].any() and not contexts.activations[1].any()
    bins = {math.floor(value / 8 * BINS): 1 for value in (4.0, 1.0, 3.0)}
    histogram = contexts.histogram[0, 0].tolist()
    assert {bin: count for bin, count in enumerate(histogram) if count} == bins


class Scaled:
    """An SAE with one latent scaled."""

    def __init__(self, sae: Any, latent: int, scale: float) -> None:
        self.sae, self.latent, self.scale = sae, latent, scale

    def encode(self, x: Tensor) -> Tensor:
        latents = self.sae.encode(x)
        latents[..., self.latent] *= self.scale
        return latents

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.sae.decode(feature_acts)


@pytest.mark.parametrize("block", [1, 2])
def test_the_effect_of_ablation_is_the_slope_of_the_ce(model: LanguageModel, block: int) -> None:
    sae, tokens, head = jumprelu_sae(), random_tokens(), Head.of(model)
    splice = Splice(block, sae, special=Special((0,)))
    counted = ~splice.special.positions(tokens)
    recorder = Recorder(sae)
    slope = slopes(model, head, (splice._replace(sae=recorder),), tokens)[splice.hookpoint]
    latents = recorder.taken()[counted]
    rises = -(latents * (slope[counted] @ sae.W_dec.T)).sum(0)
    latent = int(rises.abs().argmax())

    def ce(scale: float) -> float:
        with spliced(model, (splice._replace(sae=Scaled(sae, latent, scale)),), tokens):
            logits = model.model(tokens).logits.double()
        return float(
            cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        )

    step = 0.02
    with torch.no_grad():
        expected = (ce(1 - step) - ce(1 + step)) / (2 * step)
    assert float(rises[latent]) == pytest.approx(expected, rel=2e-2, abs=1e-3)


def test_tokens_are_read_with_their_spaces() -> None:
    """Also by a tokenizer that leaves out the space at the beginning of a text."""
    for decoder, word in ((Metaspace(), "▁the"), (ByteLevel(), "Ġthe")):
        tokens = Tokenizer(WordLevel({"a": 0, word: 1, "the": 2, "<end>": 3}, unk_token="a"))
        tokens.decoder = decoder  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>")
        assert texts_of(tokenizer, [1, 2, 3]) == [" the", "the", "<end>"]


def test_a_part_of_a_character_is_shown_as_the_tokenizer_writes_it() -> None:
    tokens = Tokenizer(WordLevel({"a": 0, "Ã": 1}, unk_token="a"))
    tokens.decoder = ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    assert texts_of(PreTrainedTokenizerFast(tokenizer_object=tokens), [1]) == ["Ã"]


@pytest.mark.slow
def test_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that learns nothing changes no latent; one behind the SAE changes no activation.

    Their pages are opened, their latents exported, and two runs compared with each other.
    """
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
    # The first run's model is the plain model, so that from it to the second is from before to after.
    seeds = between(nothing, behind)
    assert seeds is not None and seeds.contexts_changed == 0 and seeds.overlap == 1
    assert seeds.cosine == pytest.approx(changed["cosine"]["value"], abs=1e-3)
    assert between(nothing, nothing) == Between(0, 0, pytest.approx(1), 1, 1)
    the_export(behind.path, tmp_path / "exported", arrays)
    assert main(["export", str(new.path), "--to", str(tmp_path / "none"), "--latents"]) == 1
    assert "has no measured latents" in capsys.readouterr().err
    if BROWSER is not None:
        in_the_browser(behind.evaluation / PAGE, cosine)


def the_export(run: Path, to: Path, arrays: dict[str, Tensor]) -> None:
    """The files have the fields of sae-dashboard 0.8.0, and values of the measured latents."""
    assert main(["export", str(run), "--to", str(to), "--latents"]) == 0
    files = sorted((to / "0" / "after").glob("batch-*.json"), key=lambda file: int(file.stem[6:]))
    assert len(files) == 8 and len(list((to / "0" / "before").iterdir())) == 8
    batches = [json.loads(file.read_text()) for file in files]
    assert set(batches[0]) == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    features = [feature for batch in batches for feature in batch["features"]]
    assert [feature["feature_index"] for feature in features] == list(range(1024))
    assert {*features[0]} == NEURONPEDIA
    of = {name.rpartition("/")[2]: values for name, values in arrays.items()}
    latent = int(of["density"][1].argmax())
    feature = features[latent]
    assert feature["frac_nonzero"] == pytest.approx(float(of["density"][1, latent]))
    first = feature["activations"][0]
    peak = first["values"][first["qualifying_token_index"]]
    assert peak == max(first["values"]) == pytest.approx(first["bin_max"], rel=0.01)
    assert len(first["tokens"]) == len(first["values"]) <= WIDTH
    assert sum(feature["freq_hist_data_bar_heights"]) == int(of["active"][1, latent])
    assert len(feature["pos_str"]) == len(feature["pos_values"]) == 10
    assert feature["pos_values"][0] > 0 > feature["neg_values"][0]
    again = ["export", str(run), "--to", str(to), "--latents"]
    assert main(again) == main([*again[:3], str(to.with_name("both")), "--latents", "--merge"]) == 1


def in_the_browser(page: Path, cosine: Tensor) -> None:
    """Search, sort and keys, without an error and without a request to a network."""
    order = cosine.nan_to_num(nan=9).argsort(stable=True).tolist()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        shown = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
        complaints: list[str] = []
        shown.on("console", lambda line: complaints.append(line.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on("request", lambda request: complaints.extend([request.url] * ("http" in request.url)))
        shown.goto(page.as_uri())

        def detail(latent: int) -> None:
            shown.wait_for_selector(f"#detail[data-latent='{latent}']")

        detail(order[0])  # the least cosine is the first
        assert shown.locator("#count").text_content() == "1024 of 1024 latents"
        assert 10 < shown.locator(".row").count() < 100  # only those in sight
        assert shown.locator("html").get_attribute("data-theme") == "dark"
        shown.locator("#list").press("ArrowDown")
        detail(order[1])
        shown.locator("#list").press("End")
        detail(order[-1])
        shown.keyboard.press("/")
        shown.keyboard.type("17")
        detail(17)
        assert shown.locator("#count").text_content() == "1 of 1024 latents"
        bound = float(cosine[order[2]]) + 1e-6
        shown.fill("#search", f"cosine<{bound:.7f}")
        assert shown.locator("#count").text_content() == "3 of 1024 latents"
        shown.fill("#search", "no such token")
        assert "No latent" in str(shown.locator("#detail").text_content())
        shown.fill("#search", "")
        shown.select_option("#sort", "number")
        shown.goto(f"{page.as_uri()}#0/700")
        shown.reload()
        detail(700)
        assert shown.locator("h2").text_content() == "Latent 700"
        assert shown.locator(".pair").count() == 2
        for width in (390, 1920):
            shown.set_viewport_size({"width": width, "height": 900})
            assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert complaints == []


NEURONPEDIA = set(
    "feature_index neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 "
    "correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson "
    "correlated_features_indices correlated_features_l1 correlated_features_pearson neg_str neg_values "
    "pos_str pos_values frac_nonzero freq_hist_data_bar_values freq_hist_data_bar_heights "
    "logits_hist_data_bar_heights logits_hist_data_bar_values n_prompts_total n_tokens_in_prompt "
    "dataset decoder_weights_dist activations vector".split()
)
"""The fields of `NeuronpediaDashboardFeature`, by sae-dashboard 0.8.0."""
