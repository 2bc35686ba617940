"""Hidden states of a batch that do not depend on trained weights, computed once for all students."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import Observer, Reading, Splice, reconstructed, spliced

Splices = tuple[Splice, ...]
"""SAEs in a model, in the order of their places. Each reads what earlier SAEs have changed."""


def prefixes(splices: Splices) -> list[Splices]:
    """For each SAE, this SAE with all earlier ones, on which its output depends."""
    return [splices[: index + 1] for index in range(len(splices))]


def cuts_around(splices: Splices) -> set[int]:
    """The blocks whose input is needed from the trunk if these SAEs are in the model."""
    following = {splice.block + 1 for splice in splices}
    # A block with an SAE inside is computed once per combination of SAEs; all of these share its input.
    return following | {splice.block for splice in splices if splice.place.is_inside}


class Trunk:
    """The hidden states of one batch in the plain model, with SAEs and without, each computed once.

    Args:
        model: The model, without adapters.
        tokens: The batch, `[batch, pos]`.
        cuts: Blocks whose input is stored, so that several forward passes can begin there.
        observe: Called after an application of an SAE, once per combination of it and earlier SAEs.
        running: Entered around each pass through the model: `CompiledBlocks.in_use`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        cuts: Iterable[int],
        observe: Callable[[Splices, Reading], None] | None = None,
        running: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.tokens = tokens
        self._running = running
        self._model = model
        self.cuts = frozenset({0, *cuts})
        self._observe = observe
        self._entering: dict[tuple[Splices, int], Tensor] = {}
        self._read_by_head: dict[Splices, Tensor] = {}
        self._observed: set[Splices] = set()

    @torch.no_grad()
    def resid_entering(self, block: int, splices: Splices = ()) -> Tensor | None:
        """The residual stream that a block reads, `[batch, pos, d_model]`; `None` for block 0.

        Args:
            block: One of the cuts; the number of blocks, for the output of the last block.
            splices: The SAEs in the model, all before this block.
        """
        if block == 0:
            return None
        key = splices, block
        if key not in self._entering:
            self._entering[key] = self._compute(block, splices)
        return self._entering[key]

    @torch.no_grad()
    def hidden(self, splices: Splices = ()) -> Tensor:
        """The states that the head reads, `[batch, pos, d_model]`, with these SAEs in the model."""
        if splices not in self._read_by_head:
            end = len(self._model.blocks)
            last = splices[-1].block + 1 if splices else 0
            cut = end if last == end else self._cut_before(end)
            resid = self.resid_entering(cut, splices)
            with self._running():
                self._read_by_head[splices] = self._model.hidden(self.tokens, cut, resid)
        return self._read_by_head[splices]

    @property
    def bytes_held(self) -> int:
        """Memory of the stored states, in bytes."""
        states = [*self._entering.values(), *self._read_by_head.values()]
        return sum(state.numel() * state.element_size() for state in states)

    def forget_all_but(self, entering: Iterable[tuple[Splices, int]]) -> None:
        """Drop all states except the plain model's states before the head and the listed block inputs.

        Args:
            entering: Pairs of SAEs and a block; dropped states are computed again if needed.
        """
        kept = set(entering)
        self._entering = {key: resid for key, resid in self._entering.items() if key in kept}
        self._read_by_head = {key: hidden for key, hidden in self._read_by_head.items() if not key}
        self._observed.clear()

    def _compute(self, block: int, splices: Splices) -> Tensor:
        previous_block = [prefix for prefix in prefixes(splices) if prefix[-1].block == block - 1]
        if previous_block and not splices[-1].place.is_inside:
            last, resid = splices[-1], self.resid_entering(block, splices[:-1])
            assert resid is not None  # no SAE is before block 0
            return reconstructed(last, resid, self.tokens, self._observer(splices))
        earlier = splices[: len(splices) - len(previous_block)]
        cut = self._cut_before(block)
        resid = self.resid_entering(cut, earlier)
        with ExitStack() as inside:
            for prefix in previous_block:
                observe = self._observer(prefix)
                inside.enter_context(spliced(self._model, prefix[-1:], self.tokens, observe))
            inside.enter_context(self._running())
            return self._model.resid_entering(block, self.tokens, cut, resid)

    def _observer(self, splices: Splices) -> Observer | None:
        """The observer of the last SAE for its first application, then `None`: an SAE inside a block is
        applied again when the block runs for another combination of SAEs.
        """
        observe = self._observe
        if observe is None or splices in self._observed:
            return None
        self._observed.add(splices)
        return lambda reading: observe(splices, reading)

    def _cut_before(self, block: int) -> int:
        return max(cut for cut in self.cuts if cut < block)
