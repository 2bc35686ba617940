"""The head of a model: the frozen map from hidden states to logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sae_lora.models.attention.blockwise import LARGEST_EXPONENT
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.part_check import agree


@dataclass(frozen=True)
class Head:
    """The frozen map from hidden states to logits."""

    logits: Callable[[Tensor], Tensor]
    """The map from `[..., d_model]` to `[..., d_vocab]`."""
    d_vocab: int
    """Size of the vocabulary."""
    matrix: Tensor | None = None
    """Matrix `[d_vocab, d_model]`, if the head is this matrix and at most a soft-cap; else `None`."""
    softcap: float | None = None
    """With a matrix, logits are `softcap · tanh(product / softcap)`, as in Gemma 2. At most
    `LARGEST_EXPONENT`; `None`: no soft-cap."""

    @classmethod
    def of(cls, model: LanguageModel) -> "Head":
        """The head of a model, with its matrix if possible."""
        general = cls(model.logits, model.config.vocab_size)
        matrix = model.model.get_output_embeddings()
        softcap = getattr(model.config, "final_logit_softcapping", None)
        if not isinstance(matrix, nn.Linear) or matrix.bias is not None:
            return general
        if softcap is not None and softcap > LARGEST_EXPONENT:
            return general
        linear = cls.linear(matrix.weight, softcap)
        probe = torch.linspace(-3, 3, 2 * matrix.in_features).reshape(2, -1)
        # Large states show a soft-cap that the config calls by another name.
        probe = torch.cat([probe, 1000 * probe]).to(matrix.weight)
        with torch.no_grad():
            is_linear = agree(linear.logits(probe), general.logits(probe), 1e-4)
        return linear if is_linear else general

    @classmethod
    def linear(cls, matrix: Tensor, softcap: float | None = None) -> "Head":
        """A head that is one matrix `[d_vocab, d_model]`, as in most models, and perhaps a soft-cap."""

        def logits(hidden: Tensor) -> Tensor:
            product = hidden @ matrix.T
            return product if softcap is None else softcap * torch.tanh(product / softcap)

        return cls(logits, len(matrix), matrix, softcap)

    @property
    def unit(self) -> float:
        """The unit of scores, in nats: the soft-cap, or 1."""
        return self.softcap or 1.0

    def score(self, hidden: Tensor, scores: Tensor) -> None:
        """Write the logits before the soft-cap, in its units, into `scores` `[token, d_vocab]`."""
        if self.matrix is None:
            scores.copy_(self.logits(hidden))
        elif hidden.dtype == scores.dtype:
            torch.mm(hidden / self.unit, self.matrix.T, out=scores)
        else:  # divide in the dtype of `scores`, because the model's dtype would round again
            self.product(hidden, scores)
            scores.div_(self.unit)

    def product(self, hidden: Tensor, logits: Tensor) -> None:
        """Write the logits before the soft-cap, `[token, d_vocab]` in float32; needs a matrix.

        A GPU does not round them to the model's dtype; a CPU has no such product.
        """
        assert self.matrix is not None
        if hidden.dtype == logits.dtype:
            torch.mm(hidden, self.matrix.T, out=logits)
        elif hidden.device.type == "cuda":
            torch.mm(hidden, self.matrix.T, logits.dtype, out=logits)
        else:
            logits.copy_(hidden @ self.matrix.T)

    @torch.no_grad()
    def pull_back(self, slope: Tensor, hidden: Tensor, gradient: Tensor) -> None:
        """Write the gradient with respect to hidden states `[token, d_model]`.

        Args:
            slope: Gradient with respect to the logits before the soft-cap, `[token, d_vocab]`.
            hidden: The hidden states, `[token, d_model]`.
            gradient: Memory for the result, `[token, d_model]`.
        """
        if self.matrix is not None:
            torch.mm(slope.to(hidden.dtype), self.matrix, out=gradient)
            return
        with torch.enable_grad():
            states = hidden.detach().requires_grad_()
            logits = self.logits(states)
        gradient.copy_(torch.autograd.grad(logits, states, slope.to(logits.dtype))[0])
