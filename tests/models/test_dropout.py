"""Dropout drops the configured share, and the expected output is the input."""

import pytest
import torch

from sae_lora.models.lora import Dropout


def masks(p: float, shape: tuple[int, ...] = (400, 1003), seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return Dropout(p)(torch.ones(shape))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_share_and_scale(p: float) -> None:
    output = masks(p)
    deviation = (p * (1 - p) / output.numel()) ** 0.5
    assert float((output == 0).double().mean()) == pytest.approx(p, abs=5 * deviation + 1e-5)
    (zero, scale) = output.unique()
    assert zero == 0
    assert float(scale) == pytest.approx(1 / (1 - p), rel=1e-4)


def test_neighbours_are_independent() -> None:
    """Four masks come from one random word, and no two of them are correlated."""
    dropped = (masks(0.1, (2**20,)) == 0).double() - 0.1
    for distance in range(1, 9):
        correlation = float((dropped[distance:] * dropped[:-distance]).mean()) / (0.1 * 0.9)
        assert abs(correlation) < 5 / 2**10


def test_every_position_is_dropped_equally_often() -> None:
    shares = (masks(0.25, (2**16, 8)) == 0).double().mean(0)
    torch.testing.assert_close(shares, torch.full((8,), 0.25).double(), atol=0.009, rtol=0)


def test_masks_follow_the_seed_and_gradients_follow_the_masks() -> None:
    assert torch.equal(masks(0.3), masks(0.3))
    assert not torch.equal(masks(0.3), masks(0.3, seed=1))
    inputs = torch.randn(7, 5, requires_grad=True)
    output = Dropout(0.5)(inputs)
    (gradient,) = torch.autograd.grad(output.sum(), inputs)
    torch.testing.assert_close(gradient * inputs, output)


def test_without_training_or_share_the_input_is_returned() -> None:
    inputs = torch.randn(9)
    assert Dropout(0.5).eval()(inputs) is inputs
    assert Dropout(0.0)(inputs) is inputs
