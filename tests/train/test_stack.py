"""Runs in a stack: they train as they do alone, up to rounding."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch

from sae_lora.config.schema import LoRAConfig
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.stacked_lora import StackedLoRA, padded_rank
from sae_lora.splice.stack import Stack
from sae_lora.train.passes import Alone, Together
from sae_lora.train.train_state import DistillState
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import random_tokens, small_model
from tests.support.trainings import CONFIG, batches, pack, same, stopped, training

STEPS = 4
RANKS = (17, 2, 4)


def trainings(model: LanguageModel, ranks: Sequence[int] = RANKS, **adapters: Any) -> list[Any]:
    """Runs around two SAEs, with several ranks, seeds and shares of dropout."""
    saes = topk_sae(), jumprelu_sae()
    return [
        training(
            model,
            saes[number % 2 if adapters.get("blocks") is None else 0],
            dataclass_with_seed(number),
            STEPS,
            LoRAConfig(rank=rank, dropout=0.1 * number, **adapters),
        )
        for number, rank in enumerate(ranks)
    ]


def dataclass_with_seed(seed: int) -> Any:
    import dataclasses

    return dataclasses.replace(CONFIG, seed=seed)


def weights(runs: Sequence[DistillState]) -> list[dict[str, torch.Tensor]]:
    return [
        {name: weight.detach().clone() for name, weight in run.student.weights.items()} for run in runs
    ]


def trained(model: LanguageModel, runs: list[Any], **how: Any) -> list[dict[str, torch.Tensor]]:
    together = pack(model, *runs, **how)
    for tokens in batches(STEPS):
        together._take_step(together.active, tokens)
    return weights(runs)


def assert_close(
    ours: Sequence[dict[str, torch.Tensor]], theirs: Sequence[dict[str, torch.Tensor]]
) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for name, weight in other.items():
            torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("blocks", [None, "all", [2, 3]])
def test_it_trains_as_each_run_alone(model: LanguageModel, blocks: Any) -> None:
    """With dropout: on a CPU the masks are the same. SAEs before the adapters may differ."""
    adapters = {} if blocks is None else {"blocks": blocks}
    before = weights(trainings(model, **adapters))
    alone = trained(model, trainings(model, **adapters))
    with patch.object(Stack, "hidden", autospec=True, side_effect=Stack.hidden) as stacked:
        together = trained(model, trainings(model, **adapters), stacked=True)
    assert stacked.call_count == STEPS + 1  # and the proof
    assert_close(together, alone)
    assert not any(same(first, last) for first, last in zip(before, together, strict=True))
