"""Every causal family of transformers: splicing does what plain hooks do, or one sentence refuses it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sae_lora.common.errors import UserError
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.part_check import check_parts
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Splice, spliced
from tests.support.coders import topk_sae
from tests.support.families import random_tokens
from tests.support.tiny_models import N_BLOCKS, causal_families, small_causal_model

WORKING = (
    *("bart", "bert", "bloom", "cohere", "cohere2", "deepseek_v3", "falcon", "gemma2", "gemma3"),
    *("gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "jamba"),
    *("lfm2", "llama", "mamba", "mistral", "mixtral", "modernbert-decoder", "mpt", "olmo", "olmo2"),
    *("olmo3", "openai-gpt", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_5"),
    *("qwen3_5_text", "qwen3_moe", "qwen3_next", "recurrent_gemma", "rwkv", "smollm3", "stablelm"),
)
"""Families that must work. BERT has is_decoder=true, and OPT an embedding narrower than its blocks."""
REFUSED = {
    "deepseek_v4": r"the output of block 0 has the shape \[2, 8, 4, 32\]",
    "gemma3n_text": r"the output of block 0 has the shape \[4, 2, 8, 32\]",
    "gemma4_text": "block 2 does not run on the tokens and the output of block 1 alone: KeyError",
    "prophetnet": r"the output of block 0 has the shape \[2, 24, 32\]",
    "roberta": "it is not causal",
    "xlm": "block 1 reads something else than the output of block 0",
    "zaya": "block 1 reads more than the tokens and the output of block 0",
}
"""Families that one sentence must refuse, and words of it."""
OTHERS = sorted(set(causal_families()) - {*WORKING, *REFUSED})
LEAST_WORKING = 140
"""Smallest number of model types that work, of all with a small config here."""


@pytest.fixture(scope="module")
def outcomes() -> Counter[str]:
    """The number of families by outcome."""
    return Counter()


@pytest.mark.parametrize("model_type", WORKING)
@pytest.mark.case("B3")
def test_a_spliced_model_is_what_plain_hooks_make(model_type: str) -> None:
    check_family(small_causal_model(model_type))


@pytest.mark.parametrize("model_type", REFUSED)
def test_an_unusual_family_is_refused_in_one_sentence(model_type: str) -> None:
    with pytest.raises(UserError, match=REFUSED[model_type]) as refusal:
        check_family(small_causal_model(model_type))
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS)
def test_any_other_family_works_or_is_refused(model_type: str, outcomes: Counter[str]) -> None:
    try:
        model = small_causal_model(model_type)
    except Exception as error:
        outcomes["not built"] += 1
        pytest.skip(f"no small config: {error}")
    try:
        check_family(model)
        outcomes["working"] += 1
    except UserError as refusal:
        assert "\n" not in str(refusal)
        outcomes["refused"] += 1


@pytest.mark.slow
def test_most_families_work(outcomes: Counter[str]) -> None:
    """After the other tests of this module."""
    if outcomes.total() < len(OTHERS):
        pytest.skip("the other families were not tried in this process")
    outcomes["working"] += len(WORKING)
    outcomes["refused"] += len(REFUSED)
    print(dict(outcomes))
    assert outcomes["working"] >= LEAST_WORKING


@torch.no_grad()
def check_family(model: PreTrainedModel) -> None:
    """Compare a model's parts, and SAEs in it, with the transformers model and plain hooks.

    Raises:
        UserError: If the model is refused.
    """
    parts = LanguageModel(model)
    check_parts(parts)
    tokens, sae = random_tokens(length=12), topk_sae()
    base = ce(model(input_ids=tokens, use_cache=False).logits, tokens)
    assert close(ce(parts.logits(parts.hidden(tokens)), tokens), base)
    head = Head.of(parts)
    assert close(ce(head.logits(parts.hidden(tokens)), tokens), base)
    for cut in (1, N_BLOCKS // 2, N_BLOCKS):
        resid = parts.resid_entering(cut, tokens)
        with replaced(parts.blocks[cut - 1], lambda _, resid=resid: resid):
            assert close(ce(model(input_ids=tokens, use_cache=False).logits, tokens), base)
        assert close(ce(parts.logits(parts.hidden(tokens, cut, resid)), tokens), base)
        if cut > 1:
            earlier = parts.resid_entering(1, tokens)
            assert torch.allclose(parts.resid_entering(cut, tokens, 1, earlier), resid, rtol=1e-4)
    for block in (0, N_BLOCKS // 2):
        with replaced(parts.blocks[block], lambda resid: sae.decode(sae.encode(resid))):
            expected = ce(model(input_ids=tokens, use_cache=False).logits, tokens)
        with spliced(parts, [Splice(block, sae)]):
            assert close(ce(parts.logits(parts.hidden(tokens)), tokens), expected)
        recon = sae.decode(sae.encode(parts.resid_entering(block + 1, tokens)))
        assert close(ce(parts.logits(parts.hidden(tokens, block + 1, recon)), tokens), expected)
        assert not close(expected, base)


@contextmanager
def replaced(block: torch.nn.Module, replacement: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the `with` block, the block's output is replaced by a hook, as anyone would write it."""

    def hook(module: object, arguments: object, output: Any) -> Any:
        if isinstance(output, Tensor):
            return replacement(output)
        return (replacement(output[0]), *output[1:])

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def ce(logits: Tensor, tokens: Tensor) -> float:
    """Cross-entropy of the next tokens, in nats per token."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()).item()


def close(actual: float, expected: float) -> bool:
    """True if two cross-entropies are equal up to rounding."""
    return abs(actual - expected) <= 1e-5 * max(1, abs(expected))
