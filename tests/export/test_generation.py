"""SAEs in cached generation: token by token gives the logits of one pass over the sequence."""

import dataclasses
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
from sae_lora.models.attention.choice import choose_attention
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import load_model, load_tokenizer
from sae_lora.saes.loading import SAEs, splices
from sae_lora.splice.hooks import Reading, Splice
from sae_lora.splice.positions import NOT_SPECIAL, Special
from sae_lora.splice.trunk import Splices
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.composing import composed
from tests.support.families import random_tokens, small_model
from tests.support.trainings import fill

pytestmark = pytest.mark.slow  # many seconds in all

BOS, EOS = 0, 1
PADDING = (0, 3, 5)
"""Number of padded positions at the left of each of three sequences."""
NEW_TOKENS = 10
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MakeAdapted = Callable[..., Adapted]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded = load_tokenizer(ModelConfig(name="tiny"))
    assert (loaded.bos_token_id, loaded.eos_token_id) == (BOS, EOS)
    return loaded


@pytest.fixture
def make_adapted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> MakeAdapted:
    """A function that makes a small model with nonzero adapters and two SAEs."""

    def adapted(family: str, *, keeps: bool = False, attention: Attention = Attention.auto) -> Adapted:
        model = small_model(family)
        choose_attention(model.model, attention, model.device)
        special = Special((BOS, EOS), first=True) if keeps else NOT_SPECIAL
        saes = Splice(1, topk_sae(), special=special), Splice(2, jumprelu_sae(), special=special)
        return with_adapters(Config(), tokenizer, model, saes, tmp_path)

    return adapted


@pytest.fixture
def embedded(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Adapted:
    """The embedded model with its SAE, around which special tokens keep their activations."""
    config = plan([composed()]).runs[0].config
    model = load_model(config.model, config.train.dtype, torch.device("cpu"))
    loaded = SAEs(read_dimensions(config.model), model.device).of(config.sae)
    saes = splices(config.sae, loaded, (BOS, EOS))
    assert [splice.special for splice in saes] == [Special((BOS, EOS))]
    return with_adapters(config, tokenizer, model, saes, tmp_path, size=0.03)


def with_adapters(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    model: LanguageModel,
    saes: Splices,
    folder: Path,
    size: float = 0.3,
) -> Adapted:
    """The model, as `load_adapted` returns it after a run."""
    adapted = model.view()
    attached = lora.attach(adapted, LoRAConfig(rank=2, blocks="all"), 1)
    fill(lora.trainable_weights(adapted))
    with torch.no_grad():
        for weight in lora.trainable_weights(adapted).values():
            weight *= size / 0.3
    adapter_files.save(attached, folder / "adapter", "small")
    result = Adapted(config, tokenizer, model, folder / "adapter", saes)
    result.model.generation_config.eos_token_id = None  # so that all texts have the same length
    return result


def sequences(vocabulary: int = 96, length: int = 20) -> Tensor:
    """Tokens `[3, length]` with BOS, and with EOS in the middle."""
    tokens = random_tokens(length=length) % (vocabulary - 2) + 2
    tokens[:, 0] = BOS
    tokens[1, 7] = tokens[2, 11] = EOS
    return tokens


def mask_of(tokens: Tensor) -> Tensor:
    """Mask `[batch, pos]`, which is False at padding."""
    return torch.arange(tokens.shape[1]) >= torch.tensor(PADDING)[:, None]


def at_once(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Logits `[batch, pos, d_vocab]` of a single pass."""
    return model(tokens, use_cache=False, **_position_arguments(mask, 0, tokens.shape[1])).logits


def one_by_one(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None, first: int = 1) -> Tensor:
    """The same logits, token by token with a cache; the first `first` tokens in one pass."""
    name = next(
        name
        for name in ("cache", "past_key_values")
        if name in inspect.signature(model.forward).parameters
    )
    logits, cache, start = [], None, 0
    for end in range(first, tokens.shape[1] + 1):
        arguments = {name: cache} | _position_arguments(mask, start, end)
        output = model(tokens[:, start:end], use_cache=True, **arguments)
        cache, start = getattr(output, name), end
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _position_arguments(mask: Tensor | None, start: int, end: int) -> dict[str, Any]:
    if mask is None:
        return {}
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": mask[:, :end].long(), "position_ids": positions[:, start:end]}


@torch.no_grad()
def check_cached(adapted: Adapted, tokens: Tensor, mask: Tensor | None = None, first: int = 1) -> None:
    """Check student and spliced model: with SAEs, token by token is equal to a single pass."""
    seen = slice(None) if mask is None else mask
    for model in (adapted.model, adapted.base):
        plain = at_once(model, tokens, mask)[seen]
        with adapted.spliced():
            whole = at_once(model, tokens, mask)[seen]
            cached = one_by_one(model, tokens, mask, first)[seen]
        assert (whole - plain).abs().max() > 0.1
        torch.testing.assert_close(cached, whole, **CLOSE)


@pytest.mark.parametrize("keeps", [False, True], ids=["all", "special kept"])
def test_token_by_token_is_equal_to_a_single_pass(
    family: str, keeps: bool, make_adapted: MakeAdapted
) -> None:
    check_cached(make_adapted(family, keeps=keeps), sequences())


def test_padding_at_the_left_does_not_change_logits(family: str, make_adapted: MakeAdapted) -> None:
    """Neither in a single pass nor with a cache."""
    adapted = make_adapted(family, keeps=True)
    tokens = sequences()
    mask = mask_of(tokens)
    check_cached(adapted, tokens.where(mask, EOS), mask, first=8)
    with torch.no_grad(), adapted.spliced():
        padded = at_once(adapted.model, tokens.where(mask, EOS), mask)
        for row, padding in enumerate(PADDING):
            alone = at_once(adapted.model, tokens[row : row + 1, padding:], None)
            torch.testing.assert_close(padded[row, padding:], alone[0], **CLOSE)


@pytest.mark.parametrize(
    "attention", [Attention.eager, Attention.blockwise], ids=lambda attention: attention.name
)
def test_eager_and_blockwise_attention(attention: Attention, make_adapted: MakeAdapted) -> None:
    adapted = make_adapted("gemma2", keeps=True, attention=attention)
    tokens = sequences()
    mask = mask_of(tokens)
    check_cached(adapted, tokens)
    check_cached(adapted, tokens.where(mask, EOS), mask, first=8)


def greedy(model: PreTrainedModel, tokens: Tensor, new: int) -> Tensor:
    """Tokens `[1, pos + new]` of greedy decoding without a cache."""
    for _ in range(new):
        tokens = torch.cat([tokens, at_once(model, tokens, None)[:, -1:].argmax(-1)], dim=1)
    return tokens


@torch.no_grad()
def check_generated(adapted: Adapted, tokens: Tensor) -> None:
    """Check `generate` after prompts of several lengths, with and without a cache."""
    mask = mask_of(tokens)
    prompts = tokens.where(mask, EOS)
    options = {"attention_mask": mask.long(), "pad_token_id": EOS, "max_new_tokens": NEW_TOKENS}
    with adapted.spliced():
        cached = adapted.model.generate(prompts, do_sample=False, **options)
        uncached = adapted.model.generate(prompts, do_sample=False, use_cache=False, **options)
        for row, padding in enumerate(PADDING):
            expected = greedy(adapted.model, tokens[row : row + 1, padding:], NEW_TOKENS)
            assert torch.equal(cached[row, padding:], expected[0])
    assert torch.equal(cached, uncached)
    plain = adapted.model.generate(prompts, do_sample=False, **options)
    assert not torch.equal(cached, plain)


def test_generation_is_greedy(family: str, make_adapted: MakeAdapted) -> None:
    check_generated(make_adapted(family, keeps=True), sequences(length=14))


def test_text_is_generated_in_each_of_the_four_cells(embedded: Adapted) -> None:
    """With and without SAE and adapters: equal to greedy decoding with `logits`."""
    prompt, n = "import os\n\ndef", 5
    for sae, adapters in itertools.product((True, False), repeat=2):
        tokens = embedded.tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(n):
            likeliest = embedded.logits(tokens, sae=sae, adapters=adapters)[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, likeliest], dim=1)
        expected = embedded.tokenizer.decode(tokens[0], skip_special_tokens=True)
        assert embedded.generate(prompt, n, sae=sae, adapters=adapters) == expected
    with embedded.spliced(), pytest.raises(UserError, match="already in the model"):
        embedded.generate(prompt)


def test_a_prompt_is_text_and_token_ids_may_be_special(embedded: Adapted) -> None:
    eos = embedded.tokenizer.eos_token
    prompt = f"import {eos} os"
    assert embedded.generate(prompt, 1).startswith(prompt)
    ids: list[int] = embedded.tokenizer(prompt).input_ids
    assert EOS in ids
    assert embedded.generate(ids, 1).startswith(prompt.replace(str(eos), ""))
    plain = embedded.tokenizer("import os").input_ids
    assert embedded.generate(plain, 4) == embedded.generate("import os", 4)
    without = dataclasses.replace(embedded.config.data, bos=False)
    embedded.config = dataclasses.replace(embedded.config, data=without)
    assert embedded.generate(plain[1:], 4) == embedded.generate("import os", 4)


def test_the_embedded_model_generates_with_its_sae(embedded: Adapted) -> None:
    tokens = sequences(vocabulary=2048, length=48)
    mask = mask_of(tokens)
    check_cached(embedded, tokens)
    check_cached(embedded, tokens.where(mask, EOS), mask, first=8)
    check_generated(embedded, tokens)


@torch.no_grad()
def test_special_tokens_keep_their_activations_in_every_step(make_adapted: MakeAdapted) -> None:
    """Also if a pass contains only a special token, after cached tokens."""
    tokens = sequences()
    special = torch.isin(tokens, torch.tensor([BOS, EOS]))
    for keeps in (False, True):
        readings: list[Reading] = []
        adapted = make_adapted("llama", keeps=keeps)
        with adapted.spliced(readings.append):
            one_by_one(adapted.model, tokens, None)
        applied = [
            len(reading.resid) for reading in readings if reading.hookpoint == "blocks.1.hook_resid_post"
        ]
        expected = ~special if keeps else torch.ones_like(special)
        assert applied == expected.sum(0).tolist()


def test_generation_does_not_change_the_models(make_adapted: MakeAdapted) -> None:
    adapted = make_adapted("gpt2")
    first = [adapted.logits(sequences(), adapters=adapters) for adapters in (True, False)]
    check_generated(adapted, sequences(length=14))
    second = [adapted.logits(sequences(), adapters=adapters) for adapters in (True, False)]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
