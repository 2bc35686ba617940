"""SAEs at the outputs of blocks, checked with independent hooks and finite differences."""

import pytest
import torch

from sae_lora.models.hookpoints import resid_post
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import Coder, Splice, spliced
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import D_MODEL, random_tokens


def logits(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    return model.model(tokens, use_cache=False).logits


def read_by(model: LanguageModel, block: int, tokens: torch.Tensor) -> torch.Tensor:
    """The residual stream that a block reads, from an independent hook."""
    inputs: list[torch.Tensor] = []
    handle = model.blocks[block].register_forward_pre_hook(
        lambda module, arguments, named: inputs.append(
            arguments[0] if arguments else named["hidden_states"]
        ),
        with_kwargs=True,
    )
    model.hidden(tokens)
    handle.remove()
    return inputs[0]


def test_every_row_of_the_batch_is_replaced(model: LanguageModel) -> None:
    """If a block returns a plain tensor, `output[0]` would be only the first row of the batch."""
    tokens = random_tokens(batch=3)
    with spliced(model, [Splice(1, topk_sae())]):
        batched = logits(model, tokens)
        alone = torch.cat([logits(model, row[None]) for row in tokens])
    torch.testing.assert_close(batched, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make_sae", [topk_sae, jumprelu_sae])
def test_an_sae_is_at_the_output_of_its_block(model: LanguageModel, make_sae) -> None:
    """The SAE reads the hidden state after the block, and the next block reads the SAE's output."""
    tokens, sae, readings = random_tokens(), make_sae(), []
    states = model.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    block_input = read_by(model, 1, tokens)
    with spliced(model, [Splice(1, sae)], observe=readings.append):
        assert torch.equal(read_by(model, 1, tokens), block_input)
        torch.testing.assert_close(read_by(model, 2, tokens), sae(states[2]))
    torch.testing.assert_close(readings[0].resid, states[2].flatten(0, 1))


def test_later_saes_read_what_earlier_saes_changed(model: LanguageModel) -> None:
    tokens, readings = random_tokens(), []
    first, second = topk_sae(seed=1), topk_sae(seed=2)
    with spliced(model, [Splice(0, first)]):
        states = read_by(model, 3, tokens)
    with spliced(model, [Splice(0, first), Splice(2, second)], observe=readings.append):
        model.hidden(tokens)
    assert [reading.hookpoint for reading in readings] == [resid_post(0), resid_post(2)]
    torch.testing.assert_close(readings[1].resid, states.flatten(0, 1))


class _Mixing:
    """A smooth stand-in for an SAE: its output is a fixed linear map of its input."""

    def __init__(self) -> None:
        self.matrix = torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(4)) / 4

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.to(x.dtype)

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return feature_acts


def gradient_before(model: LanguageModel, coder: Coder) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight before the spliced block, and the gradient of the mean squared logit for it."""
    weight = next(weight for weight in model.blocks[0].parameters() if weight.ndim == 2)
    weight.requires_grad_(True)
    with spliced(model, [Splice(1, coder)]):
        loss = logits(model, random_tokens()).square().mean()
    return weight, torch.autograd.grad(loss, weight)[0]


def test_gradients_before_the_sae_equal_finite_differences(model: LanguageModel) -> None:
    coder, tokens = _Mixing(), random_tokens()
    weight, gradient = gradient_before(model, coder)
    direction = gradient / gradient.norm()

    def loss(step: float) -> float:
        with torch.no_grad(), spliced(model, [Splice(1, coder)]):
            weight.add_(direction, alpha=step)
            value = logits(model, tokens).double().square().mean().item()
            weight.sub_(direction, alpha=step)
        return value

    slope = (loss(2e-3) - loss(-2e-3)) / 4e-3
    assert slope == pytest.approx(gradient.norm().item(), rel=2e-2)


@pytest.mark.parametrize("make_sae", [topk_sae, jumprelu_sae])
def test_gradients_flow_through_saes(model: LanguageModel, make_sae) -> None:
    _, gradient = gradient_before(model, make_sae())
    assert gradient.isfinite().all()
    assert gradient.norm() > 0
