"""A finished run as it is evaluated: its models, its SAEs, and the text it was held to."""

import enum
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sae_lora.config.enums import SAEFamily
from sae_lora.config.identity import ADAPTING
from sae_lora.data import corpus
from sae_lora.export.adapted_model import Adapted, load_adapted
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.language_model import LanguageModel, outputs_of
from sae_lora.records.folder import RunFolder
from sae_lora.saes.loading import SAEs, splices
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Observer, kept_positions, spliced
from sae_lora.splice.trunk import Splices


class Cell(enum.StrEnum):
    """A model with or without SAEs, trained or not."""

    base = "base"
    """The plain model."""
    spliced = "spliced"
    """With the SAEs as they were before the run."""
    student = "student"
    """With the SAEs and all that the run has trained."""
    adapted = "adapted"
    """With the adapters, and no SAE."""


class Subject:
    """A finished run, loaded to be measured.

    Args:
        folder: Its folder.
        device: auto, cpu or cuda; by default what the run's `train.device` says.

    Raises:
        UserError: Where the run is not finished, or something of it is missing or another than then.
    """

    def __init__(self, folder: RunFolder | Path, device: str | None = None) -> None:
        self.adapted: Adapted = load_adapted(folder, device)
        """What the run has made."""
        self.folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
        self.config = self.adapted.config
        self.model, self.with_adapters = self.adapted.parts
        """The plain model, and the one with adapters; the same where there are none."""
        self.device = self.model.device
        text = corpus.load(self.config.data, self.adapted.tokenizer, 1)
        self.tokens: Tensor = text.validation_tokens
        """Held out, `[sequence, pos]`."""
        self.special_ids = text.special_ids.to(self.device)
        self.head = Head.of(self.model)
        self.after: Splices = self.adapted.splices
        """The SAEs as the run has left them."""
        self.before: Splices = self._before()
        """The SAEs as they were; none where the run has made them."""

    def _before(self) -> Splices:
        config = self.config.sae
        if config.family is SAEFamily.new:
            return ()
        if self.config.method.kind in ADAPTING:
            return self.after
        loaded = SAEs(read_dimensions(self.config.model), self.device).of(config)
        return splices(config, loaded)

    @property
    def cells(self) -> list[Cell]:
        """Those that there are of this run."""
        found = [Cell.base]
        if self.before:
            found.append(Cell.spliced)
        found.append(Cell.student)
        if self.with_adapters is not self.model:
            found.append(Cell.adapted)
        return found

    def model_of(self, cell: Cell) -> LanguageModel:
        """The language model of a cell."""
        return self.with_adapters if cell in (Cell.student, Cell.adapted) else self.model

    def splices_of(self, cell: Cell) -> Splices:
        """The SAEs of a cell, at their places."""
        return {Cell.spliced: self.before, Cell.student: self.after}.get(cell, ())

    @contextmanager
    def in_place(self, cell: Cell) -> Iterator[PreTrainedModel]:
        """The transformers model of a cell: inside the block its SAEs are in it, whatever is done.

        Args:
            cell: Which.
        """
        model = self.model_of(cell).model
        there = self.splices_of(cell)
        with self.adapted.spliced(instead=there) if there else nullcontext():
            yield model

    def batches(self, sequences: int | None = None) -> Iterator[Tensor]:
        """The held-out text, `[batch, pos]`, on the device.

        Args:
            sequences: How many, from the first on; `None` for all.
        """
        at_once = max(1, self.config.train.eval_batch_tokens // self.tokens.shape[1])
        for batch in self.tokens[:sequences].split(at_once):
            yield batch.to(self.device)

    @torch.no_grad()
    def hidden(
        self,
        cell: Cell,
        tokens: Tensor,
        observe: Observer | None = None,
        instead: Splices | None = None,
    ) -> Tensor:
        """What the head reads, `[batch, pos, d_model]`.

        Args:
            cell: Of which model.
            tokens: `[batch, pos]`.
            observe: Called each time an SAE has been applied.
            instead: What is in place, rather than the cell's SAEs.
        """
        there = self.splices_of(cell) if instead is None else instead
        with self._spliced(cell, tokens, there, observe) as model:
            return model.hidden(tokens)

    @torch.no_grad()
    def streams(self, cell: Cell, tokens: Tensor) -> list[Tensor]:
        """The residual stream after each block, `[batch, pos, d_model]`, as the next one reads it.

        Args:
            cell: Of which model.
            tokens: `[batch, pos]`.
        """
        with (
            self._spliced(cell, tokens, self.splices_of(cell)) as model,
            outputs_of(model.blocks) as found,
        ):
            model.hidden(tokens)
        return found

    @contextmanager
    def _spliced(
        self, cell: Cell, tokens: Tensor, there: Splices, observe: Observer | None = None
    ) -> Iterator[LanguageModel]:
        """The language model of a cell with SAEs in it, inside the block, for these tokens."""
        model = self.model_of(cell)
        saes = {splice.hookpoint: splice.sae for splice in there}
        with spliced(model, saes, self.kept_positions(tokens, there), observe):
            yield model

    def kept_positions(self, tokens: Tensor, there: Splices) -> Tensor | None:
        """Positions `[batch, pos]` (true) that keep their activation; `None` where all are replaced."""
        return kept_positions(tokens, self.special_ids, there)
