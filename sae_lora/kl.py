"""KL between two models' next-token distributions, also where whole logits would not fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sae_lora.attention import LARGEST_EXPONENT
from sae_lora.config import KLComputation
from sae_lora.models import LanguageModel

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


class KL(Protocol):
    """KL(teacher ‖ student) of several students of one teacher, and its gradients."""

    def __call__(
        self, teacher_hidden: Tensor, students: Sequence[Tensor], weights: Sequence[float], /
    ) -> "list[SummedKL]":
        """Finds them.

        Args:
            teacher_hidden: What the head reads of the teacher, `[..., d_model]`; gets no gradient.
            students: The same of each student.
            weights: What the gradient of each is multiplied by: 1 / tokens for that of the mean.
        """
        ...


class SummedKL(NamedTuple):
    """A student's KL to its teacher, and where it leads.

    Args:
        total: KL(teacher ‖ student) summed over all tokens, in nats; a scalar, float32 or float64.
        gradient: Of the total times the student's weight, in the shape of its hidden states.
    """

    total: Tensor
    gradient: Tensor


def whole_kl(
    teacher_hidden: Tensor, students: Sequence[Tensor], weights: Sequence[float], head: Head
) -> list[SummedKL]:
    """KL(teacher ‖ student) with the logits of all tokens at once, through torch's own gradient.

    What `FusedKL` is checked against. The head gets no gradient: it is frozen. The other arguments
    are those of `KL`.
    """
    with torch.no_grad():
        log_p = log_probabilities(head(teacher_hidden))
    found = []
    for student, weight in zip(students, weights, strict=True):
        with torch.enable_grad():
            hidden = student.detach().requires_grad_()
            total = kl_to(log_p, head(hidden)).sum()
        (gradient,) = torch.autograd.grad(total, hidden, torch.full_like(total, weight))
        found.append(SummedKL(total.detach(), gradient))
    return found


def chunked_kl(
    teacher_hidden: Tensor,
    students: Sequence[Tensor],
    weights: Sequence[float],
    head: Head,
    chunk_tokens: int,
) -> list[SummedKL]:
    """`whole_kl`, a few tokens at a time: what any head allows."""
    columns = [states.flatten(0, -2).split(chunk_tokens) for states in (teacher_hidden, *students)]
    parts = [whole_kl(teacher, some, weights, head) for teacher, *some in zip(*columns, strict=True)]
    return [
        SummedKL(
            torch.stack([part.total for part in of_one]).sum(),
            torch.cat([part.gradient for part in of_one]).reshape(teacher_hidden.shape),
        )
        for of_one in zip(*parts, strict=True)
    ]


@dataclass(frozen=True)
class LinearHead:
    """A head that is one matrix, as most models' are.

    Args:
        weight: `[d_vocab, d_model]`.
        softcap: Logits are `softcap · tanh(logits / softcap)`, as Gemma-2's are; `None` for none. At
            most `LARGEST_EXPONENT`.
    """

    weight: Tensor
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[..., d_vocab]` of hidden states `[..., d_model]`."""
        logits = hidden @ self.weight.T
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class FusedKL:
    """KL(teacher ‖ student) a few tokens at a time, in memory that is used again for the next.

    The gradient is made along with the value, so that no logits outlive their chunk; the teacher's
    serve all students. Softmaxes are in float32, sums over tokens in float64.

    With p the teacher's probabilities, q the student's, z its logits before the soft-cap c:
    d KL / d z = (q − p) · (1 − tanh²(z / c)), the last factor 1 without a soft-cap.

    Args:
        head: The model's head.
        chunk_tokens: Tokens whose logits are held at once.
    """

    def __init__(self, head: LinearHead, chunk_tokens: int) -> None:
        self._head = head
        self._chunk_tokens = chunk_tokens
        self._chunks: list[Tensor] = []
        self._spare: list[Tensor] = []

    @torch.no_grad()
    def __call__(
        self, teacher_hidden: Tensor, students: Sequence[Tensor], weights: Sequence[float]
    ) -> list[SummedKL]:
        """The KL of each student, as `KL` says."""
        teacher = teacher_hidden.flatten(0, -2)
        hidden = [student.detach().flatten(0, -2) for student in students]
        gradients = [torch.empty_like(states) for states in hidden]
        totals = [torch.zeros((), dtype=torch.float64, device=teacher.device) for _ in hidden]
        self._make_room(teacher)
        for start in range(0, len(teacher), self._chunk_tokens):
            rows = slice(start, start + self._chunk_tokens)
            scores, minus_p, own = (chunk[: len(teacher[rows])] for chunk in self._chunks)
            few = len(self._spare[0])
            parts = [slice(first, first + few) for first in range(0, len(scores), few)]
            self._score(teacher[rows], scores)
            log_sums = [self._probabilities(scores[part], minus_p[part]) for part in parts]
            for states, gradient, total in zip(hidden, gradients, totals, strict=True):
                self._score(states[rows], own)
                for part, log_sum in zip(parts, log_sums, strict=True):
                    total += self._compare(scores[part], minus_p[part], log_sum, own[part])
                torch.mm(own.to(states.dtype), self._head.weight, out=gradient[rows])
        return [
            SummedKL(total, gradient.mul_(weight).reshape(teacher_hidden.shape))
            for total, gradient, weight in zip(totals, gradients, weights, strict=True)
        ]

    def _make_room(self, hidden: Tensor) -> None:
        """For the logits of a chunk, three times, and for those of a few of its tokens, twice."""
        tokens = min(len(hidden), self._chunk_tokens)
        if self._chunks and len(self._chunks[0]) >= tokens and self._chunks[0].device == hidden.device:
            return
        d_vocab = len(self._head.weight)
        few = min(tokens, _at_work(d_vocab, hidden.device.type))
        self._chunks = [torch.empty(tokens, d_vocab, device=hidden.device) for _ in range(3)]
        self._spare = [torch.empty(few, d_vocab, device=hidden.device) for _ in range(2)]

    def _score(self, hidden: Tensor, scores: Tensor) -> None:
        """Writes the logits; where they will be soft-capped, in units of the cap."""
        unit = self._head.softcap or 1.0
        if hidden.dtype == scores.dtype:
            torch.mm(hidden / unit, self._head.weight.T, out=scores)
        else:  # the model's own dtype would round once more
            scores.copy_(hidden @ self._head.weight.T).div_(unit)

    # What follows goes over every logit: few passes, each over no more than the cache holds.

    def _exponentials(self, scores: Tensor, exps: Tensor) -> tuple[Tensor, Tensor]:
        """Soft-caps the scores, and writes numerators of the softmax.

        Returns:
            The sums of what is written, and ln Σ e^logit in float64, both `[token, 1]`.
        """
        if self._head.softcap is not None:  # whose exponential is a number: nothing to take off
            torch.mul(scores.tanh_(), self._head.softcap, out=exps)
            sums = exps.exp_().sum(-1, keepdim=True)
            return sums, sums.double().log()
        peaks = scores.amax(-1, keepdim=True)
        sums = torch.sub(scores, peaks, out=exps).exp_().sum(-1, keepdim=True)
        return sums, sums.double().log() + peaks

    def _probabilities(self, scores: Tensor, minus_p: Tensor) -> Tensor:
        """Soft-caps the teacher's scores, writes −p, and returns ln Σ e^logit."""
        sums, log_sums = self._exponentials(scores, minus_p)
        minus_p.div_(sums.neg_())
        return log_sums

    def _compare(self, scores: Tensor, minus_p: Tensor, log_sums: Tensor, own: Tensor) -> Tensor:
        """Turns a student's scores into d KL / d z.

        Args:
            scores: The teacher's, soft-capped, `[token, d_vocab]`.
            minus_p: The teacher's probabilities, negative.
            log_sums: The teacher's ln Σ e^logit, `[token, 1]`.
            own: The student's scores.

        Returns:
            The KL, summed over the tokens.
        """
        softcap = self._head.softcap
        slope, apart = (spare[: len(own)] for spare in self._spare)
        sums, own_log_sums = self._exponentials(own, slope)
        # Differences first: where the two agree, each term is small.
        terms = torch.sub(own, scores, out=apart).mul_(minus_p).sum(-1, keepdim=True)
        if softcap is None:
            torch.addcmul(minus_p, slope, sums.reciprocal(), out=own)
        else:
            torch.addcmul(minus_p, slope, sums.reciprocal(), out=slope)
            torch.addcmul(slope, torch.mul(slope, own, out=apart), own, value=-1, out=own)
        return (terms.double() * (softcap or 1.0) + own_log_sums - log_sums).sum()


_LOGITS_HELD = {"cpu": 2**22, "cuda": 2**28}
_LOGITS_AT_WORK = {"cpu": 2**18, "cuda": 2**28}
"""What a CPU's cache holds; a GPU is better off with many."""
_FEWEST_TOKENS = 96
"""Fewer at a time, and reading the head's matrix takes longer than the product."""


def _at_work(d_vocab: int, device: str) -> int:
    return max(1, _LOGITS_AT_WORK.get(device, 2**18) // d_vocab)


def fused_bytes(tokens: int, chunk_tokens: int, d_vocab: int, device: str) -> int:
    """What `FusedKL` keeps for steps of so many tokens."""
    chunk = min(tokens, chunk_tokens)
    return 4 * d_vocab * (3 * chunk + 2 * min(chunk, _at_work(d_vocab, device)))


def chunk_tokens(wanted: int | None, d_vocab: int, device: str) -> int:
    """Tokens whose logits are held at once: as many as wanted, or as suit the kind of device."""
    return wanted or max(_FEWEST_TOKENS, _LOGITS_HELD.get(device, 2**22) // d_vocab)


def kl_of(model: LanguageModel, how: KLComputation, chunk_tokens: int) -> KL:
    """The KL between students of this model and itself.

    Args:
        model: The plain model.
        how: Fused, or with whole logits.
        chunk_tokens: Tokens whose logits are held at once, where it is fused.
    """
    match how:
        case KLComputation.full:
            return partial(whole_kl, head=model.logits)
        case KLComputation.fused:
            head = linear_head(model)
            if head is None:
                return partial(chunked_kl, head=model.logits, chunk_tokens=chunk_tokens)
            return FusedKL(head, chunk_tokens)
        case _:
            raise NotImplementedError(how)


def linear_head(model: LanguageModel) -> LinearHead | None:
    """The model's head as one matrix; `None` where it is more than that."""
    matrix = model.model.get_output_embeddings()
    if not isinstance(matrix, nn.Linear) or matrix.bias is not None:
        return None
    softcap = getattr(model.config, "final_logit_softcapping", None)
    if softcap is not None and softcap > LARGEST_EXPONENT:
        return None
    head = LinearHead(matrix.weight, softcap)
    probe = torch.linspace(-3, 3, 2 * matrix.in_features).reshape(2, -1).to(matrix.weight)
    with torch.no_grad():
        found, expected = head(probe).float(), model.logits(probe).float()
    return head if torch.allclose(found, expected, rtol=1e-2, atol=1e-2) else None
