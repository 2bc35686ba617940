"""SAEs in cached generation: a token at a time is what the whole sequence at once is."""

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sae_lora.common.errors import UserError
from sae_lora.config.enums import Attention
from sae_lora.config.schema import Config, LoRAConfig, ModelConfig
from sae_lora.export.adapted_model import Adapted
from sae_lora.launcher.plan import plan
from sae_lora.models import adapter_files, lora
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import choose_attention, load_model, load_tokenizer
from sae_lora.saes.loading import SAEs, splices
from sae_lora.splice.hooks import Reading, Splice
from sae_lora.splice.trunk import Splices
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.composing import composed
from tests.support.families import random_tokens, small_model
from tests.support.trainings import fill

pytestmark = pytest.mark.slow  # many seconds in all

BOS, EOS = 0, 1
PADDING = (0, 3, 5)
"""Positions at the left of each of three sequences that hold nothing."""
NEW = 10
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
Made = Callable[..., Adapted]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = load_tokenizer(ModelConfig(name="tiny"))
    assert (found.bos_token_id, found.eos_token_id) == (BOS, EOS)
    return found


@pytest.fixture
def made(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Made:
    """A small model with adapters that change it, and two SAEs."""

    def adapted(family: str, *, keeps: bool = False, attention: Attention = Attention.auto) -> Adapted:
        model = small_model(family)
        choose_attention(model.model, attention, model.device)
        there = (Splice(1, topk_sae(), keeps), Splice(2, jumprelu_sae(), keeps))
        return with_adapters(Config(), tokenizer, model, there, tmp_path)

    return adapted


@pytest.fixture
def embedded(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Adapted:
    """The embedded model with its SAE, which leaves special tokens alone."""
    config = plan([composed()]).runs[0].config
    model = load_model(config.model, config.train.dtype, torch.device("cpu"))
    there = splices(config.sae, SAEs(read_dimensions(config.model), model.device).of(config.sae))
    assert [splice.keeps for splice in there] == [True]
    return with_adapters(config, tokenizer, model, there, tmp_path, size=0.03)


def with_adapters(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    model: LanguageModel,
    there: Splices,
    folder: Path,
    size: float = 0.3,
) -> Adapted:
    """As after a run."""
    adapted = model.view()
    attached = lora.attach(adapted, LoRAConfig(rank=2, blocks="all"), 1)
    fill(lora.trainable_weights(adapted))
    with torch.no_grad():
        for weight in lora.trainable_weights(adapted).values():
            weight *= size / 0.3
    adapter_files.save(attached, folder / "adapter", "small")
    found = Adapted(config, tokenizer, model, folder / "adapter", there)
    found.model.generation_config.eos_token_id = None  # so that all are equally long
    return found


def sequences(vocabulary: int = 96, length: int = 20) -> Tensor:
    """Tokens `[3, length]` of which some are special, in the middle too."""
    tokens = random_tokens(length=length) % (vocabulary - 2) + 2
    tokens[:, 0] = BOS
    tokens[1, 7] = tokens[2, 11] = EOS
    return tokens


def mask_of(tokens: Tensor) -> Tensor:
    """True but at the padding, `[batch, pos]`."""
    return torch.arange(tokens.shape[1]) >= torch.tensor(PADDING)[:, None]


def at_once(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Logits `[batch, pos, d_vocab]`."""
    return model(tokens, use_cache=False, **_places(mask, 0, tokens.shape[1])).logits


def one_by_one(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None, first: int = 1) -> Tensor:
    """The same, token after token with what is kept of those before; `first` of them at once."""
    name = next(
        one for one in ("cache", "past_key_values") if one in inspect.signature(model.forward).parameters
    )
    logits, kept, start = [], None, 0
    for end in range(first, tokens.shape[1] + 1):
        given = {name: kept} | _places(mask, start, end)
        output = model(tokens[:, start:end], use_cache=True, **given)
        kept, start = getattr(output, name), end
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _places(mask: Tensor | None, start: int, end: int) -> dict[str, Any]:
    if mask is None:
        return {}
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": mask[:, :end].long(), "position_ids": positions[:, start:end]}


@torch.no_grad()
def check_cached(adapted: Adapted, tokens: Tensor, mask: Tensor | None = None, first: int = 1) -> None:
    """Student and spliced model; the SAEs are in the model while this is checked."""
    seen = slice(None) if mask is None else mask
    for model in (adapted.model, adapted.base):
        plain = at_once(model, tokens, mask)[seen]
        with adapted.spliced():
            whole = at_once(model, tokens, mask)[seen]
            found = one_by_one(model, tokens, mask, first)[seen]
        assert (whole - plain).abs().max() > 0.1
        torch.testing.assert_close(found, whole, **CLOSE)


@pytest.mark.parametrize("keeps", [False, True], ids=["all", "special kept"])
def test_token_by_token_is_the_whole_sequence(family: str, keeps: bool, made: Made) -> None:
    check_cached(made(family, keeps=keeps), sequences())


def test_padding_at_the_left_changes_nothing(family: str, made: Made) -> None:
    """Neither what comes after it, nor what a cache keeps of it."""
    adapted = made(family, keeps=True)
    tokens = sequences()
    mask = mask_of(tokens)
    check_cached(adapted, tokens.where(mask, EOS), mask, first=8)
    with torch.no_grad(), adapted.spliced():
        padded = at_once(adapted.model, tokens.where(mask, EOS), mask)
        for row, padding in enumerate(PADDING):
            alone = at_once(adapted.model, tokens[row : row + 1, padding:], None)
            torch.testing.assert_close(padded[row, padding:], alone[0], **CLOSE)


@pytest.mark.parametrize("attention", [Attention.eager, Attention.blockwise], ids=lambda one: one.name)
def test_it_is_so_with_other_attention(attention: Attention, made: Made) -> None:
    adapted = made("gemma2", keeps=True, attention=attention)
    tokens = sequences()
    mask = mask_of(tokens)
    check_cached(adapted, tokens)
    check_cached(adapted, tokens.where(mask, EOS), mask, first=8)


def greedy(model: PreTrainedModel, tokens: Tensor, new: int) -> Tensor:
    """Tokens `[1, pos + new]`, the likeliest each time, without a cache."""
    for _ in range(new):
        tokens = torch.cat([tokens, at_once(model, tokens, None)[:, -1:].argmax(-1)], dim=1)
    return tokens


@torch.no_grad()
def check_generated(adapted: Adapted, tokens: Tensor) -> None:
    """What `generate` picks after prompts of several lengths, with a cache and without."""
    mask = mask_of(tokens)
    prompts = tokens.where(mask, EOS)
    given = {"attention_mask": mask.long(), "pad_token_id": EOS, "max_new_tokens": NEW}
    with adapted.spliced():
        cached = adapted.model.generate(prompts, do_sample=False, **given)
        uncached = adapted.model.generate(prompts, do_sample=False, use_cache=False, **given)
        for row, padding in enumerate(PADDING):
            expected = greedy(adapted.model, tokens[row : row + 1, padding:], NEW)
            assert torch.equal(cached[row, padding:], expected[0])
    assert torch.equal(cached, uncached)
    plain = adapted.model.generate(prompts, do_sample=False, **given)
    assert not torch.equal(cached, plain)


def test_generated_tokens_are_the_likeliest(family: str, made: Made) -> None:
    check_generated(made(family, keeps=True), sequences(length=14))


def test_text_is_generated_in_each_of_the_four_cells(embedded: Adapted) -> None:
    """With and without SAE and adapters: as many likeliest tokens of `logits`, one after another."""
    prompt, n = "import os\n\ndef", 5
    for sae, adapters in itertools.product((True, False), repeat=2):
        tokens = embedded.tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(n):
            likeliest = embedded.logits(tokens, sae=sae, adapters=adapters)[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, likeliest], dim=1)
        expected = embedded.tokenizer.decode(tokens[0], skip_special_tokens=True)
        assert embedded.generate(prompt, n, sae=sae, adapters=adapters) == expected
    with embedded.spliced(), pytest.raises(UserError, match="in place already"):
        embedded.generate(prompt)


def test_the_embedded_model_generates_with_its_sae(embedded: Adapted) -> None:
    tokens = sequences(vocabulary=2048, length=48)
    mask = mask_of(tokens)
    check_cached(embedded, tokens)
    check_cached(embedded, tokens.where(mask, EOS), mask, first=8)
    check_generated(embedded, tokens)


@torch.no_grad()
def test_special_tokens_keep_their_activation_in_every_step(made: Made) -> None:
    """Also where they come alone, after others that are in the cache."""
    tokens = sequences()
    special = torch.isin(tokens, torch.tensor([BOS, EOS]))
    for keeps in (False, True):
        readings: list[Reading] = []
        adapted = made("llama", keeps=keeps)
        with adapted.spliced(readings.append):
            one_by_one(adapted.model, tokens, None)
        applied = [len(one.resid) for one in readings if one.hookpoint == "blocks.1.hook_resid_post"]
        expected = ~special if keeps else torch.ones_like(special)
        assert applied == expected.sum(0).tolist()


def test_generating_leaves_the_models_as_they_were(made: Made) -> None:
    adapted = made("gpt2")
    before = [adapted.logits(sequences(), adapters=adapters) for adapters in (True, False)]
    check_generated(adapted, sequences(length=14))
    after = [adapted.logits(sequences(), adapters=adapters) for adapters in (True, False)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
