"""The loss: its direction, its value worked by hand, and the chunked form against the whole."""

import math

import pytest
import torch

from sae_lora.kl import kl_divergence, summed_kl
from sae_lora.models import LanguageModel
from tests.families import D_MODEL, random_tokens


def test_worked_by_hand() -> None:
    """Teacher (1/2, 1/2), student (3/4, 1/4): KL = ½ ln(½ / ¾) + ½ ln(½ / ¼) = ½ ln(4/3)."""
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    assert kl_divergence(teacher, student).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    other_way = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(student, teacher).item() == pytest.approx(other_way, rel=1e-6)
    assert abs(other_way - 0.5 * math.log(4 / 3)) > 0.01


def test_nothing_between_equals_and_never_negative() -> None:
    first, second = torch.randn(2, 50, 97, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kl_divergence(first, first), torch.zeros(50))
    assert (kl_divergence(first, second) > 0).all()
    torch.testing.assert_close(kl_divergence(first + 5, second - 3), kl_divergence(first, second))


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits = torch.randn(2, 8, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = kl_divergence(logits[0].double(), logits[1].double())
    torch.testing.assert_close(
        kl_divergence(logits[0], logits[1]).double(), expected.double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("chunk_tokens", [1, 7, 48, 1000])
def test_chunks_give_the_value_and_gradient_of_the_whole(
    model: LanguageModel, chunk_tokens: int
) -> None:
    """For every family's head, soft-capping included."""
    generator = torch.Generator().manual_seed(3)
    teacher, student = torch.randn(2, 3, 16, D_MODEL, generator=generator)
    student.requires_grad_(True)
    whole = kl_divergence(model.logits(teacher), model.logits(student)).sum()
    (expected,) = torch.autograd.grad(whole * 0.5, student)
    (parts,) = summed_kl(teacher, [student], model.logits, chunk_tokens)
    torch.testing.assert_close(parts.total, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(parts.gradient * 0.5, expected, rtol=1e-4, atol=1e-6)


def test_head_and_backbone_make_the_model(model: LanguageModel) -> None:
    tokens = random_tokens()
    whole = model.model(tokens, use_cache=False).logits
    assert torch.equal(model.logits(model.hidden(tokens)), whole)


def test_several_students_get_what_each_gets_alone(model: LanguageModel) -> None:
    """To the last bit."""
    teacher, *students = torch.randn(4, 2, 16, D_MODEL, generator=torch.Generator().manual_seed(3))
    together = summed_kl(teacher, students, model.logits, 7)
    for student, found in zip(students, together, strict=True):
        (alone,) = summed_kl(teacher, [student], model.logits, 7)
        assert torch.equal(found.total, alone.total)
        assert torch.equal(found.gradient, alone.gradient)
