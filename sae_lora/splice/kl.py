"""KL between next-token distributions of two models: by the definition, and fused with its gradient.

Logits are the largest tensors of a run. The fused form computes them for a few tokens at a time, in
reused memory, and each pass over them takes at most as many tokens as a cache holds. On a GPU, two
kernels serve in place of torch's operations (kl_kernels.py).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lora.common.fast_path import PROOF_TOKENS, FastPath
from sae_lora.config.enums import KLComputation
from sae_lora.splice.head import Head


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) of each position over the whole vocabulary, `[...]`, in nats; not reduced.

    The logits are `[..., d_vocab]`. The computation is in float32 for every dtype.
    """
    return kl_to(log_probabilities(teacher_logits), student_logits)


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities `[..., d_vocab]` of logits `[..., d_vocab]`, in float32."""
    return logits.float().log_softmax(-1)


def kl_to(teacher: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) as in `kl_divergence`, from log-probabilities of the teacher."""
    student = log_probabilities(student_logits)
    return (teacher.exp() * (teacher - student)).sum(-1)


class SummedKL(NamedTuple):
    """KL(teacher ‖ student), summed over tokens, and its gradient."""

    total: Tensor
    """KL(teacher ‖ student) summed over all tokens, in nats; a float32 or float64 scalar."""
    gradient: Tensor | None
    """Gradient of weight · total with respect to the student's hidden states; `None` if its weight is
    `None`."""


KL = Callable[[Tensor, Sequence[Tensor], Sequence[float | None]], list[SummedKL]]
"""A function for KL(teacher ‖ student) of several students of one teacher, and its gradients. Arguments:

- the teacher's hidden states before the head, `[..., d_model]`; they get no gradient;
- the hidden states of each student, in the same shape;
- for each student the weight of its gradient: 1 / tokens for the mean KL, `None` for no gradient.
"""


def whole_kl(
    teacher_hidden: Tensor,
    students: Sequence[Tensor],
    weights: Sequence[float | None],
    logits: Callable[[Tensor], Tensor],
) -> list[SummedKL]:
    """KL(teacher ‖ student) with the logits of all tokens at once, and torch's autograd.

    The reference for `fused_kl`. `logits` is the head, from hidden states `[..., d_model]` to
    `[..., d_vocab]`; it is frozen and gets no gradient. The other arguments are those of `KL`.
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


class ChunkPart(NamedTuple):
    """One part of the current chunk: a student's logits and its KL. The next part overwrites it."""

    rows: slice
    """Rows of this part, counted from the start of the chunk."""
    scores: Tensor
    """Logits of the student after the soft-cap, divided by `head.unit`, `[token, d_vocab]`."""
    numerators: Tensor
    """Numerators of the student's softmax, `[token, d_vocab]`."""
    sums: Tensor
    """Sums of the numerators, `[token, 1]`."""
    log_sums: Tensor
    """ln Σ e^logit, `[token, 1]` in float64."""
    kl: Tensor
    """KL(teacher ‖ student) of each token in nats, `[token, 1]` in float64."""

    def puts_first(self, tokens: Tensor) -> Tensor:
        """True `[token]` if the given tokens are the most likely ones."""
        return most_likely(self.scores) == tokens


def most_likely(scores: Tensor) -> Tensor:
    """The token `[token]` with the largest logit of `[token, d_vocab]`.

    If several have it, as is common in bfloat16, it is the first of them for teacher and students.
    """
    return scores.max(-1).indices  # in bfloat16 on a CPU, five times as fast as argmax


class Comparison:
    """The teacher's logits and, one after another, its students' logits, for one chunk at a time.

    Args:
        head: The head of the teacher and of all students.
        chunk_tokens: Tokens whose logits are in memory at once; `None`: a number that fits the device.
    """

    def __init__(self, head: Head, chunk_tokens: int | None = None) -> None:
        self.head = head
        self._chunk_tokens = chunk_tokens
        self._chunk_buffers: list[Tensor] = []
        self._part_buffers: list[Tensor] = []
        self._log_sums: list[Tensor] = []

    def room(self, teacher_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for the logits of a chunk of these tokens: three float32 tensors `[token, d_vocab]`."""
        chunk = _chunk_tokens(self._chunk_tokens, self.head.d_vocab, teacher_hidden.device.type)
        tokens = min(len(teacher_hidden), chunk)
        self._allocate(tokens, teacher_hidden.device)
        first, second, third = (buffer[:tokens] for buffer in self._chunk_buffers)
        return first, second, third

    def chunks(self, teacher_hidden: Tensor) -> Iterator[slice]:
        """Chunks of the teacher's tokens `[token, d_model]`. Other methods use the current chunk."""
        chunk = _chunk_tokens(self._chunk_tokens, self.head.d_vocab, teacher_hidden.device.type)
        self.room(teacher_hidden)
        for start in range(0, len(teacher_hidden), chunk):
            rows = slice(start, start + chunk)
            hidden = teacher_hidden[rows]
            self._teacher_scores, self._minus_p, self.student_scores = (
                buffer[: len(hidden)] for buffer in self._chunk_buffers
            )
            size = len(self._part_buffers[0])
            self._parts = [slice(first, first + size) for first in range(0, len(hidden), size)]
            self.head.score(hidden, self._teacher_scores)
            self._log_sums = []
            for part in self._parts:
                sums, log_sums = self._softmax(self._teacher_scores[part], self._minus_p[part])
                self._minus_p[part].div_(sums.neg_())
                self._log_sums.append(log_sums)
            yield rows

    def parts(self, hidden: Tensor) -> Iterator[ChunkPart]:
        """Compare a student with the teacher on the current chunk, part by part.

        `hidden` `[token, d_model]` are the student's states for this chunk.
        """
        self.head.score(hidden, self.student_scores)
        for part, log_sums in zip(self._parts, self._log_sums, strict=True):
            scores = self.student_scores[part]
            numerators, differences = (buffer[: len(scores)] for buffer in self._part_buffers)
            sums, student_log_sums = self._softmax(scores, numerators)
            # Subtract before summing: if teacher and student agree, each term is small.
            torch.sub(scores, self._teacher_scores[part], out=differences).mul_(self._minus_p[part])
            kl = (
                differences.sum(-1, keepdim=True).double() * self.head.unit + student_log_sums - log_sums
            )
            yield ChunkPart(part, scores, numerators, sums, student_log_sums, kl)

    def slope_(self, part: ChunkPart) -> None:
        """Overwrite the student's scores with d KL / d z, where z are its logits before the soft-cap.

        With the teacher's probabilities p, the student's probabilities q and the soft-cap c, this is
        (q − p) · (1 − tanh²(z / c)). Without a soft-cap, the last factor is 1.
        """
        minus_p, scores, reciprocals = self._minus_p[part.rows], part.scores, part.sums.reciprocal()
        if self.head.softcap is None:
            torch.addcmul(minus_p, part.numerators, reciprocals, out=scores)
        else:
            slope = torch.addcmul(minus_p, part.numerators, reciprocals, out=part.numerators)
            product = torch.mul(slope, scores, out=self._part_buffers[1][: len(scores)])
            torch.addcmul(slope, product, scores, value=-1, out=scores)

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        """The teacher's scores `[token, d_vocab]`, and its ln Σ e^logit `[token, 1]` in float64."""
        return self._teacher_scores, torch.cat(self._log_sums)

    def _softmax(self, scores: Tensor, numerators: Tensor) -> tuple[Tensor, Tensor]:
        """Soft-cap the scores, write the numerators, and return their sums and ln Σ e^logit."""
        if self.head.softcap is not None:  # the exponentials are finite without subtracting maxima
            torch.mul(scores.tanh_(), self.head.softcap, out=numerators)
            sums = numerators.exp_().sum(-1, keepdim=True)
            return sums, sums.double().log()
        peaks = scores.amax(-1, keepdim=True)
        sums = torch.sub(scores, peaks, out=numerators).exp_().sum(-1, keepdim=True)
        return sums, sums.double().log() + peaks

    def _allocate(self, tokens: int, device: torch.device) -> None:
        """Allocate three buffers for the logits of a chunk, and two for the logits of a part of it."""
        buffers = self._chunk_buffers
        if buffers and len(buffers[0]) >= tokens and buffers[0].device == device:
            return
        part = min(tokens, _part_tokens(self.head.d_vocab, device.type))
        length = _row_length(self.head.d_vocab)
        self._chunk_buffers, self._part_buffers = (
            [torch.empty(rows, length, device=device)[:, : self.head.d_vocab] for _ in range(number)]
            for rows, number in ((tokens, 3), (part, 2))
        )


_CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**28}
"""Logits of a chunk, by device."""
_PART_LOGITS = {"cpu": 2**18, "cuda": 2**28}
"""Logits of a part of a chunk, by device: as many as a CPU's cache holds; a GPU is faster with many."""
_FEWEST_TOKENS = 256
"""Tokens per chunk, at least. With fewer, reading the head's matrix slows the product."""
_MOST_TOKENS = {"cpu": 2**9, "cuda": 2**28}
"""Tokens per chunk, at most, by device. With more, a CPU's product is hardly quicker."""


def room_bytes(tokens: int, chunk_tokens: int | None, d_vocab: int, device: str) -> int:
    """Memory of a `Comparison` for this number of tokens, in bytes; `device` is `cpu` or `cuda`."""
    chunk = min(tokens, _chunk_tokens(chunk_tokens, d_vocab, device))
    return 4 * _row_length(d_vocab) * (3 * chunk + 2 * min(chunk, _part_tokens(d_vocab, device)))


def _chunk_tokens(configured: int | None, d_vocab: int, device: str) -> int:
    tokens = max(_FEWEST_TOKENS, _CHUNK_LOGITS.get(device, 2**24) // d_vocab)
    return configured or min(tokens, _MOST_TOKENS.get(device, 2**9))


def _row_length(d_vocab: int) -> int:
    """Numbers from one row of logits to the next in memory.

    Rows begin at multiples of 64 bytes, and not all at the same place of a cache, as rows of a power of
    two do. On a CPU, products are up to a fifth quicker for it.
    """
    return (d_vocab + 15) // 32 * 32 + 16


def _part_tokens(d_vocab: int, device: str) -> int:
    return max(1, _PART_LOGITS.get(device, 2**18) // d_vocab)


@torch.no_grad()
def fused_kl(
    teacher_hidden: Tensor,
    students: Sequence[Tensor],
    weights: Sequence[float | None],
    comparison: Comparison,
) -> list[SummedKL]:
    """KL(teacher ‖ student), computed for a few tokens at a time. The first arguments are those of `KL`.

    Each chunk gives its part of the value and of the gradient, so its logits are not needed later. All
    students use the same logits of the teacher. Softmaxes are in float32, sums over tokens in float64.
    """
    shape, teacher = teacher_hidden.shape, teacher_hidden.flatten(0, -2)
    hidden = [student.detach().flatten(0, -2) for student in students]
    head = comparison.head
    if teacher.device.type == "cuda" and head.matrix is not None:
        results = _KERNELS.take(
            (teacher.device, teacher.dtype, head.matrix.shape, head.softcap),
            lambda: _by_kernels(teacher, hidden, weights, comparison),
            lambda: _by_operations(teacher, hidden, weights, comparison),
            lambda: _difference(teacher, comparison),
            max(1e-3, 4 * torch.finfo(teacher.dtype).eps),
        )
    else:
        results = _by_operations(teacher, hidden, weights, comparison)
    return [
        SummedKL(total, None if gradient is None else gradient.mul_(weight or 0).reshape(shape))
        for (total, gradient), weight in zip(results, weights, strict=True)
    ]


_Results = list[tuple[Tensor, Tensor | None]]
"""For each student the summed KL, and its gradient, `[token, d_model]`, if it has a weight."""
_KERNELS = FastPath("the KL in two kernels", "the KL in operations of torch")


def _by_operations(
    teacher: Tensor, students: Sequence[Tensor], weights: Sequence[float | None], comparison: Comparison
) -> _Results:
    """The KL of states `[token, d_model]`, in operations of torch."""
    gradients = [
        None if weight is None else torch.empty_like(states)
        for states, weight in zip(students, weights, strict=True)
    ]
    totals = [torch.zeros((), dtype=torch.float64, device=states.device) for states in students]
    for rows in comparison.chunks(teacher):
        for states, gradient, total in zip(students, gradients, totals, strict=True):
            for part in comparison.parts(states[rows]):
                total += part.kl.sum()
                if gradient is not None:
                    comparison.slope_(part)
            if gradient is not None:
                comparison.head.pull_back(comparison.student_scores, states[rows], gradient[rows])
    return list(zip(totals, gradients, strict=True))


def _by_kernels(
    teacher: Tensor, students: Sequence[Tensor], weights: Sequence[float | None], comparison: Comparison
) -> _Results:
    """The same in two kernels."""
    from sae_lora.splice.kl_kernels import kernel_kl  # Triton comes with torch for CUDA only

    return kernel_kl(teacher, students, weights, comparison.head, comparison.room(teacher))


def _difference(teacher: Tensor, comparison: Comparison) -> float:
    """The largest relative difference of the two, in KL and gradient, for a few tokens."""
    states = teacher[:PROOF_TOKENS]
    some = states, [0.9 * states], [1.0]  # a student that differs from the teacher
    ((by_kernels, kernel_gradient),) = _by_kernels(*some, comparison)
    ((kl, gradient),) = _by_operations(*some, comparison)
    assert kernel_gradient is not None and gradient is not None
    of_gradient = (kernel_gradient - gradient).norm() / gradient.norm()
    return max(float((by_kernels - kl).abs() / kl), float(of_gradient))


def kl_of(comparison: Comparison, how: KLComputation) -> KL:
    """The function for KL(teacher ‖ student), fused or with all logits at once."""
    if how is KLComputation.full:
        return partial(whole_kl, logits=comparison.head.logits)
    return partial(fused_kl, comparison=comparison)
