"""Activations for SAEs in training: streamed, shuffled, and identical if a run resumes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sae_lora.common.console import Report, no_report
from sae_lora.common.errors import UserError
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.mlp_input import Stream, streamed
from sae_lora.splice.positions import Special, exceeds_median

FILLING = "filling buffer"
"""The stage in which a fill is read."""
_Group = tuple[Stream, ...]
"""The streams that an SAE reads; each token takes one of them."""


class ActivationBuffer:
    """Shuffled activations of a few batches of tokens.

    A fill is the activations of `batches_per_fill` batches, shuffled together. It is served in
    `batches_per_fill` parts of equal size, one per step; the remainder of the division is dropped. Then
    the next fill replaces all of it. The part of step n depends only on the seed, n, and the text from
    batch `first_batch_of(n)` on, so that a run that resumes recomputes its fill.

    Memory: one fill in the model's precision for each distinct list of streams, one batch and one part.

    Args:
        model: The language model. The blocks after the last hookpoint are not computed.
        sources: Lists of streams by name. With several streams, each token takes one at random, and the
            same one for all names with the same list.
        special: The positions to leave out.
        seed: Seed of the order and of the stream that each token takes.
        batches_per_fill: Batches of tokens per fill, which is also the number of steps per fill.
        report: Called with the batches of a fill that are read.

    Raises:
        ConfigError: For a hookpoint that the model does not have.
    """

    def __init__(
        self,
        model: LanguageModel,
        sources: Mapping[str, Sequence[Stream]],
        special: Special,
        seed: int,
        batches_per_fill: int,
        report: Report = no_report,
    ) -> None:
        self.batches_per_fill = batches_per_fill
        self._report = report
        self._model = model
        self._groups = {name: tuple(streams) for name, streams in sources.items()}
        self._streams = sorted({stream for group in self._groups.values() for stream in group}, key=str)
        for stream in self._streams:
            model.module_at(stream.hookpoint)  # raises if there is none
        places = [Place.named(stream.hookpoint) for stream in self._streams]
        # The block of any other module is unknown: compute all blocks.
        self._end = max(len(model.blocks) if place is None else place.block + 1 for place in places)
        self._special = special
        self._seed = seed
        self._held: dict[_Group, Tensor] = {}
        self._shape = torch.Size()
        self._counts: dict[_Group, int] = {}
        """Number of activations for each list of streams, because outliers differ between them."""
        self._orders: dict[_Group, Tensor] = {}
        self._fill: int | None = None

    def first_batch_of(self, step: int) -> int:
        """The batch of tokens to start reading from if this step is the first to be served."""
        return step - step % self.batches_per_fill

    def prepare(self, step: int, batches: Iterator[Tensor]) -> bool:
        """Fill the buffer if this step begins a fill; return True if it did.

        After an interruption of this method, nothing can be served.

        Args:
            step: The step. After the first call, the next one.
            batches: Tokens `[batch, pos]`, all of one shape. Read when a fill begins. For the first call
                they begin with batch `first_batch_of(step)`.

        Raises:
            UserError: If special positions leave less than one activation for each step of the fill.
            ValueError: If the step belongs neither to the present fill nor to the next one.
        """
        fill = step // self.batches_per_fill
        if fill == self._fill:
            return False
        if self._fill not in (None, fill - 1):
            raise ValueError(f"step {step} belongs to fill {fill}, but the buffer is at {self._fill}")
        self._read(fill, batches)
        return True

    def serve(self, step: int, batches: Iterator[Tensor]) -> dict[str, Tensor]:
        """The activations of one step by name, `[token, d_in]`. Names with equal sources share a tensor.

        Arguments and errors are those of `prepare`, which this method calls if it was not called.
        """
        self.prepare(step, batches)
        part = step % self.batches_per_fill
        parts = {}
        for group, held in self._held.items():
            size = self._counts[group] // self.batches_per_fill
            rows = self._orders[group][part * size : (part + 1) * size].to(self._model.device)
            parts[group] = held.index_select(0, rows)
        return {name: parts[group] for name, group in self._groups.items()}

    @torch.no_grad()
    def _read(self, fill: int, batches: Iterator[Tensor]) -> None:
        """Replace the present fill."""
        generators = {
            group: self._random(fill, *map(str, group)) for group in set(self._groups.values())
        }
        self._fill, self._counts = None, dict.fromkeys(generators, 0)
        for number in range(self.batches_per_fill):
            self._report(FILLING, number, self.batches_per_fill)
            tokens = next(batches).to(self._model.device)
            self._shape = self._shape or tokens.shape
            if tokens.shape != self._shape:
                raise ValueError(f"batch has shape {[*tokens.shape]}, expected {[*self._shape]}")
            self._append(tokens, generators)
        fewest = min(self._counts.values())
        if fewest < self.batches_per_fill:
            raise UserError(
                f"{fewest} activations are too few for {self.batches_per_fill} steps: "
                "all other positions are special, and SAEs are not trained on them"
            )
        self._orders = {
            group: torch.from_numpy(self._random(fill, "order").permutation(count))
            for group, count in self._counts.items()
        }
        self._fill = fill

    def _append(self, tokens: Tensor, generators: Mapping[_Group, np.random.Generator]) -> None:
        """Add the activations of one batch."""
        rows = (~self._special.positions(tokens)).flatten().nonzero()[:, 0]
        taken: dict[tuple[_Group, Stream], Tensor] = {}
        for group, generator in generators.items():
            choices = torch.from_numpy(generator.integers(len(group), size=len(rows)))
            choices = choices.to(tokens.device)
            for choice, stream in enumerate(group):
                taken[group, stream] = (choices == choice).nonzero()[:, 0]
        multiple = self._special.norm_multiple
        is_outlier = {group: torch.zeros_like(rows, dtype=torch.bool) for group in generators}

        def take(stream: Stream, resid: Tensor) -> None:
            read = stream.inputs(resid)
            outlier = None if multiple is None else exceeds_median(read, multiple).flatten()
            resid = resid.flatten(0, 1)
            for group in generators:
                if stream in group:
                    if group not in self._held:
                        capacity = self._shape.numel() * self.batches_per_fill
                        self._held[group] = resid.new_empty(capacity, resid.shape[-1])
                    indices = taken[group, stream]
                    self._held[group][self._counts[group] + indices] = resid[rows[indices]]
                    if outlier is not None:
                        is_outlier[group][indices] = outlier[rows[indices]]

        with streamed(self._model, self._streams, take):
            self._model.resid_entering(self._end, tokens)
        for group, count in self._counts.items():
            number = len(rows)
            if multiple is not None:
                held = self._held[group]
                typical = held[count : count + number][~is_outlier[group]]
                number = len(typical)
                held[count : count + number] = typical
            self._counts[group] = count + number

    def _random(self, fill: int, *purpose: str) -> np.random.Generator:
        """The generator of one fill for one purpose."""
        return np.random.default_rng([self._seed, fill, *" ".join(purpose).encode()])


@torch.no_grad()
def activations(
    model: LanguageModel,
    streams: Iterable[Stream],
    batches: Iterable[Tensor],
    special: Special,
) -> Iterator[dict[str, Tensor]]:
    """Activations `[token, d_in]` by hookpoint, one item per batch of tokens `[batch, pos]`.

    Special positions are left out.
    """
    streams = list(streams)
    for tokens in batches:
        tokens = tokens.to(model.device)
        resids: dict[Stream, Tensor] = {}
        with streamed(model, streams, resids.__setitem__):
            model.hidden(tokens)
        yield {
            stream.hookpoint: resid[~special.positions(tokens, stream.inputs(resid))]
            for stream, resid in resids.items()
        }
