"""The kernels of the KL, in Triton's interpreter or on a GPU, against the definition in float64."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from sae_lora.splice import kl
from sae_lora.splice.head import Head
from sae_lora.splice.kl import Comparison

kl_kernels = pytest.importorskip("sae_lora.splice.kl_kernels", exc_type=ImportError)

pytestmark = pytest.mark.parametrize(
    "device",
    [pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"],
)
WEIGHTS = [1.0, None, 1.0]


def states(d_vocab: int, softcap: float | None, dtype: torch.dtype) -> tuple[Head, Tensor, list[Tensor]]:
    """A head, the states of a teacher, and those of three students, the last of which equals it."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(d_vocab, 64, generator=generator) / 4
    teacher, *students = torch.randn(3, 40, 64, generator=generator)
    return (
        Head.linear(matrix.to(dtype), softcap),
        teacher.to(dtype),
        [student.to(dtype) for student in (*students, teacher)],
    )


def defined(head: Head, teacher: Tensor, student: Tensor) -> tuple[float, Tensor]:
    """The KL and its gradient in float64."""
    assert head.matrix is not None
    logits = Head.linear(head.matrix.double(), head.softcap).logits
    exact = student.double().requires_grad_()
    log_p, log_q = (logits(some).log_softmax(-1) for some in (teacher.double(), exact))
    total = (log_p.exp() * (log_p - log_q)).sum()
    (gradient,) = torch.autograd.grad(total, exact)
    return float(total.detach()), gradient


@pytest.mark.parametrize("softcap", [None, 30.0, 4.0])
@pytest.mark.parametrize("d_vocab", [1000, 2048, 5003])
def test_value_and_gradient_in_float32(device: str, d_vocab: int, softcap: float | None) -> None:
    """Within 1e-6 of float64, for vocabularies that do and do not divide into the kernels' blocks."""
    head, teacher, students = on(device, *states(d_vocab, softcap, torch.float32))
    room = Comparison(head, 16).room(teacher)
    results = kl_kernels.kernel_kl(teacher, students, WEIGHTS, head, room)
    for student, weight, (total, gradient) in zip(students, WEIGHTS, results, strict=True):
        expected, slope = defined(head, teacher, student)
        assert float(total) == pytest.approx(expected, rel=1e-6)
        assert (gradient is None) == (weight is None)
        if gradient is not None:
            assert (gradient - slope).norm() <= 1e-6 * max(float(slope.norm()), 1.0)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_value_and_gradient_in_bfloat16(device: str, softcap: float | None) -> None:
    """Logits keep float32 on a GPU; the gradient is rounded before and after its last product."""
    head, teacher, students = on(device, *states(2048, softcap, torch.bfloat16))
    room = Comparison(head, 16).room(teacher)

    def product(self: Head, hidden: Tensor, logits: Tensor) -> None:
        assert self.matrix is not None
        torch.mm(hidden.float(), self.matrix.float().T, out=logits)

    with patch.object(Head, "product", product if device == "cpu" else Head.product):
        results = kl_kernels.kernel_kl(teacher, students, [1.0] * 3, head, room)
    for student, (total, gradient) in zip(students, results, strict=True):
        expected, slope = defined(head, teacher, student)
        assert gradient is not None and gradient.dtype == torch.bfloat16
        assert float(total) == pytest.approx(expected, rel=1e-5)
        assert (gradient - slope).norm() <= 2**-8 * max(float(slope.norm()), 1e-3)


def test_large_logits_and_ties(device: str) -> None:
    """Logits of ±1000: the exponentials neither overflow nor give the difference of two infinities."""
    scores = torch.tensor([[1000.0, -1000.0, 999.0], [-1000.0, -1000.0, -1000.0]], device=device)
    student = torch.tensor([[999.0, -1000.0, 1000.0], [-1000.0, -999.0, -1000.0]], device=device)
    total, statistics = kl_kernels.compare(scores, student, 1.0, is_capped=False)
    log_p, log_q = (values.double().log_softmax(-1) for values in (scores, student))
    torch.testing.assert_close(total, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-6, atol=1e-6)
    slope = torch.empty_like(student)
    kl_kernels.slope(scores, student, statistics, slope, 1.0, is_capped=False)
    torch.testing.assert_close(slope.double(), log_q.exp() - log_p.exp(), rtol=1e-6, atol=1e-6)


def test_a_loss_that_is_not_finite_is_seen(device: str) -> None:
    teacher, student = torch.zeros(2, 3, 50, device=device)
    student[1, 7] = torch.nan
    total, _ = kl_kernels.compare(teacher, student, 1.0, is_capped=False)
    assert total.isnan().tolist() == [False, True, False]


def test_they_prove_themselves_against_the_operations(device: str) -> None:
    head, teacher, _ = on(device, *states(1000, 30.0, torch.float32))
    assert 0 < kl._difference(teacher, Comparison(head)) < 1e-5
    wrong: Any = lambda *arguments: [  # noqa: E731
        (total * 1.01, gradient) for total, gradient in kl._by_operations(*arguments)
    ]
    with patch.object(kl, "_by_kernels", wrong):
        assert kl._difference(teacher, Comparison(head)) == pytest.approx(0.01, rel=1e-3)


def on(device: str, head: Head, teacher: Tensor, students: list[Tensor]) -> tuple[Head, Tensor, Any]:
    """The same on a device."""
    assert head.matrix is not None
    moved = Head.linear(head.matrix.to(device), head.softcap)
    return moved, teacher.to(device), [student.to(device) for student in students]
