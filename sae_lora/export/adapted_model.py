"""A finished run as a model: the language model with its trained adapters, and its SAEs."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sae_lora.common.errors import ConfigError, UserError, listed
from sae_lora.config.enums import Device
from sae_lora.config.identity import ADAPTING, TRAINING_SAES
from sae_lora.config.schema import Config, SAEChoice
from sae_lora.config.serialize import load
from sae_lora.data.packing import PlainText, convention_of, special_ids
from sae_lora.export.public import BASE_MODEL
from sae_lora.models import adapter_files, loading
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import device_of
from sae_lora.records.folder import MODEL_CARD, RunFolder
from sae_lora.records.status import with_weights
from sae_lora.saes.from_run import trained_saes
from sae_lora.saes.loading import LoadedSAE, SAEs, splices
from sae_lora.splice.hooks import Coder, Observer, spliced
from sae_lora.splice.trunk import Splices


class Adapted:
    """The language model and the SAEs of a finished run, with the trained adapters or SAEs.

    A call with tokens `[batch, pos]` returns the logits `[batch, pos, d_vocab]` of the student, with
    SAEs and adapters. `logits` can also leave out SAEs or adapters. Inside a `with` block of `spliced`,
    the SAEs are in the transformers models for any use.

    Args:
        config: The config of the run.
        tokenizer: The tokenizer of the model.
        model: The plain model.
        adapter: The folder of the trained adapters; `None` if the run has trained no adapters.
        splices: The SAEs and their blocks.

    Raises:
        UserError: If the adapters cannot be loaded.
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
        self.tokenizer = tokenizer
        self.splices = splices
        """The SAEs, ordered by block."""
        self._base = model
        self._adapted = model.view()
        self.peft = None if adapter is None else adapter_files.load(self._adapted, adapter)
        """peft's view of `model`; `None` if the run has trained no adapters."""
        self._is_spliced = False

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model with the adapters; it shares all other weights with `base`."""
        return self._adapted.model

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model without adapters."""
        return self._base.model

    @property
    def parts(self) -> tuple[LanguageModel, LanguageModel]:
        """The plain and the adapted model. If the run has no adapters, both are the plain model."""
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
            sae: True: with the SAEs.
            adapters: True: with the adapters.

        Raises:
            UserError: Inside `spliced`, since the SAEs are already in the model.
        """
        self._check_plain()
        model = self.model if adapters else self.base
        with self.spliced() if sae else nullcontext():
            return model(input_ids=tokens.to(model.device), use_cache=False).logits

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 40,
        *,
        sae: bool = True,
        adapters: bool = True,
        **options: Any,
    ) -> str:
        """Return the prompt and its continuation.

        Args:
            prompt: Text to continue, or token ids. Text that spells special tokens is text: pass what
                contains special tokens, such as a chat template, as token ids.
            max_new_tokens: Largest number of new tokens.
            sae: True: with the SAEs.
            adapters: True: with the adapters.
            options: Further options of transformers' `generate`, such as `do_sample=True`; by default
                decoding is greedy.

        Raises:
            UserError: Inside `spliced`, since the SAEs are already in the model.
        """
        self._check_plain()
        model: Any = self.model if adapters else self.base  # most classes have `generate`, not all
        ids = self.tokens_of(prompt) if isinstance(prompt, str) else list(prompt)
        inputs = torch.tensor([ids], device=model.device)
        options = {"do_sample": False, "pad_token_id": self.tokenizer.eos_token_id} | options
        with self.spliced() if sae else nullcontext():
            mask = torch.ones_like(inputs)
            (tokens,) = model.generate(
                inputs, attention_mask=mask, max_new_tokens=max_new_tokens, **options
            )
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def tokens_of(self, text: str) -> list[int]:
        """Token ids of a text, with the token that sequences of the run begin with."""
        bos = convention_of(self.tokenizer, self.config.data.bos).bos
        (ids,) = PlainText(self.tokenizer)([text])
        return ids if bos is None else [bos, *ids]

    @contextmanager
    def spliced(self, observe: Observer | None = None, instead: Splices | None = None) -> Iterator[None]:
        """Put the SAEs into `model` and `base` inside the block, for every forward pass.

        Special tokens keep their activation if they did in the run, also in generation with a cache.

        Args:
            observe: Called after each use of an SAE, with its input and output.
            instead: SAEs that replace those of the run.

        Raises:
            UserError: Inside another `spliced` block.
        """
        self._check_plain()
        splices = self.splices if instead is None else instead
        self._is_spliced = True
        for model in (self._base, self._adapted):
            model.model.forward = self._with_saes(model, splices, observe)
        try:
            yield
        finally:
            del self.base.forward, self.model.forward
            self._is_spliced = False

    def _with_saes(
        self, model: LanguageModel, splices: Splices, observe: Observer | None
    ) -> Callable[..., Any]:
        """A forward pass with the SAEs; `generate` calls it several times with different tokens."""
        forward = model.model.forward

        @functools.wraps(forward)
        def with_saes(input_ids: Tensor | None = None, *arguments: Any, **keywords: Any) -> Any:
            if input_ids is None and any(splice.special.exists for splice in splices):
                raise UserError(
                    "input_ids are needed: special tokens keep their activation around this SAE"
                )
            begins = None if input_ids is None else _begins(input_ids, keywords)
            with spliced(model, splices, input_ids, observe, begins):
                return forward(input_ids, *arguments, **keywords)

        return with_saes

    def _check_plain(self) -> None:
        if self._is_spliced:
            raise UserError(
                "the SAEs are already in the model: leave the `with` block of `spliced` first"
            )


def _begins(tokens: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    """True at the first position of each sequence, `[batch, pos]`, after padding and outside the cache.

    Args:
        tokens: The tokens of one forward pass, `[batch, pos]`.
        keywords: Its other arguments; `attention_mask` `[batch, cached + pos]` is zero at padding.
    """
    # transformers has two names for the cache.
    cache = keywords.get("past_key_values", keywords.get("cache"))
    mask = keywords.get("attention_mask")
    n_cached = 0 if cache is None else cache.get_seq_length()
    if mask is None or mask.ndim != 2:
        mask = torch.ones(len(tokens), n_cached + tokens.shape[1], device=tokens.device)
    first = (mask != 0).int().argmax(-1, keepdim=True)
    columns = torch.arange(mask.shape[1], device=tokens.device)[-tokens.shape[1] :]
    return columns == first


def load_adapted(
    run: RunFolder | Path | str, device: str | None = None, *, model: str | None = None
) -> Adapted:
    """Load the model, adapters and SAEs of a finished run.

    Args:
        run: The run folder, `outputs/<sweep>/<run>`, or the folder of its export.
        device: auto, cpu or cuda; default: the run's `train.device`.
        model: Folder of the base model. Needed for the export of a run of a local model.

    Raises:
        UserError: If the run is not finished, or one of its files is missing or has changed.
    """
    path = run.path if isinstance(run, RunFolder) else Path(run).expanduser()
    is_export = (path / MODEL_CARD).is_file()
    folder = RunFolder(path) if is_export else with_weights(path)
    config = load(folder.config.read_text())
    if is_export:
        config = _in_export(config, path)
    if model is not None:
        config = replace(config, model=replace(config.model, name=model, commit=None))
    if config.model.name == BASE_MODEL:
        allowed = "the folder of the base model: the run read it from its machine"
        raise ConfigError("model", None, allowed)
    if device is not None:
        if device not in Device.__members__:
            raise ConfigError("device", device, listed(Device.__members__), nearest="auto")
        config = replace(config, train=replace(config.train, device=Device[device]))
    loading.silence_transformers()
    torch_device = device_of(config)
    dimensions = read_dimensions(config.model)
    sae = trained_saes(config, folder, dimensions)
    saes = SAEs(dimensions, torch_device).of(sae)
    if config.method.kind not in TRAINING_SAES:
        _check_same(saes, folder)
    tokenizer = loading.load_tokenizer(config.model)
    return Adapted(
        config,
        tokenizer,
        loading.load_model(config.model, config.train.dtype, torch_device),
        (path if is_export else folder.adapter) if config.method.kind in ADAPTING else None,
        splices(sae, saes, special_ids(tokenizer)),
    )


def _in_export(config: Config, folder: Path) -> Config:
    """The config with the paths of the SAEs in an export.

    Raises:
        UserError: If the export is a merged model.
    """
    if (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is a merged model: transformers loads it, as its {MODEL_CARD} shows; for "
            "load_adapted, export without --merge"
        )

    def inside(choice: SAEChoice) -> SAEChoice:
        path = choice.path and str(folder / choice.path)
        adapter = choice.adapter and replace(choice.adapter, path=str(folder / choice.adapter.path))
        return replace(choice, path=path, adapter=adapter)

    return replace(config, sae=replace(config.sae, used=list(map(inside, config.sae.used))))


def _check_same(saes: Sequence[LoadedSAE], folder: RunFolder) -> None:
    """Refuse SAEs whose weights have changed since the run."""
    for sae, entry in zip(saes, folder.read_summary()["sae"], strict=True):
        if sae.description["sha256"] != entry["sha256"]:
            raise UserError(
                f"{folder.path}: the weights of the SAE at {entry['hookpoint']} have changed since this "
                f"run (SHA-256 is {sae.description['sha256']}, was {entry['sha256']})"
            )
