"""KL between two models' next-token distributions, also where whole logits would not fit."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lora.config.enums import KLComputation
from sae_lora.splice.head import Comparison


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) of each position over the whole vocabulary, in nats, `[...]`: not reduced.

    The logits are `[..., d_vocab]`. Computed in float32 whatever their dtype.
    """
    return kl_to(log_probabilities(teacher_logits), student_logits)


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities of logits `[..., d_vocab]`, the same shape, in float32."""
    return logits.float().log_softmax(-1)


def kl_to(teacher: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) as in `kl_divergence`, from the teacher's log-probabilities."""
    student = log_probabilities(student_logits)
    return (teacher.exp() * (teacher - student)).sum(-1)


class SummedKL(NamedTuple):
    """A student's KL to its teacher, and its gradient.

    Args:
        total: KL(teacher ‖ student) summed over all tokens, in nats; a scalar, float32 or float64.
        gradient: Gradient of the total times the student's weight, in the shape of its hidden states;
            `None` where the weight is.
    """

    total: Tensor
    gradient: Tensor | None


KL = Callable[[Tensor, Sequence[Tensor], Sequence[float | None]], list[SummedKL]]
"""KL(teacher ‖ student) of several students of one teacher, and its gradients; called with:

- the states that the head reads of the teacher, `[..., d_model]`; they get no gradient;
- those of each student;
- for each student the factor of its gradient: 1 / tokens for that of the mean, `None` for no gradient.
"""


def whole_kl(
    teacher_hidden: Tensor,
    students: Sequence[Tensor],
    weights: Sequence[float | None],
    logits: Callable[[Tensor], Tensor],
) -> list[SummedKL]:
    """KL(teacher ‖ student) with the logits of all tokens at once, through torch's own gradient.

    The reference for `fused_kl`. The head, which makes `logits [..., d_vocab]` of hidden states
    `[..., d_model]`, gets no gradient: it is frozen. The other arguments are those of `KL`.
    """
    with torch.no_grad():
        log_p = log_probabilities(logits(teacher_hidden))
    results = []
    for student, weight in zip(students, weights, strict=True):
        with torch.set_grad_enabled(weight is not None):
            hidden = student.detach().requires_grad_(weight is not None)
            total = kl_to(log_p, logits(hidden)).sum()
        gradient = None
        if weight is not None:
            (gradient,) = torch.autograd.grad(total, hidden, torch.full_like(total, weight))
        results.append(SummedKL(total.detach(), gradient))
    return results


@torch.no_grad()
def fused_kl(
    teacher_hidden: Tensor,
    students: Sequence[Tensor],
    weights: Sequence[float | None],
    comparison: Comparison,
) -> list[SummedKL]:
    """KL(teacher ‖ student) a few tokens at a time; the other arguments are those of `KL`.

    The gradient is computed along with the value, so that no logits outlive their chunk; the teacher's
    serve all students. Softmaxes are in float32, sums over tokens in float64.
    """
    hidden = [student.detach().flatten(0, -2) for student in students]
    gradients = [
        None if weight is None else torch.empty_like(states)
        for states, weight in zip(hidden, weights, strict=True)
    ]
    totals = [torch.zeros((), dtype=torch.float64, device=states.device) for states in hidden]
    for rows in comparison.chunks(teacher_hidden.flatten(0, -2)):
        for states, gradient, total in zip(hidden, gradients, totals, strict=True):
            for few in comparison.students(states[rows]):
                total += few.kl.sum()
                if gradient is not None:
                    comparison.slope_(few)
            if gradient is not None:
                comparison.head.pull_back(comparison.own, states[rows], gradient[rows])
    shape = teacher_hidden.shape
    return [
        SummedKL(total, None if weight is None else gradient.mul_(weight).reshape(shape))  # pyright: ignore[reportOptionalMemberAccess]
        for total, gradient, weight in zip(totals, gradients, weights, strict=True)
    ]


def kl_of(comparison: Comparison, how: KLComputation) -> KL:
    """The KL between students and their teacher, fused or with whole logits."""
    if how is KLComputation.full:
        return partial(whole_kl, logits=comparison.head.logits)
    return partial(fused_kl, comparison=comparison)
