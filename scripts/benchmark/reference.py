"""The training loop of the published code, only for comparison."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_lora.config.enums import Reduction
from sae_lora.config.schema import LoRAConfig, TrainConfig
from sae_lora.models import lora
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice import compiled
from sae_lora.splice.compiled import CompiledBlocks
from sae_lora.splice.hooks import spliced
from sae_lora.splice.kl import kl_divergence
from sae_lora.splice.trunk import Splices
from sae_lora.train.evaluator import NO_LABEL, next_tokens


class Reference:
    """One run, trained as in the published code.

    It has two complete forward passes, eager attention, softmaxes of all tokens over the whole
    vocabulary, and peft's default adapters. Adapters and dropout use torch's global random state. No
    position keeps its activation.

    Args:
        model: The plain model. It is not changed.
        splices: The SAEs.
        adapters: Config of the adapters.
        config: The optimisation, with a constant rate.
        dropout: Class of the adapters' dropout: torch's, as in peft, or ours for equal masks.

    Source: arXiv 2501.19406 and the code published with it.
    """

    def __init__(
        self,
        model: LanguageModel,
        splices: Splices,
        adapters: LoRAConfig,
        config: TrainConfig,
        dropout: Callable[[float], nn.Module] = nn.Dropout,
    ) -> None:
        self._model = model.view()
        self._model.model.set_attn_implementation("eager")
        self._splices = splices
        self._adapters = lora.attach(self._model, adapters, splices[0].block)
        lora.replace_dropout(self._model, dropout)
        lora.set_adapter_dropout(self._model, True)
        self._config = config
        self.weights = lora.trainable_weights(self._model)
        """The adapters' weights by name."""
        self._kl: Callable[[Tensor, Tensor], Tensor] = kl_divergence
        self._running: Callable[[], AbstractContextManager[None]] = nullcontext
        self._optimizer = torch.optim.AdamW(
            self.weights.values(), lr=config.lr, weight_decay=config.weight_decay
        )

    def compile(self) -> None:
        """Compile the blocks and the KL in the first step."""
        self._running = CompiledBlocks(self._model).in_use
        self._kl = torch.compile(self._kl, backend=compiled.BACKEND)

    def step(self, tokens: Tensor) -> float | Tensor:
        """Make one step on tokens `[batch, pos]`; return the KL in nats, summed over tokens."""
        with self._running():
            return self._step(tokens)

    def _step(self, tokens: Tensor) -> float | Tensor:
        with torch.no_grad(), self._adapters.disable_adapter():
            teacher = self._logits(tokens)
        with spliced(self._model, self._splices, tokens):
            student = self._logits(tokens)
        kl = self._kl(teacher, student).sum()
        per_token = self._config.kl_reduction is Reduction.token_mean
        (kl / (tokens.numel() if per_token else len(tokens))).backward()
        if self._config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.weights.values(), self._config.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(kl.detach())

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of the student without dropout, `[batch, pos, d_vocab]`."""
        lora.set_adapter_dropout(self._model, False)
        with spliced(self._model, self._splices, tokens):
            logits = self._logits(tokens)
        lora.set_adapter_dropout(self._model, True)
        return logits

    @torch.no_grad()
    def untrained_logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the plain model, and of the plain model with the SAEs, `[batch, pos, d_vocab]`."""
        with self._adapters.disable_adapter():
            base = self._logits(tokens)
            with spliced(self._model, self._splices, tokens):
                return base, self._logits(tokens)

    def _logits(self, tokens: Tensor) -> Tensor:
        return self._model.model(input_ids=tokens, use_cache=False).logits


class Measured(NamedTuple):
    """Results of one run's evaluation, in nats per token."""

    base_ce: float
    spliced_ce: float
    student_ce: float
    kl: float


@torch.no_grad()
def evaluate(runs: Sequence[Reference], tokens: Tensor) -> list[Measured]:
    """Evaluate runs with the same SAEs, with complete passes for base, spliced and each student.

    Args:
        runs: The runs.
        tokens: Held-out tokens `[sequence, pos]`. Each pass reads one sequence.
    """
    predictions = tokens.numel() - len(tokens)
    base_ce = spliced_ce = 0.0
    ce, kl = [0.0] * len(runs), [0.0] * len(runs)
    for sequence in tokens.split(1):
        labels = next_tokens(sequence).flatten()
        base, plain = runs[0].untrained_logits(sequence)
        base_ce += _cross_entropy_sum(base.flatten(0, 1), labels)
        spliced_ce += _cross_entropy_sum(plain.flatten(0, 1), labels)
        for number, run in enumerate(runs):
            student = run.logits(sequence)
            ce[number] += _cross_entropy_sum(student.flatten(0, 1), labels)
            kl[number] += float(kl_divergence(base, student).sum())
    return [
        Measured(
            base_ce=base_ce / predictions,
            spliced_ce=spliced_ce / predictions,
            student_ce=ce_sum / predictions,
            kl=kl_sum / tokens.numel(),
        )
        for ce_sum, kl_sum in zip(ce, kl, strict=True)
    ]


def _cross_entropy_sum(logits: Tensor, labels: Tensor) -> float:
    """Next-token cross-entropy in nats, summed over labelled tokens.

    Args:
        logits: `[token, d_vocab]`, of any dtype. The loss is computed in float32.
        labels: `[token]`; `NO_LABEL` is left out.
    """
    losses = torch.nn.functional.cross_entropy(
        logits.float(), labels, ignore_index=NO_LABEL, reduction="none"
    )
    return float(losses.double().sum())
