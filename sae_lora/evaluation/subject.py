"""A finished run, loaded to be measured: its models, its SAEs and its held-out text."""

import copy
import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sae_lora.common.console import Report, no_report
from sae_lora.config.enums import SAEFamily
from sae_lora.config.identity import ADAPTING, TRAINING_SAES
from sae_lora.data import corpus
from sae_lora.data.packing import check_tokens
from sae_lora.export.adapted_model import Adapted, load_adapted
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.language_model import LanguageModel, outputs_of
from sae_lora.records.folder import RunFolder
from sae_lora.saes import loading
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Observer, spliced
from sae_lora.splice.trunk import Splices


class Cell(enum.StrEnum):
    """A model with or without SAEs, before or after training."""

    base = "base"
    """The plain model."""
    spliced = "spliced"
    """With the SAEs as they were before the run."""
    student = "student"
    """With the SAEs and all weights that the run has trained."""
    adapted = "adapted"
    """With the adapters and no SAE."""


class Replacement:
    """A stand-in for an SAE: a function from residuals `[..., d_model]` to their replacement."""

    def __init__(self, replace: Callable[[Tensor], Tensor]) -> None:
        self._replace = replace

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self._replace(feature_acts)


class Subject:
    """A finished run, loaded to be measured.

    Args:
        folder: Folder of the run.
        device: auto, cpu or cuda; by default the run's `train.device`.
        report: Called with the slices of text that are measured.

    Raises:
        UserError: If the run is not finished, or one of its files is missing or has changed.
    """

    def __init__(self, folder: RunFolder, device: str | None = None, report: Report = no_report) -> None:
        self.report_to(report)
        self.adapted: Adapted = load_adapted(folder, device)
        self.folder = folder
        self.config = self.adapted.config
        self.model, self.with_adapters = self.adapted.parts
        """The plain model, and the model with adapters; the same object if the run has no adapters."""
        self.device = self.model.device
        self._vocabulary = read_dimensions(self.config.model).d_vocab
        for model in dict.fromkeys((self.model, self.with_adapters)):
            model.model.get_input_embeddings().register_forward_pre_hook(self._check_tokens)
        text = corpus.load(self.config.data, self.adapted.tokenizer, 1, vocabulary=self._vocabulary)
        self.tokens: Tensor = text.validation_tokens
        """Held-out text, `[sequence, pos]`."""
        self.special_ids = text.special_ids
        """Ids of BOS and EOS."""
        self.head = Head.of(self.model)
        self.after: Splices = self.adapted.splices
        """The SAEs after the run."""
        self.before: Splices = self._before()
        """The SAEs before the run; empty if the run has trained new SAEs."""

    def _before(self) -> Splices:
        config = self.config.sae
        if config.family is SAEFamily.new:
            return ()
        if self.config.method.kind in ADAPTING and self.config.method.kind not in TRAINING_SAES:
            return self.after
        saes = loading.SAEs(read_dimensions(self.config.model), self.device).of(config)
        return loading.splices(config, saes, self.special_ids)

    def _check_tokens(self, embedding: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        """Refuse tokens that the model lacks, in whatever text a suite reads; a GPU would crash."""
        check_tokens(int(inputs[0].max()), self.adapted.tokenizer, self._vocabulary)

    def padding_tokenizer(self) -> Any:
        """A copy of the tokenizer for libraries that pad texts.

        Padding is masked, so that its token has no effect, but the model must have it: a tokenizer may
        have got a padding token without the model.
        """
        tokenizer: Any = copy.deepcopy(self.adapted.tokenizer)
        # Without a padding token, libraries take one of the others.
        ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
        known = [id for id in ids if id is not None]
        if not known or max(known) >= self._vocabulary:
            tokenizer.pad_token_id = next((id for id in known if id < self._vocabulary), 0)
        return tokenizer

    def report_to(self, report: Report) -> None:
        """Call `report` with the slices of text that are measured."""
        self._report = report
        self._stage = "evaluating"

    def begin(self, stage: str) -> None:
        """Report a stage; later reports have its name."""
        self._stage = stage
        self._report(stage, 0, 0)

    @property
    def cells(self) -> list[Cell]:
        """The cells that this run has."""
        exists = {Cell.spliced: bool(self.before), Cell.adapted: self.with_adapters is not self.model}
        return [cell for cell in Cell if exists.get(cell, True)]

    def model_of(self, cell: Cell) -> LanguageModel:
        """The language model of a cell."""
        return self.with_adapters if cell in (Cell.student, Cell.adapted) else self.model

    def splices_of(self, cell: Cell) -> Splices:
        """The SAEs of a cell, in their places."""
        return {Cell.spliced: self.before, Cell.student: self.after}.get(cell, ())

    @contextmanager
    def in_place(self, cell: Cell) -> Iterator[PreTrainedModel]:
        """The transformers model of a cell, whose SAEs are in every forward pass inside the block."""
        with self.adapted.spliced(instead=self.splices_of(cell)):
            yield self.model_of(cell).model

    def batches(self, sequences: int | None = None) -> Iterator[Tensor]:
        """Batches of the held-out text, `[batch, pos]` on the device: its first sequences, or all."""
        tokens = self.tokens[:sequences]
        for rows in self.slices(tokens):
            yield tokens[rows].to(self.device)

    def slices(self, tokens: Tensor) -> Iterator[slice]:
        """Slices of tokens `[text, pos]` that fit into one forward pass."""
        at_once = max(1, self.config.train.eval_batch_tokens // tokens.shape[1])
        starts = range(0, len(tokens), at_once)
        for number, start in enumerate(starts):
            self._report(self._stage, number, len(starts))
            yield slice(start, start + at_once)

    @torch.no_grad()
    def hidden(
        self,
        cell: Cell,
        tokens: Tensor,
        observe: Observer | None = None,
        instead: Splices | None = None,
    ) -> Tensor:
        """The head's input, `[batch, pos, d_model]`, for tokens `[batch, pos]`.

        `observe` is called after each SAE; `instead` replaces the cell's SAEs.
        """
        with self._spliced(cell, tokens, observe, instead) as model:
            return model.hidden(tokens)

    @torch.no_grad()
    def streams(self, cell: Cell, tokens: Tensor) -> list[Tensor]:
        """The residual stream after each block, `[batch, pos, d_model]`, as the next block reads it."""
        # Hooks run in this order: a block's SAE first, then the reader of its output.
        with self._spliced(cell, tokens) as model, outputs_of(model.blocks) as streams:
            model.hidden(tokens)
        return streams

    @contextmanager
    def _spliced(
        self,
        cell: Cell,
        tokens: Tensor,
        observe: Observer | None = None,
        instead: Splices | None = None,
    ) -> Iterator[LanguageModel]:
        model = self.model_of(cell)
        splices = self.splices_of(cell) if instead is None else instead
        with spliced(model, splices, tokens, observe):
            yield model
