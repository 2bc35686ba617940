"""Activations for SAEs in training: streamed, shuffled, the same again for a run that resumes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel, observed
from sae_lora.splice.hooks import special_positions

_Group = tuple[str, ...]
"""Hookpoints of which each token takes one."""


class ActivationBuffer:
    """Activations of a few batches of tokens, shuffled among each other, and no older ones.

    A fill holds the activations of `batches_per_fill` batches. It is served in as many parts of the same
    size, one per step; the remainder of the division is dropped. The part of step n depends only on the
    seed, n, and the text from batch `first_batch_of(n)` on: a run that resumes makes its fill again.

    The memory is one fill in the model's precision, once for all names with the same hookpoints, and
    beside it one batch and one part.

    Args:
        model: The language model; its blocks after the last that is read are not computed.
        sources: Hookpoints by name. Of several, each token takes one at random, the same for all names
            that have the same hookpoints.
        special_ids: Ids `[n]` whose positions are left out; `None` takes every position.
        seed: Seed of the order, and of the hookpoint that a token takes.
        batches_per_fill: Batches of tokens that are shuffled among each other; also steps per fill.

    Raises:
        ConfigError: For a hookpoint that the model does not have.
    """

    def __init__(
        self,
        model: LanguageModel,
        sources: Mapping[str, Sequence[str]],
        special_ids: Tensor | None,
        seed: int,
        batches_per_fill: int,
    ) -> None:
        self.batches_per_fill = batches_per_fill
        self._model = model
        self._groups = {name: tuple(hookpoints) for name, hookpoints in sources.items()}
        hookpoints = sorted({hookpoint for group in self._groups.values() for hookpoint in group})
        self._modules = {hookpoint: model.module_at(hookpoint) for hookpoint in hookpoints}
        places = [Place.named(hookpoint) for hookpoint in hookpoints]
        # It is not known in which block another module lies.
        self._end = max(len(model.blocks) if place is None else place.block + 1 for place in places)
        self._special_ids = None if special_ids is None else special_ids.to(model.device)
        self._seed = seed
        self._held: dict[_Group, Tensor] = {}
        self._shape = torch.Size()
        self._count = 0
        self._order = torch.empty(0, dtype=torch.long)
        self._fill: int | None = None

    def first_batch_of(self, step: int) -> int:
        """The batch of tokens to begin reading with, so that this step can be served first."""
        return step - step % self.batches_per_fill

    def serve(self, step: int, batches: Iterator[Tensor]) -> dict[str, Tensor]:
        """The activations of one step by name, `[token, d_in]`. Names with equal sources share a tensor.

        Args:
            step: The first step that is served, or the one after the last.
            batches: Tokens `[batch, pos]`, all of one shape. It is read where the step begins a fill, or
                is the first that is served: then it begins with batch `first_batch_of(step)`.

        Raises:
            UserError: Where special positions leave less than one activation for each step of the fill.
            ValueError: For a step of a fill that is neither held nor the next.
        """
        fill, part = divmod(step, self.batches_per_fill)
        if fill != self._fill:
            if self._fill not in (None, fill - 1):
                raise ValueError(f"step {step} is of fill {fill}; fill {self._fill} is held")
            self._read(fill, batches)
        size = self._count // self.batches_per_fill
        rows = self._order[part * size : (part + 1) * size].to(self._model.device)
        parts = {group: held.index_select(0, rows) for group, held in self._held.items()}
        return {name: parts[group] for name, group in self._groups.items()}

    @torch.no_grad()
    def _read(self, fill: int, batches: Iterator[Tensor]) -> None:
        """Replace the fill that is held."""
        self._fill, self._count = None, 0
        draws = {group: self._random(fill, *group) for group in set(self._groups.values())}
        for _ in range(self.batches_per_fill):
            tokens = next(batches).to(self._model.device)
            self._shape = self._shape or tokens.shape
            if tokens.shape != self._shape:
                raise ValueError(f"a batch of {[*tokens.shape]} in a fill of {[*self._shape]} each")
            self._append(tokens, draws)
        if self._count < self.batches_per_fill:
            raise UserError(
                f"{self._count} activations are too few for {self.batches_per_fill} steps: "
                "the other positions hold special tokens"
            )
        self._order = torch.from_numpy(self._random(fill, "order").permutation(self._count))
        self._fill = fill

    def _append(self, tokens: Tensor, draws: Mapping[_Group, np.random.Generator]) -> None:
        """Add the activations of one batch."""
        rows = torch.arange(tokens.numel(), device=tokens.device)
        if self._special_ids is not None:
            rows = rows[~special_positions(tokens, self._special_ids).flatten()]
        taken: dict[tuple[_Group, str], Tensor] = {}
        for group, draw in draws.items():
            choices = torch.from_numpy(draw.integers(len(group), size=len(rows))).to(tokens.device)
            for choice, hookpoint in enumerate(group):
                taken[group, hookpoint] = (choices == choice).nonzero()[:, 0]

        def take(hookpoint: str, resid: Tensor) -> None:
            resid = resid.flatten(0, 1)
            for group in draws:
                if hookpoint in group:
                    if group not in self._held:
                        capacity = self._shape.numel() * self.batches_per_fill
                        self._held[group] = resid.new_empty(capacity, resid.shape[-1])
                    which = taken[group, hookpoint]
                    self._held[group][self._count + which] = resid[rows[which]]

        with observed(self._modules, take):
            self._model.resid_entering(self._end, tokens)
        self._count += len(rows)

    def _random(self, fill: int, *purpose: str) -> np.random.Generator:
        """The random numbers of one fill, for one purpose."""
        return np.random.default_rng([self._seed, fill, *" ".join(purpose).encode()])


@torch.no_grad()
def activations(
    model: LanguageModel,
    hookpoints: Iterable[str],
    batches: Iterable[Tensor],
    special_ids: Tensor | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Activations `[token, d_model]` by hookpoint, one item per batch of tokens `[batch, pos]`.

    Positions of the special ids `[n]` are left out.
    """
    modules = {hookpoint: model.module_at(hookpoint) for hookpoint in hookpoints}
    for tokens in batches:
        tokens = tokens.to(model.device)
        counted = torch.ones_like(tokens, dtype=torch.bool)
        if special_ids is not None:
            counted = ~special_positions(tokens, special_ids)
        seen: dict[str, Tensor] = {}
        with observed(modules, seen.__setitem__):
            model.hidden(tokens)
        yield {hookpoint: resid[counted] for hookpoint, resid in seen.items()}
