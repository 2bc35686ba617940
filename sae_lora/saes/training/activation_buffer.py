"""Activations for SAEs in training: streamed, shuffled, with a place that a run can resume from."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes.loading import IdentitySAE
from sae_lora.splice.hooks import Reading, special_positions, spliced

_Group = tuple[str, ...]
"""Hookpoints of which each token takes one."""


class _Taken(NamedTuple):
    """What a group takes of one hookpoint in one batch.

    Args:
        group: The group.
        rows: Of the batch's tokens, `[taken]`; `None` for all.
        places: Where in the fill they go.
    """

    group: _Group
    rows: Tensor | None
    places: Tensor | slice


class ActivationBuffer:
    """Activations of a few batches of tokens, shuffled among each other, and no older ones.

    A fill holds what the model makes of `batches_per_fill` batches and is served in as many parts of the
    same size, one a step. What the division leaves, less than one activation a part, is dropped. So what
    step n is served follows from the seed, n, and the text from batch `first_batch_of(n)` on, and a run
    that stopped in the middle of a fill goes on with the same parts once the fill is made again.

    The memory is one fill in the model's precision, once for all names that take from the same
    hookpoints, and what one batch and one part take beside it.

    Args:
        model: The language model; its blocks after the last that is read are not computed.
        sources: By name, the hookpoints that its activations come from. Of several, each token takes one
            at random, the same for all names that have the same ones.
        special_ids: Ids `[n]` whose positions are left out; `None` takes every position.
        seed: Settles the order, and which of several hookpoints a token takes.
        batches_per_fill: How many batches of tokens are shuffled among each other.

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
        """And so steps per fill."""
        self._model = model
        self._groups = {name: tuple(hookpoints) for name, hookpoints in sources.items()}
        hookpoints = sorted({hookpoint for group in self._groups.values() for hookpoint in group})
        self._modules = {hookpoint: model.module_at(hookpoint) for hookpoint in hookpoints}
        places = [Place.named(hookpoint) for hookpoint in hookpoints]
        # Of another module it is not known which block it lies in.
        self._end = max(len(model.blocks) if place is None else place.block + 1 for place in places)
        self._special_ids = None if special_ids is None else special_ids.to(model.device)
        self._seed = seed
        self._held: dict[_Group, Tensor] = {}
        self._shape = torch.Size()
        self._count = 0
        self._order = torch.empty(0, dtype=torch.long)
        self._fill: int | None = None

    @property
    def bytes_held(self) -> int:
        """Of the activations in memory."""
        return sum(held.numel() * held.element_size() for held in self._held.values())

    def first_batch_of(self, step: int) -> int:
        """Which batch of tokens to begin reading with, so that this step can be served first."""
        return step - step % self.batches_per_fill

    def serve(self, step: int, batches: Iterator[Tensor]) -> dict[str, Tensor]:
        """The activations of one step by name, `[token, d_in]`. The same ones for names alike.

        Args:
            step: The one after the last that was served, or the first that is.
            batches: Tokens `[batch, pos]`, all of one shape. Read where the step begins a fill or is the
                first that is served, then from batch `first_batch_of(step)` on.

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
        """Puts another fill in the place of the one that is held."""
        self._fill, self._count = None, 0
        draws = {group: self._random(fill, *group) for group in set(self._groups.values())}
        for number in range(self.batches_per_fill):
            tokens = next(batches).to(self._model.device)
            if number == 0 and tokens.shape != self._shape:
                self._held.clear()
                self._shape = tokens.shape
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
        """Adds the activations of one batch."""
        rows = None
        if self._special_ids is not None:
            rows = (~special_positions(tokens, self._special_ids)).flatten().nonzero()[:, 0]
        count = tokens.numel() if rows is None else len(rows)
        taken: dict[str, list[_Taken]] = {hookpoint: [] for hookpoint in self._modules}
        for group, draw in draws.items():
            if len(group) == 1:
                places = slice(self._count, self._count + count)
                taken[group[0]].append(_Taken(group, rows, places))
                continue
            choices = torch.from_numpy(draw.integers(len(group), size=count)).to(tokens.device)
            for choice, hookpoint in enumerate(group):
                which = (choices == choice).nonzero()[:, 0]
                chosen = which if rows is None else rows[which]
                taken[hookpoint].append(_Taken(group, chosen, which + self._count))
        with self._keeping(taken):
            self._model.resid_entering(self._end, tokens)
        self._count += count

    @contextmanager
    def _keeping(self, taken: Mapping[str, Sequence[_Taken]]) -> Iterator[None]:
        """Inside the block, what passes the hookpoints goes to its places."""

        def hook(hookpoint: str) -> Any:
            def keep(module: object, arguments: object, output: Any) -> None:
                resid: Tensor = output[0] if isinstance(output, tuple) else output
                resid = resid.flatten(0, 1)
                for group, rows, places in taken[hookpoint]:
                    self._room(group, resid)[places] = resid if rows is None else resid[rows]

            return keep

        with ExitStack() as hooks:
            for hookpoint, module in self._modules.items():
                hooks.callback(module.register_forward_hook(hook(hookpoint)).remove)
            yield

    def _room(self, group: _Group, resid: Tensor) -> Tensor:
        """The memory of a group's fill, the same for one fill after another."""
        if group not in self._held:
            capacity = self._shape.numel() * self.batches_per_fill
            self._held[group] = resid.new_empty(capacity, resid.shape[-1])
        return self._held[group]

    def _random(self, fill: int, *purpose: str) -> np.random.Generator:
        """What one fill draws from, for one purpose."""
        return np.random.default_rng([self._seed, fill, *" ".join(purpose).encode()])


@torch.no_grad()
def activations(
    model: LanguageModel,
    hookpoints: Iterable[str],
    batches: Iterable[Tensor],
    special_ids: Tensor | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Activations `[token, d_model]` by hookpoint, one item per batch of tokens `[batch, pos]`.

    Args:
        model: The language model.
        hookpoints: Where to read.
        batches: Tokens.
        special_ids: Ids `[n]` whose positions are left out; `None` takes every position.
    """
    controls = {hookpoint: IdentitySAE() for hookpoint in hookpoints}
    for tokens in batches:
        seen: dict[str, Tensor] = {}

        def keep(reading: Reading, seen: dict[str, Tensor] = seen) -> None:
            seen[reading.hookpoint] = reading.resid

        tokens = tokens.to(model.device)
        left_out = None if special_ids is None else special_positions(tokens, special_ids)
        with spliced(model, controls, left_out, observe=keep):
            model.hidden(tokens)
        yield seen
