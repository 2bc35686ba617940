"""KL between two models' next-token distributions, also where whole logits would not fit."""

from collections.abc import Callable
from typing import Any

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
    teacher = teacher_logits.float().log_softmax(-1)
    student = student_logits.float().log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def chunked_kl_sum(
    teacher_hidden: Tensor, student_hidden: Tensor, head: Head, chunk_tokens: int
) -> Tensor:
    """KL(teacher ‖ student) summed over all tokens, in nats, with few tokens' logits held at once.

    The gradient for the student's hidden states is made chunk by chunk in the forward pass, so that
    no logits outlive their chunk. The head itself gets no gradient: it is frozen.

    Args:
        teacher_hidden: `[..., d_model]`; gets no gradient.
        student_hidden: `[..., d_model]`.
        head: The model's head, the same for both.
        chunk_tokens: Tokens whose logits are held at once.

    Returns:
        A float32 scalar.
    """
    return _ChunkedKL.apply(
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        head,
        chunk_tokens,
    )


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, head: Head, chunk_tokens: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student) if needs_gradient else None
        for start in range(0, len(student), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            with torch.no_grad():
                teacher_logits = head(teacher[rows])
            with torch.set_grad_enabled(needs_gradient):
                hidden = student[rows].detach().requires_grad_(needs_gradient)
                part = kl_divergence(teacher_logits, head(hidden)).sum()
            total += part.detach()
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(part, hidden)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[None, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * outputs[0], None, None
