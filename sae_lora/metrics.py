"""Evaluation: what the SAE costs, what the adapters give back, on the held-out tokens."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lora.kl import kl_to, log_probabilities
from sae_lora.models import LanguageModel
from sae_lora.splice import Reading
from sae_lora.student import Student, cuts
from sae_lora.trunk import Splices, Trunk


class Evaluation(NamedTuple):
    """What one pass over the held-out tokens found. Cross-entropies and KL in nats per token."""

    base_ce: float
    """Cross-entropy of the teacher: no SAE, adapters off."""
    spliced_ce: float
    """Cross-entropy with the SAE, adapters off."""
    student_ce: float
    """Cross-entropy with the SAE, adapters on."""
    kl: float
    """KL(teacher ‖ student)."""
    top1_agreement: float
    """Share of positions where teacher and student put the same token first."""
    fvu: dict[str, float]
    """Per hookpoint: residual variance / total variance, on what the student's SAE reads."""
    l0: dict[str, float]
    """Per hookpoint: mean number of active latents per token, likewise."""


class Reconstruction:
    """Sums over tokens from which FVU and L0 of one SAE follow, exact for any batching.

    Source: FVU = Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean over all tokens measured.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.active = 0.0
        self.squared_error = 0.0
        self.squared_norm = 0.0
        self.sum: Tensor | None = None

    def add(self, reading: Reading) -> None:
        """Takes in one batch of tokens."""
        resid, recon = reading.resid.double(), reading.recon.double()
        total = resid.sum(0)
        self.sum = total if self.sum is None else self.sum + total
        self.tokens += len(resid)
        self.active += float((reading.latents != 0).sum())
        self.squared_error += float((resid - recon).square().sum())
        self.squared_norm += float(resid.square().sum())

    @property
    def fvu(self) -> float:
        """Share of the variance that the reconstruction misses."""
        assert self.sum is not None
        variance = self.squared_norm - float(self.sum.square().sum()) / self.tokens
        return self.squared_error / variance if variance > 0 else 0.0

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return self.active / self.tokens


class Evaluator:
    """Evaluates students of one model on fixed tokens, as often as asked, in one pass for all.

    What does not change while adapters train is found once: base and spliced CE, the reconstruction of
    SAEs before the first adapted block and, where there is room, the hidden states that enter it.

    Args:
        model: The plain language model.
        tokens: Held-out tokens `[sequence, pos]`.
        special_ids: Ids `[n]` whose positions some SAEs leave as they are.
        batch_size: Sequences per forward pass.
        chunk_tokens: Tokens whose logits are held at once.
        cache_bytes: Room for hidden states that are kept from one evaluation to the next.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        special_ids: Tensor,
        batch_size: int,
        chunk_tokens: int,
        cache_bytes: float = 0,
    ) -> None:
        self._model = model
        self._batches = tokens.split(batch_size)
        self._positions = tokens.numel()
        self._predictions = tokens.numel() - len(tokens)
        self._special_ids = special_ids
        self._chunk_tokens = chunk_tokens
        self._cache_bytes = cache_bytes
        self._trunks: dict[int, Trunk] = {}
        """By number of the batch, where there is room."""
        self._base_ce: float | None = None
        self._spliced_ce: dict[Splices, float] = {}
        self._frozen: dict[Splices, Reconstruction] = {}
        self._new_frozen: dict[Splices, Reconstruction] = {}
        """Of the evaluation that is under way."""

    @torch.no_grad()
    def __call__(self, students: Sequence[Student]) -> list[Evaluation]:
        """Evaluates the adapters as they are now. Leaves the models' modes as they were."""
        wanted = cuts(students)
        trunks: dict[int, Trunk] = {}
        sums = [_StudentSums() for _ in students]
        self._new_frozen = defaultdict(Reconstruction)
        new_spliced = {one.splices: 0.0 for one in students if one.splices not in self._spliced_ce}
        base_ce = 0.0

        with ExitStack() as modes:
            for student in students:
                modes.enter_context(evaluating(student.model))
            for number, batch in enumerate(self._batches):
                trunk = self._trunks.get(number)
                if trunk is None or not trunk.cuts >= wanted:
                    tokens = batch.to(self._model.device)
                    trunk = Trunk(self._model, tokens, self._special_ids, wanted, self._observe)
                teacher_hidden = trunk.hidden()
                hidden = [
                    student.hidden(trunk, own.observe)
                    for student, own in zip(students, sums, strict=True)
                ]
                for splices in new_spliced:
                    for states, labels in self._chunks(trunk.tokens, trunk.hidden(splices)):
                        new_spliced[splices] += cross_entropy_sum(self._model.logits(states), labels)
                for teacher, *states, labels in self._chunks(trunk.tokens, teacher_hidden, *hidden):
                    teacher_logits = self._model.logits(teacher)
                    log_p, top = log_probabilities(teacher_logits), teacher_logits.argmax(-1)
                    if self._base_ce is None:
                        base_ce += cross_entropy_sum(teacher_logits, labels)
                    for state, own in zip(states, sums, strict=True):
                        own.add(self._model.logits(state), log_p, top, labels)
                trunk.forget_all_but((one.frozen, one.first_adapted) for one in students)
                if trunk.bytes_held * len(self._batches) <= self._cache_bytes:
                    trunks[number] = trunk
        self._trunks = trunks
        if self._base_ce is None:
            self._base_ce = base_ce / self._predictions
        self._spliced_ce |= {row: total / self._predictions for row, total in new_spliced.items()}
        self._frozen |= self._new_frozen
        return [
            self._evaluation(student, own, self._base_ce)
            for student, own in zip(students, sums, strict=True)
        ]

    def _observe(self, splices: Splices, reading: Reading) -> None:
        """Takes in what an SAE has done whose work no adapter changes, the first time."""
        if splices not in self._frozen:
            self._new_frozen[splices].add(reading)

    def _evaluation(self, student: Student, own: "_StudentSums", base_ce: float) -> Evaluation:
        saes = {
            splice.hookpoint: self._frozen[student.splices[: place + 1]]
            if splice in student.frozen
            else own.live[splice.hookpoint]
            for place, splice in enumerate(student.splices)
        }
        return Evaluation(
            base_ce=base_ce,
            spliced_ce=self._spliced_ce[student.splices],
            student_ce=own.ce / self._predictions,
            kl=own.kl / self._positions,
            top1_agreement=own.agreements / self._positions,
            fvu={hookpoint: one.fvu for hookpoint, one in saes.items()},
            l0={hookpoint: one.l0 for hookpoint, one in saes.items()},
        )

    def _chunks(self, tokens: Tensor, *hidden: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Hidden states `[token, d_model]` and, last, labels `[token]`, a few tokens at a time."""
        labels = next_tokens(tokens).flatten()
        columns = [*(states.flatten(0, 1) for states in hidden), labels]
        yield from zip(*(column.split(self._chunk_tokens) for column in columns), strict=True)


class _StudentSums:
    """What is summed up over tokens for one student."""

    def __init__(self) -> None:
        self.ce = self.kl = 0.0
        self.agreements = 0
        self.live: dict[str, Reconstruction] = defaultdict(Reconstruction)
        """Of the SAEs that read what its adapters have changed, by hookpoint."""

    def observe(self, reading: Reading) -> None:
        self.live[reading.hookpoint].add(reading)

    def add(self, logits: Tensor, teacher: Tensor, top: Tensor, labels: Tensor) -> None:
        """Takes in a few tokens.

        Args:
            logits: The student's, `[token, d_vocab]`.
            teacher: The teacher's log-probabilities, `[token, d_vocab]`.
            top: The token that the teacher puts first, `[token]`.
            labels: `[token]`.
        """
        self.ce += cross_entropy_sum(logits, labels)
        self.kl += float(kl_to(teacher, logits).double().sum())
        self.agreements += int((top == logits.argmax(-1)).sum())


NO_LABEL = -100
"""Label of a sequence's last position, whose next token is not known."""


def next_tokens(tokens: Tensor) -> Tensor:
    """The label of each position, `[batch, pos]`: the next token, `NO_LABEL` at the end."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], NO_LABEL)], dim=1)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> float:
    """Next-token cross-entropy in nats, summed over labelled tokens.

    Args:
        logits: `[token, d_vocab]`, of any dtype; computed in float32.
        labels: `[token]`; `NO_LABEL` is left out.
    """
    losses = torch.nn.functional.cross_entropy(
        logits.float(), labels, ignore_index=NO_LABEL, reduction="none"
    )
    return float(losses.double().sum())


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """The model with dropout off; afterwards every module's mode is what it was."""
    was_training = [module for module in model.model.modules() if module.training]
    model.model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
