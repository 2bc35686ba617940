"""The model's head, a few tokens at a time: logits of a teacher and of students beside it.

Logits are the largest tensors of all. They exist for few tokens at once, in memory that is used again,
and each pass over them takes no more tokens than a cache holds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_lora.models.blockwise_attention import LARGEST_EXPONENT
from sae_lora.models.language_model import LanguageModel


@dataclass(frozen=True)
class Head:
    """The frozen map from hidden states to logits.

    Args:
        logits: The map from `[..., d_model]` to `[..., d_vocab]`.
        d_vocab: Size of the vocabulary.
        matrix: `[d_vocab, d_model]`, where that is the whole map except for the soft-cap.
        softcap: With a matrix, logits are `softcap · tanh(logits / softcap)`, as in Gemma 2; `None` for
            none. At most `LARGEST_EXPONENT`.
    """

    logits: Callable[[Tensor], Tensor]
    d_vocab: int
    matrix: Tensor | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, model: LanguageModel) -> "Head":
        """The head of a model, as a matrix where it is one."""
        whole = cls(model.logits, model.config.vocab_size)
        matrix = model.model.get_output_embeddings()
        softcap = getattr(model.config, "final_logit_softcapping", None)
        if not isinstance(matrix, nn.Linear) or matrix.bias is not None:
            return whole
        if softcap is not None and softcap > LARGEST_EXPONENT:
            return whole
        linear = cls.linear(matrix.weight, softcap)
        probe = torch.linspace(-3, 3, 2 * matrix.in_features).reshape(2, -1).to(matrix.weight)
        with torch.no_grad():
            found, expected = linear.logits(probe).float(), whole.logits(probe).float()
        return linear if torch.allclose(found, expected, rtol=1e-2, atol=1e-2) else whole

    @classmethod
    def linear(cls, matrix: Tensor, softcap: float | None = None) -> "Head":
        """One matrix `[d_vocab, d_model]`, as most models' are."""

        def logits(hidden: Tensor) -> Tensor:
            found = hidden @ matrix.T
            return found if softcap is None else softcap * torch.tanh(found / softcap)

        return cls(logits, len(matrix), matrix, softcap)

    @property
    def unit(self) -> float:
        """The unit of scores, in nats."""
        return self.softcap or 1.0

    def score(self, hidden: Tensor, scores: Tensor) -> None:
        """Writes the logits before their soft-cap, in units of it, `[token, d_vocab]`."""
        if self.matrix is None:
            scores.copy_(self.logits(hidden))
        elif hidden.dtype == scores.dtype:
            torch.mm(hidden / self.unit, self.matrix.T, out=scores)
        else:  # the model's own dtype would round once more
            scores.copy_(hidden @ self.matrix.T).div_(self.unit)

    @torch.no_grad()
    def pull_back(self, slope: Tensor, hidden: Tensor, gradient: Tensor) -> None:
        """Writes the gradient for hidden states `[token, d_model]`.

        Args:
            slope: The gradient for the logits before their soft-cap, `[token, d_vocab]`.
            hidden: The hidden states.
            gradient: Memory for the result.
        """
        if self.matrix is not None:
            torch.mm(slope.to(hidden.dtype), self.matrix, out=gradient)
            return
        with torch.enable_grad():
            states = hidden.detach().requires_grad_()
            logits = self.logits(states)
        gradient.copy_(torch.autograd.grad(logits, states, slope.to(logits.dtype))[0])


class LogitChunk(NamedTuple):
    """A few tokens of a student, beside its teacher; valid until the next ones are computed.

    Args:
        rows: The tokens' rows in the chunk.
        scores: The student's logits in the head's unit, `[token, d_vocab]`.
        numerators: Numerators of its softmax, `[token, d_vocab]`.
        sums: Sums of the numerators, `[token, 1]`.
        log_sums: ln Σ e^logit, `[token, 1]` in float64.
        kl: KL(teacher ‖ student) of each token in nats, `[token, 1]` in float64.
    """

    rows: slice
    scores: Tensor
    numerators: Tensor
    sums: Tensor
    log_sums: Tensor
    kl: Tensor

    def puts_first(self, tokens: Tensor) -> Tensor:
        """Whether no token is more likely than the given `[token]`. Faster than an argmax."""
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
            self._scores, self._minus_p, self.own = (room[: len(hidden)] for room in self._room)
            few = len(self._spare[0])
            self._parts = [slice(first, first + few) for first in range(0, len(hidden), few)]
            self.head.score(hidden, self._scores)
            self._log_sums = []
            for part in self._parts:
                sums, log_sums = self._softmax(self._scores[part], self._minus_p[part])
                self._minus_p[part].div_(sums.neg_())
                self._log_sums.append(log_sums)
            yield rows

    def students(self, hidden: Tensor) -> Iterator[LogitChunk]:
        """Parts of this chunk of a student, `[token, d_model]`."""
        self.head.score(hidden, self.own)
        for part, log_sums in zip(self._parts, self._log_sums, strict=True):
            scores = self.own[part]
            numerators, apart = (spare[: len(scores)] for spare in self._spare)
            sums, own_log_sums = self._softmax(scores, numerators)
            # Differences first: where the two agree, each term is small.
            torch.sub(scores, self._scores[part], out=apart).mul_(self._minus_p[part])
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
        return self._scores, torch.cat(self._log_sums)

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
"""As many as a CPU's cache holds; a GPU is faster with many."""
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
