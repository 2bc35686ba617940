"""KL between two models' next-token distributions, also where whole logits would not fit."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]
"""Logits `[token, d_vocab]` of hidden states `[token, d_model]`."""


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) of each position over the whole vocabulary, in nats.

    Computed in float32 whatever the logits' dtype.

    Args:
        teacher_logits: `[..., d_vocab]`.
        student_logits: `[..., d_vocab]`.

    Returns:
        `[...]`, not reduced.
    """
    return kl_to(log_probabilities(teacher_logits), student_logits)


def log_probabilities(logits: Tensor) -> Tensor:
    """Of each token of the vocabulary, in float32, `[..., d_vocab]`."""
    return logits.float().log_softmax(-1)


def kl_to(teacher: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) as in `kl_divergence`, from the teacher's log-probabilities."""
    student = log_probabilities(student_logits)
    return (teacher.exp() * (teacher - student)).sum(-1)


class SummedKL(NamedTuple):
    """A student's KL to its teacher, and where it leads.

    Args:
        total: KL(teacher ‖ student) summed over all tokens, in nats; a float32 scalar.
        gradient: Of the total for the student's hidden states, in their shape.
    """

    total: Tensor
    gradient: Tensor


def summed_kl(
    teacher_hidden: Tensor, student_hidden: Sequence[Tensor], head: Head, chunk_tokens: int
) -> list[SummedKL]:
    """KL(teacher ‖ student) of several students of one teacher, with few tokens' logits held at once.

    The gradients are made chunk by chunk along with the value, so that no logits outlive their
    chunk; the teacher's serve all students. The head itself gets no gradient: it is frozen.

    Args:
        teacher_hidden: `[..., d_model]`; gets no gradient.
        student_hidden: For each student `[..., d_model]`.
        head: The model's head, the same for all.
        chunk_tokens: Tokens whose logits are held at once.
    """
    teacher = teacher_hidden.detach().flatten(0, -2)
    students = [hidden.detach().flatten(0, -2) for hidden in student_hidden]
    totals = [torch.zeros((), dtype=torch.float32, device=teacher.device) for _ in students]
    gradients = [torch.empty_like(hidden) for hidden in students]
    for start in range(0, len(teacher), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        with torch.no_grad():
            log_p = log_probabilities(head(teacher[rows]))
        for student, total, gradient in zip(students, totals, gradients, strict=True):
            with torch.enable_grad():
                hidden = student[rows].requires_grad_()
                part = kl_to(log_p, head(hidden)).sum()
            total += part.detach()
            (gradient[rows],) = torch.autograd.grad(part, hidden)
    return [
        SummedKL(total, gradient.reshape(hidden.shape))
        for total, gradient, hidden in zip(totals, gradients, student_hidden, strict=True)
    ]
