"""What a finished run has made: its model with the trained adapters, and its SAEs to splice in."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sae_lora.common.errors import ConfigError, UserError, listed
from sae_lora.config.enums import Device
from sae_lora.config.identity import ADAPTING, TRAINING_SAES
from sae_lora.config.schema import Config
from sae_lora.config.serialize import load
from sae_lora.data.packing import special_ids
from sae_lora.models import adapter_files, loading
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import device_of
from sae_lora.records.folder import RunFolder
from sae_lora.records.status import finished
from sae_lora.saes.from_run import trained_saes
from sae_lora.saes.loading import LoadedSAE, SAEs, splices
from sae_lora.splice.hooks import Coder, Observer, kept_positions, spliced
from sae_lora.splice.trunk import Splices


class Adapted:
    """A language model and SAEs as a run has left them: with its adapters, or its SAEs trained. Frozen.

    Called with tokens `[batch, pos]` it gives the logits `[batch, pos, d_vocab]` that the run's
    `student_ce` is about: SAEs in place, adapters on. `logits` gives those of the other cells too,
    `spliced` has the SAEs in the transformers models while you do with these what you like.

    Args:
        config: Of the run.
        tokenizer: The model's.
        model: The plain model.
        adapter: Folder of the trained adapters; `None` where something else was trained.
        splices: The SAEs at their places.

    Raises:
        UserError: Where the adapters cannot be loaded.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        model: LanguageModel,
        adapter: Path | None,
        splices: Splices,
    ) -> None:
        self.config = config
        """Of the run."""
        self.tokenizer = tokenizer
        """The model's own."""
        self.splices = splices
        """The SAEs at their places, by block."""
        self._base = model
        self._adapted = model.view()
        self.peft = None if adapter is None else adapter_files.load(self._adapted, adapter)
        """peft's view of `model`, where that has adapters."""
        self._special_ids = special_ids(tokenizer).to(model.device)
        self._is_spliced = False

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model with the adapters; its other weights are those of `base`."""
        return self._adapted.model

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model without adapters."""
        return self._base.model

    @property
    def parts(self) -> tuple[LanguageModel, LanguageModel]:
        """The plain model and the one with adapters, taken apart; the same where nothing adapts it."""
        return self._base, self._base if self.peft is None else self._adapted

    @property
    def saes(self) -> dict[str, Coder]:
        """The SAEs by hookpoint."""
        return {splice.hookpoint: splice.sae for splice in self.splices}

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits `[batch, pos, d_vocab]` of tokens `[batch, pos]`, with SAEs and adapters."""
        return self.logits(tokens)

    def logits(self, tokens: Tensor, *, sae: bool = True, adapters: bool = True) -> Tensor:
        """Logits `[batch, pos, d_vocab]`.

        Args:
            tokens: `[batch, pos]`.
            sae: Whether the SAEs are in place.
            adapters: Whether the adapters are on.

        Raises:
            UserError: Inside of `spliced`, where the SAEs are in place anyway.
        """
        self._check_plain()
        model = self.model if adapters else self.base
        with self.spliced() if sae else nullcontext():
            return model(input_ids=tokens.to(model.device), use_cache=False).logits

    @contextmanager
    def spliced(self, observe: Observer | None = None, instead: Splices | None = None) -> Iterator[None]:
        """Inside the block, `model` and `base` have the SAEs in place, in whatever is done with them.

        Positions whose token is special keep their activation where the run's did. So it is too in
        generation, a token at a time with a cache of those before.

        Args:
            observe: Called each time an SAE has been applied, with what it read and did.
            instead: What is in place, rather than the SAEs as the run has left them.

        Raises:
            UserError: Inside of another such block.
        """
        self._check_plain()
        there = self.splices if instead is None else instead
        with ExitStack() as scope:
            for model in (self._base, self._adapted):
                scope.enter_context(self._in_every_pass(model, there, observe))
            self._is_spliced = True
            try:
                yield
            finally:
                self._is_spliced = False

    @contextmanager
    def _in_every_pass(
        self, model: LanguageModel, there: Splices, observe: Observer | None
    ) -> Iterator[None]:
        """Which positions hold special tokens is found anew in each pass: `generate` makes many."""
        forward = model.model.forward
        saes = {splice.hookpoint: splice.sae for splice in there}

        @functools.wraps(forward)
        def with_saes(input_ids: Tensor | None = None, *arguments: Any, **keywords: Any) -> Any:
            with spliced(model, saes, self._kept_positions(input_ids, there), observe):
                return forward(input_ids, *arguments, **keywords)

        model.model.forward = with_saes
        try:
            yield
        finally:
            del model.model.forward

    def _kept_positions(self, tokens: Tensor | None, there: Splices) -> Tensor | None:
        """Positions `[batch, pos]` that keep their activation, or `None` where all are replaced."""
        if tokens is not None:
            return kept_positions(tokens, self._special_ids, there)
        if any(splice.keeps for splice in there):
            raise UserError("around this SAE special tokens keep their activation: give input_ids")
        return None

    def _check_plain(self) -> None:
        if self._is_spliced:
            raise UserError("the SAEs are in place already: leave the `with` block of `spliced` first")


def load_adapted(run: RunFolder | Path | str, device: str | None = None) -> Adapted:
    """The model, adapters and SAEs of a finished run, as they were when it ended.

    Args:
        run: Its folder, `outputs/<sweep>/<run>`.
        device: auto, cpu or cuda; by default what the run's `train.device` says.

    Raises:
        UserError: Where the run is not finished, or something of it is missing or another than then.
    """
    folder = finished(run.path if isinstance(run, RunFolder) else Path(run))
    config = load(folder.config.read_text())
    if device is not None:
        config = replace(config, train=replace(config.train, device=_named(device)))
    where = device_of(config)
    dimensions = read_dimensions(config.model)
    sae = trained_saes(config, folder, dimensions)
    saes = SAEs(dimensions, where).of(sae)
    if config.method.kind not in TRAINING_SAES:
        _check_same(saes, folder)
    return Adapted(
        config,
        loading.load_tokenizer(config.model),
        loading.load_model(config.model, config.train.dtype, where),
        folder.adapter if config.method.kind in ADAPTING else None,
        splices(sae, saes),
    )


def _named(device: str) -> Device:
    names = [one.name for one in Device]
    if device not in names:
        raise ConfigError("device", device, listed(names), nearest="auto")
    return Device[device]


def _check_same(saes: Sequence[LoadedSAE], folder: RunFolder) -> None:
    """Refuses SAEs with other weights than those that the run was trained around.

    Raises:
        UserError: Names the first.
    """
    for one, before in zip(saes, folder.read_summary()["sae"], strict=True):
        if one.description["sha256"] != before["sha256"]:
            raise UserError(
                f"{folder.path}: the SAE at {one.hookpoint} has other weights than the one it was "
                f"trained around (SHA-256 {one.description['sha256']}, then {before['sha256']})"
            )
