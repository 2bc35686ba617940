"""Shared computations give, bit for bit, the results of each run alone."""

import pytest
import torch

from sae_lora.config.schema import LoRAConfig
from sae_lora.models import lora
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.student import cuts
from sae_lora.splice.trunk import Trunk
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import N_BLOCKS, random_tokens, small_model
from tests.support.trainings import fill, student

LAST = N_BLOCKS - 1
TOKENS = random_tokens(length=24)  # longer than the sliding windows


@pytest.mark.parametrize("block", range(1, N_BLOCKS + 1))
def test_a_model_in_two_parts_equals_the_model(model: LanguageModel, block: int) -> None:
    blocks = list(model.blocks)
    whole = model.hidden(TOKENS)
    resid = model.resid_entering(block, TOKENS)
    assert torch.equal(model.hidden(TOKENS, block, resid), whole)
    for first in range(1, block):
        entering = model.resid_entering(first, TOKENS)
        assert torch.equal(model.resid_entering(block, TOKENS, first, entering), resid)
    assert torch.equal(model.hidden(TOKENS), whole)
    assert list(model.blocks) == blocks == list(getattr(*model._blocks_at))


def test_a_failed_part_leaves_the_model_complete(model: LanguageModel) -> None:
    whole = model.hidden(TOKENS)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        model.hidden(TOKENS, 2, torch.zeros(3, 24, 7))
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        model.resid_entering(3, TOKENS, 1, torch.zeros(3, 24, 7))
    assert torch.equal(model.hidden(TOKENS), whole)
    assert not any(module._forward_hooks for module in model.model.modules())


SAES = [topk_sae(seed=1), jumprelu_sae(), topk_sae(seed=2)]


def test_shared_computations_run_once() -> None:
    model = small_model("gemma2")
    runs: list[int] = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: runs.append(number))
    students = [
        student(small_model("gemma2"), SAES[0]),
        student(small_model("gemma2"), SAES[0], LoRAConfig(rank=3)),
        student(small_model("gemma2"), SAES[1]),
        student(small_model("gemma2"), SAES[0], LoRAConfig(rank=2, blocks=[LAST])),
    ]
    trunk = Trunk(model, TOKENS, cuts(students))
    trunk.hidden()
    for each in students:
        each.hidden(trunk)
    # The teacher; and block 2 after SAES[0], for the run that adapts only the last block.
    assert sorted(runs) == [0, 1, 2, 2, 3]


def test_views_share_only_the_weights(model: LanguageModel) -> None:
    plain = model.hidden(TOKENS)
    first, second = model.view(), model.view()
    lora.attach(first, LoRAConfig(rank=2), first_sae=0)
    lora.attach(second, LoRAConfig(rank=3, targets="attn", blocks="all"), first_sae=0)
    fill(lora.trainable_weights(first))
    assert torch.equal(second.hidden(TOKENS), plain)
    assert torch.equal(model.hidden(TOKENS), plain)
    fill(lora.trainable_weights(second))
    assert not torch.equal(first.hidden(TOKENS), second.hidden(TOKENS))
    pointers = {weight.data_ptr() for weight in model.model.parameters()}
    for view in (first, second):
        frozen = [weight for weight in view.model.parameters() if not weight.requires_grad]
        assert {weight.data_ptr() for weight in frozen} == pointers
    assert not any("lora" in name for name, _ in model.model.named_parameters())
