"""Evaluation: what the SAE costs, what the adapters give back, on the held-out tokens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lora.kl import kl_divergence
from sae_lora.lora import adapters_disabled
from sae_lora.models import LanguageModel
from sae_lora.splice import Coder, Reading, special_positions, spliced


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
    """Evaluates one model with SAEs on fixed tokens, as often as asked.

    Args:
        model: The language model, with its adapters in place.
        saes: SAE by hookpoint.
        tokens: Held-out tokens `[sequence, pos]`.
        special_ids: Ids `[n]` whose positions keep their activation; `None` for none.
        batch_size: Sequences per forward pass.
        chunk_tokens: Tokens whose logits are held at once.
    """

    def __init__(
        self,
        model: LanguageModel,
        saes: Mapping[str, Coder],
        tokens: Tensor,
        special_ids: Tensor | None,
        batch_size: int,
        chunk_tokens: int,
    ) -> None:
        self.model = model
        self.saes = saes
        self.tokens = tokens
        self.special_ids = special_ids
        self.batch_size = batch_size
        self.chunk_tokens = chunk_tokens
        self._spliced_ce: float | None = None

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        """Evaluates the adapters as they are now. Leaves the model's modes as they were."""
        reconstructions = {hookpoint: Reconstruction() for hookpoint in self.saes}

        def observe(reading: Reading) -> None:
            reconstructions[reading.hookpoint].add(reading)

        base_ce = spliced_ce = student_ce = kl = 0.0
        agreements = predictions = positions = 0
        with evaluating(self.model):
            for batch in self.tokens.split(self.batch_size):
                tokens = batch.to(self.model.device)
                keep = kept_positions(tokens, self.special_ids)
                with adapters_disabled(self.model.model):
                    teacher_hidden = self.model.hidden(tokens)
                    if self._spliced_ce is None:
                        # Does not change while adapters train: once is enough.
                        with spliced(self.model, self.saes, keep):
                            spliced_hidden = self.model.hidden(tokens)
                        for hidden, labels in self._chunks(tokens, spliced_hidden):
                            spliced_ce += cross_entropy_sum(self.model.logits(hidden), labels)
                with spliced(self.model, self.saes, keep, observe):
                    student_hidden = self.model.hidden(tokens)
                for teacher, student, labels in self._chunks(tokens, teacher_hidden, student_hidden):
                    teacher_logits, logits = self.model.logits(teacher), self.model.logits(student)
                    base_ce += cross_entropy_sum(teacher_logits, labels)
                    student_ce += cross_entropy_sum(logits, labels)
                    kl += float(kl_divergence(teacher_logits, logits).double().sum())
                    agreements += int((teacher_logits.argmax(-1) == logits.argmax(-1)).sum())
                    predictions += int((labels != NO_LABEL).sum())
                    positions += len(labels)
        if self._spliced_ce is None:
            self._spliced_ce = spliced_ce / predictions
        return Evaluation(
            base_ce=base_ce / predictions,
            spliced_ce=self._spliced_ce,
            student_ce=student_ce / predictions,
            kl=kl / positions,
            top1_agreement=agreements / positions,
            fvu={hookpoint: sums.fvu for hookpoint, sums in reconstructions.items()},
            l0={hookpoint: sums.l0 for hookpoint, sums in reconstructions.items()},
        )

    def _chunks(self, tokens: Tensor, *hidden: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Hidden states `[token, d_model]` and, last, labels `[token]`, a few tokens at a time."""
        labels = next_tokens(tokens).flatten()
        columns = [*(states.flatten(0, 1) for states in hidden), labels]
        yield from zip(*(column.split(self.chunk_tokens) for column in columns), strict=True)


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


def kept_positions(tokens: Tensor, special_ids: Tensor | None) -> Tensor | None:
    """Positions `[batch, pos]` that keep their activation, or `None` where all are replaced."""
    return None if special_ids is None else special_positions(tokens, special_ids)


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
