"""KL(teacher ‖ student) and its gradient on a GPU, in two passes over the logits.

Logits are the largest tensors of a step, and a GPU reads and writes them slower than it computes with
them. Per logit of a student, a step moves 24 bytes: the product writes 4, the first kernel reads 8 (the
teacher's too), the second reads 8 and writes 2 for the gradient in bfloat16, which the last product
reads. The product for the teacher writes another 4, once for all students.

The kernels are written in Triton, which comes with torch for CUDA. With `TRITON_INTERPRET=1` they run on
a CPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lora.splice.head import Head

_COLUMNS = 2048
"""Logits that a program of a kernel reads at once."""


@torch.library.custom_op("sae_lora::kl_compare", mutates_args=())
def compare(teacher: Tensor, student: Tensor, unit: float, is_capped: bool) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) of each token in nats, `[token]` in float64, and what `slope` needs.

    Args:
        teacher, student: Logits before the soft-cap, `[token, d_vocab]`, in float32. There may be gaps
            between rows, of the same size in both.
        unit: The soft-cap, if there is one.
        is_capped: True if there is a soft-cap.

    Returns:
        The KL; and of each token the largest logit of the teacher, the reciprocal of its sum of
        exponentials, and the same of the student, `[token, 4]`.
    """
    tokens, d_vocab = teacher.shape
    kl, statistics = _empty(teacher, student, unit, is_capped)
    settings = {"is_capped": is_capped, "columns": _COLUMNS, "num_warps": 8}
    length = teacher.stride(0)
    _compare[(tokens,)](teacher, student, kl, statistics, d_vocab, length, unit, **settings)
    return kl, statistics


@compare.register_fake
def _empty(teacher: Tensor, student: Tensor, unit: float, is_capped: bool) -> tuple[Tensor, Tensor]:
    kl = torch.empty(len(teacher), dtype=torch.float64, device=teacher.device)
    return kl, torch.empty(len(teacher), 4, device=teacher.device)


@torch.library.custom_op("sae_lora::kl_slope", mutates_args=("to",))
def slope(
    teacher: Tensor, student: Tensor, statistics: Tensor, to: Tensor, unit: float, is_capped: bool
) -> None:
    """Write d KL / d z into `to`, `[token, d_vocab]`; z are the student's logits before the soft-cap.

    With the teacher's probabilities p, the student's probabilities q and the soft-cap c, this is
    (q − p) · (1 − tanh²(z / c)). Without a soft-cap, the last factor is 1.

    Args:
        teacher, student, unit, is_capped: As in `compare`.
        statistics: The second result of `compare`.
        to: Memory for the result, in the dtype that the product with the head's matrix takes.
    """
    tokens, d_vocab = teacher.shape
    grid = tokens, triton.cdiv(d_vocab, _COLUMNS)
    settings = {"is_capped": is_capped, "columns": _COLUMNS, "num_warps": 8}
    lengths = teacher.stride(0), to.stride(0)
    _slope[grid](teacher, student, statistics, to, d_vocab, *lengths, unit, **settings)


def kernel_kl(
    teacher_hidden: Tensor,
    students: Sequence[Tensor],
    weights: Sequence[float | None],
    head: Head,
    room: tuple[Tensor, Tensor, Tensor],
) -> list[tuple[Tensor, Tensor | None]]:
    """KL(teacher ‖ student) of each student, summed in float64, and its gradient if it has a weight.

    Args:
        teacher_hidden: The teacher's states before the head, `[token, d_model]`; at least one token.
        students: Those of the students, in the same shape.
        weights: As for `KL`.
        head: A head with a matrix.
        room: Memory for the logits of a chunk of tokens, three times `[token, d_vocab]` in float32.
    """
    for_teacher, for_student, for_slope = room
    cap = head.unit, head.softcap is not None
    totals = [torch.zeros((), dtype=torch.float64, device=states.device) for states in students]
    gradients = [
        None if weight is None else torch.empty_like(states)
        for states, weight in zip(students, weights, strict=True)
    ]
    for start in range(0, len(teacher_hidden), len(for_teacher)):
        rows = slice(start, start + len(for_teacher))
        number = len(teacher_hidden[rows])
        teacher, student = for_teacher[:number], for_student[:number]
        head.product(teacher_hidden[rows], teacher)
        for states, gradient, total in zip(students, gradients, totals, strict=True):
            head.product(states[rows], student)
            kl, statistics = compare(teacher, student, *cap)
            total += kl.sum()
            if gradient is not None:
                to = for_slope[:number].view(states.dtype)[:, : head.d_vocab]
                slope(teacher, student, statistics, to, *cap)
                head.pull_back(to, states[rows], gradient[rows])
    return list(zip(totals, gradients, strict=True))


@triton.jit
def _tanh(x):
    """tanh, to 3e-7 of its size; libdevice has one, which no CPU can run."""
    square = x * x
    # The series up to x⁹. The other formula loses digits near 0.
    series = 62.0 / 2835
    series = -17.0 / 315 + square * series
    series = 2.0 / 15 + square * series
    series = -1.0 / 3 + square * series
    near = x + x * square * series
    far = 1 - 2 / (1 + tl.exp(2 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _logit(scores, where, inside, unit, is_capped: tl.constexpr):
    """Logits after the soft-cap; outside, so low a number that its exponential is 0."""
    logit = tl.load(scores + where, mask=inside, other=0.0)
    if is_capped:
        logit = unit * _tanh(logit / unit)
    return tl.where(inside, logit, -1e30)


@triton.jit
def _compare(
    teacher,
    student,
    kl,
    statistics,
    d_vocab,
    length,
    unit,
    is_capped: tl.constexpr,
    columns: tl.constexpr,
):
    token = tl.program_id(0)
    row = token.to(tl.int64) * length
    lanes = tl.arange(0, columns)
    # Each lane has its own largest logit and sums. They begin at -1e30 and not at −∞, because the
    # difference of two of them must be a number.
    largest_p = tl.full((columns,), -1e30, tl.float32)
    largest_q = tl.full((columns,), -1e30, tl.float32)
    sum_p = tl.zeros((columns,), tl.float32)
    sum_q = tl.zeros((columns,), tl.float32)
    difference = tl.zeros((columns,), tl.float32)
    for first in range(0, d_vocab, columns):
        inside = first + lanes < d_vocab
        p = _logit(teacher, row + first + lanes, inside, unit, is_capped)
        q = _logit(student, row + first + lanes, inside, unit, is_capped)
        peak = tl.maximum(largest_p, p)
        fading, numerator = tl.exp(largest_p - peak), tl.exp(p - peak)
        # Subtract before summing: if teacher and student agree, each term is small.
        difference = difference * fading + numerator * (p - q)
        sum_p = sum_p * fading + numerator
        largest_p = peak
        peak = tl.maximum(largest_q, q)
        sum_q = sum_q * tl.exp(largest_q - peak) + tl.exp(q - peak)
        largest_q = peak
    peak_p, peak_q = tl.max(largest_p, 0), tl.max(largest_q, 0)
    fading = tl.exp(largest_p - peak_p)
    total_p, total_q = tl.sum(sum_p * fading, 0), tl.sum(sum_q * tl.exp(largest_q - peak_q), 0)
    mean = tl.sum(difference * fading, 0).to(tl.float64) / total_p.to(tl.float64)
    log_p = peak_p.to(tl.float64) + tl.log(total_p.to(tl.float64))
    log_q = peak_q.to(tl.float64) + tl.log(total_q.to(tl.float64))
    tl.store(kl + token, mean - log_p + log_q)
    of_token = statistics + token.to(tl.int64) * 4
    tl.store(of_token, peak_p)
    tl.store(of_token + 1, 1 / total_p)
    tl.store(of_token + 2, peak_q)
    tl.store(of_token + 3, 1 / total_q)


@triton.jit
def _slope(
    teacher,
    student,
    statistics,
    to,
    d_vocab,
    length,
    length_to,
    unit,
    is_capped: tl.constexpr,
    columns: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    within = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = within < d_vocab
    where = token * length + within
    of_token = statistics + token * 4
    p = _logit(teacher, where, inside, unit, is_capped)
    q = _logit(student, where, inside, unit, is_capped)
    probability_p = tl.exp(p - tl.load(of_token)) * tl.load(of_token + 1)
    probability_q = tl.exp(q - tl.load(of_token + 2)) * tl.load(of_token + 3)
    result = probability_q - probability_p
    if is_capped:
        share = tl.where(inside, q / unit, 0.0)
        result = result * (1 - share * share)
    tl.store(to + token * length_to + within, result.to(to.dtype.element_ty), mask=inside)
