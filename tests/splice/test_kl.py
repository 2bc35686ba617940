"""The loss: its direction, a value computed by hand, and the fused form against the definition."""

import math
from functools import partial

import pytest
import torch

from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.head import Head
from sae_lora.splice.kl import KL, Comparison, fused_kl, kl_divergence, most_likely, whole_kl
from tests.support.families import D_MODEL, random_tokens


def test_a_value_computed_by_hand() -> None:
    """Teacher (1/2, 1/2), student (3/4, 1/4): KL = ½ ln(½ / ¾) + ½ ln(½ / ¼) = ½ ln(4/3)."""
    teacher, student = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    assert kl_divergence(teacher, student).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(student, teacher).item() == pytest.approx(reverse, rel=1e-6)
    assert abs(reverse - 0.5 * math.log(4 / 3)) > 0.01


def test_zero_for_equal_logits_and_positive_otherwise() -> None:
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


def kls(model: LanguageModel, chunk_tokens: int) -> dict[str, KL]:
    """The implementations of KL, by name."""
    any_head = Head(model.logits, model.config.vocab_size)
    return {
        "fused": partial(fused_kl, comparison=Comparison(Head.of(model), chunk_tokens)),
        "of any head": partial(fused_kl, comparison=Comparison(any_head, chunk_tokens)),
        "full": partial(whole_kl, logits=model.logits),
    }


def precise(head: Head) -> Head:
    """The head in float64."""
    assert head.matrix is not None
    return Head.linear(head.matrix.double(), head.softcap)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 48, 1000])
@pytest.mark.parametrize("how", ["fused", "of any head", "full"])
def test_value_and_gradient_equal_those_of_the_definition(
    model: LanguageModel, how: str, chunk_tokens: int
) -> None:
    """For the head of every family, including soft-capping, against float64."""
    generator = torch.Generator().manual_seed(3)
    teacher, student = torch.randn(2, 3, 16, D_MODEL, generator=generator)
    exact, logits = student.double().requires_grad_(), precise(Head.of(model)).logits
    whole = kl_of_float64(logits(teacher.double()), logits(exact))
    (expected,) = torch.autograd.grad(whole * 0.5, exact)
    (result,) = kls(model, chunk_tokens)[how](teacher, [student], [0.5])
    assert float(result.total) == pytest.approx(float(whole.detach()), rel=1e-6)
    error = (result.gradient - expected).norm() / expected.norm()
    assert error < 1e-6


def kl_of_float64(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_a_large_vocabulary(softcap: float | None, spread: float) -> None:
    """32k tokens, with logits as in random and in trained models: within 1e-6 of float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32_768, 64, generator=generator) * spread / 8
    teacher, student = torch.randn(2, 100, 64, generator=generator)
    head = Head.linear(weight, softcap)
    exact, logits = student.double().requires_grad_(), precise(head).logits
    whole = kl_of_float64(logits(teacher.double()), logits(exact))
    (expected,) = torch.autograd.grad(whole, exact)
    (result,) = fused_kl(teacher, [student], [1.0], Comparison(head, 48))
    assert float(result.total) == pytest.approx(float(whole.detach()), rel=1e-6)
    assert (result.gradient - expected).norm() / expected.norm() < 1e-6


def test_equal_states_have_no_kl_and_no_gradient(model: LanguageModel) -> None:
    """The gradient is Wᵀ(q − p). Torch's own may round the equal q and p, each by a unit of float32."""
    states = torch.randn(2, 16, D_MODEL)
    matrix = Head.of(model).matrix
    assert matrix is not None
    rounding = 2 * torch.finfo(torch.float32).eps * matrix.abs().max()
    for name, kl in kls(model, 7).items():
        (result,) = kl(states, [states.clone()], [1.0])
        assert result.total == 0
        assert result.gradient.abs().max() < (rounding if name == "full" else 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_the_largest_logits_is_the_most_likely(dtype: torch.dtype) -> None:
    """Ties are common in bfloat16. A model that shares its first place agrees only with that token."""
    scores = torch.randint(0, 3, (200, 40)).to(dtype)
    assert most_likely(scores).equal((scores == 2).int().argmax(-1))


def test_bfloat16_models_are_summed_in_float32(model: LanguageModel) -> None:
    head = Head.of(model)
    assert head.matrix is not None
    rounded = Head.linear(matrix := head.matrix.bfloat16(), head.softcap)
    teacher, student = torch.randn(2, 64, D_MODEL).bfloat16()
    (result,) = fused_kl(teacher, [student], [1.0], Comparison(rounded, 16))
    logits = [(states @ matrix.T).double() for states in (teacher, student)]
    if (cap := rounded.softcap) is not None:
        logits = [cap * torch.tanh(values / cap) for values in logits]
    assert float(result.total) == pytest.approx(float(kl_of_float64(*logits)), rel=1e-5)
    assert result.gradient.dtype == torch.bfloat16


def test_a_head_that_is_more_than_a_matrix_has_no_matrix(model: LanguageModel) -> None:
    assert Head.of(model).matrix is not None
    matrix = model.model.get_output_embeddings()
    assert isinstance(matrix, torch.nn.Linear)
    handle = matrix.register_forward_hook(lambda module, arguments, output: output * 1.1)
    teacher, student = torch.randn(2, 3, 16, D_MODEL)
    assert Head.of(model).matrix is None
    (fused,) = kls(model, 7)["fused"](teacher, [student], [1.0])
    (whole,) = kls(model, 7)["full"](teacher, [student], [1.0])
    handle.remove()
    assert float(fused.total) == pytest.approx(float(whole.total), rel=1e-5)
    torch.testing.assert_close(fused.gradient, whole.gradient)


def test_backbone_and_head_compute_the_models_logits(model: LanguageModel) -> None:
    tokens = random_tokens()
    whole = model.model(tokens, use_cache=False).logits
    assert torch.equal(model.logits(model.hidden(tokens)), whole)


@pytest.mark.parametrize("how", ["fused", "of any head", "full"])
def test_each_of_several_students_gets_its_result_alone(model: LanguageModel, how: str) -> None:
    """Bit for bit."""
    teacher, *students = torch.randn(4, 2, 16, D_MODEL, generator=torch.Generator().manual_seed(3))
    kl = kls(model, 7)[how]
    weights = [1.0, 0.25, 3.0]
    together = kl(teacher, students, weights)
    for student, weight, result in zip(students, weights, together, strict=True):
        (alone,) = kl(teacher, [student], [weight])
        assert torch.equal(result.total, alone.total)
        assert torch.equal(result.gradient, alone.gradient)
