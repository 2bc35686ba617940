"""KL between two models' next-token distributions: by its definition, and fused with its gradient.

Logits are the largest tensors of all. Fused, they exist for few tokens at once, in memory that is used
again, and each pass over them takes no more tokens than a cache holds.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lora.config.enums import KLComputation
from sae_lora.splice.head import Head


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
    """A student's KL to its teacher, and its gradient."""

    total: Tensor
    """KL(teacher ‖ student) summed over all tokens, in nats; a scalar, float32 or float64."""
    gradient: Tensor | None
    """Gradient of the total times the student's weight, in the shape of its hidden states; `None` where
    the weight is."""


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


class LogitChunk(NamedTuple):
    """A few tokens of a student, beside its teacher; valid until the next ones are computed."""

    rows: slice
    """The tokens' rows in the chunk."""
    scores: Tensor
    """The student's logits in the head's unit, `[token, d_vocab]`."""
    numerators: Tensor
    """Numerators of its softmax, `[token, d_vocab]`."""
    sums: Tensor
    """Sums of the numerators, `[token, 1]`."""
    log_sums: Tensor
    """ln Σ e^logit, `[token, 1]` in float64."""
    kl: Tensor
    """KL(teacher ‖ student) of each token in nats, `[token, 1]` in float64."""

    def puts_first(self, tokens: Tensor) -> Tensor:
        """True where no token is more likely than the given `[token]`. Faster than an argmax."""
        return self.scores.gather(-1, tokens[:, None])[:, 0] == self.scores.amax(-1)


class Comparison:
    """A teacher's logits and, in turn, those of its students, a chunk of tokens at a time.

    Args:
        head: The head of all.
        chunk_tokens: Tokens whose logits are held at once; `None` for a number that suits the device.
    """

    def __init__(self, head: Head, chunk_tokens: int | None = None) -> None:
        self.head = head
        self._chunk_tokens = chunk_tokens
        self._room: list[Tensor] = []
        self._spare: list[Tensor] = []
        self._log_sums: list[Tensor] = []

    def chunks(self, teacher_hidden: Tensor) -> Iterator[slice]:
        """Chunks of the tokens `[token, d_model]`; the other methods are about the current chunk."""
        chunk = _chunk_tokens(self._chunk_tokens, self.head.d_vocab, teacher_hidden.device.type)
        self._make_room(min(len(teacher_hidden), chunk), teacher_hidden.device)
        for start in range(0, len(teacher_hidden), chunk):
            rows = slice(start, start + chunk)
            hidden = teacher_hidden[rows]
            self._teacher_scores, self._minus_p, self.student_scores = (
                room[: len(hidden)] for room in self._room
            )
            few = len(self._spare[0])
            self._parts = [slice(first, first + few) for first in range(0, len(hidden), few)]
            self.head.score(hidden, self._teacher_scores)
            self._log_sums = []
            for part in self._parts:
                sums, log_sums = self._softmax(self._teacher_scores[part], self._minus_p[part])
                self._minus_p[part].div_(sums.neg_())
                self._log_sums.append(log_sums)
            yield rows

    def students(self, hidden: Tensor) -> Iterator[LogitChunk]:
        """Parts of this chunk of a student, `[token, d_model]`."""
        self.head.score(hidden, self.student_scores)
        for part, log_sums in zip(self._parts, self._log_sums, strict=True):
            scores = self.student_scores[part]
            numerators, apart = (spare[: len(scores)] for spare in self._spare)
            sums, own_log_sums = self._softmax(scores, numerators)
            # Differences first: where the two agree, each term is small.
            torch.sub(scores, self._teacher_scores[part], out=apart).mul_(self._minus_p[part])
            kl = apart.sum(-1, keepdim=True).double() * self.head.unit + own_log_sums - log_sums
            yield LogitChunk(part, scores, numerators, sums, own_log_sums, kl)

    def slope_(self, few: LogitChunk) -> None:
        """Turn the student's scores into d KL / d z, z being its logits before the soft-cap.

        With p the teacher's probabilities, q the student's, c the soft-cap, it is
        (q − p) · (1 − tanh²(z / c)), the last factor 1 without a soft-cap.
        """
        minus_p, scores, share = self._minus_p[few.rows], few.scores, few.sums.reciprocal()
        if self.head.softcap is None:
            torch.addcmul(minus_p, few.numerators, share, out=scores)
        else:
            slope = torch.addcmul(minus_p, few.numerators, share, out=few.numerators)
            times = torch.mul(slope, scores, out=self._spare[1][: len(scores)])
            torch.addcmul(slope, times, scores, value=-1, out=scores)

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        """The teacher's scores `[token, d_vocab]` and its ln Σ e^logit `[token, 1]` in float64."""
        return self._teacher_scores, torch.cat(self._log_sums)

    def _softmax(self, scores: Tensor, numerators: Tensor) -> tuple[Tensor, Tensor]:
        """Soft-cap the scores, and write the numerators; returns their sums, and ln Σ e^logit."""
        if self.head.softcap is not None:  # its exponential is finite: there is no need of peaks
            torch.mul(scores.tanh_(), self.head.softcap, out=numerators)
            sums = numerators.exp_().sum(-1, keepdim=True)
            return sums, sums.double().log()
        peaks = scores.amax(-1, keepdim=True)
        sums = torch.sub(scores, peaks, out=numerators).exp_().sum(-1, keepdim=True)
        return sums, sums.double().log() + peaks

    def _make_room(self, tokens: int, device: torch.device) -> None:
        """Memory for the logits of a chunk, three times, and for those of a few of its tokens, twice."""
        if self._room and len(self._room[0]) >= tokens and self._room[0].device == device:
            return
        few = min(tokens, _at_work(self.head.d_vocab, device.type))
        self._room = [torch.empty(tokens, self.head.d_vocab, device=device) for _ in range(3)]
        self._spare = [torch.empty(few, self.head.d_vocab, device=device) for _ in range(2)]


_LOGITS_HELD = {"cpu": 2**22, "cuda": 2**28}
_LOGITS_AT_WORK = {"cpu": 2**18, "cuda": 2**28}
"""Logits at work at a time: as many as a CPU's cache holds; a GPU is faster with many."""
_FEWEST_TOKENS = 88
"""With fewer at a time, reading the head's matrix takes longer than the product."""


def room_bytes(tokens: int, chunk_tokens: int | None, d_vocab: int, device: str) -> int:
    """Memory of a `Comparison` for so many tokens, on this kind of device."""
    chunk = min(tokens, _chunk_tokens(chunk_tokens, d_vocab, device))
    return 4 * d_vocab * (3 * chunk + 2 * min(chunk, _at_work(d_vocab, device)))


def _chunk_tokens(wanted: int | None, d_vocab: int, device: str) -> int:
    return wanted or max(_FEWEST_TOKENS, _LOGITS_HELD.get(device, 2**22) // d_vocab)


def _at_work(d_vocab: int, device: str) -> int:
    return max(1, _LOGITS_AT_WORK.get(device, 2**18) // d_vocab)


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
                comparison.head.pull_back(comparison.student_scores, states[rows], gradient[rows])
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
