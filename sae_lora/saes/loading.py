"""Frozen SAEs, loaded through sae-lens, and their descriptions."""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor, nn

from sae_lora.common import hub
from sae_lora.common.errors import UserError
from sae_lora.config.enums import SAEFamily
from sae_lora.config.schema import SAEChoice, SAEConfig
from sae_lora.embedded import SAES as EMBEDDED_SAES
from sae_lora.models.dimensions import Dimensions
from sae_lora.models.hookpoints import Place
from sae_lora.saes import from_run, output_adapter
from sae_lora.saes.metadata import check_width, settled, trained_at, weights_digest
from sae_lora.saes.output_adapter import AdaptedCoder
from sae_lora.saes.pretrained_table import repository_of
from sae_lora.saes.sparse import multiplied
from sae_lora.splice.hooks import Coder, Splice
from sae_lora.splice.positions import Special

log = logging.getLogger(__name__)


EXCLUDES_FIRST = "exclude_first_position"
"""Our key in an SAE's metadata: true if it was not trained on the first position of sequences."""


class IdentitySAE(nn.Module):
    """An SAE that returns its input exactly: a splice without a gap, for checks and controls."""

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts


@dataclass(frozen=True)
class LoadedSAE:
    """One SAE, ready to be spliced."""

    sae: Coder
    description: dict[str, Any]
    """Values that identify it, for the summary."""
    excluded: bool | tuple[int, ...] = False
    """The tokens that it was not trained on, by its config: these ids, or true for BOS and EOS."""
    excludes_first: bool = False
    """True if its config says that it was not trained on the first position of sequences."""


def load(config: SAEConfig, choice: SAEChoice, model: Dimensions, device: torch.device) -> LoadedSAE:
    """The chosen SAE on the device, frozen, checked against its metadata.

    Raises:
        ConfigError: If it was trained at another place, or its input has another width.
        UserError: If its files are missing or damaged, or have changed since the run was planned.
    """
    _check_as_planned(choice)
    if config.family is SAEFamily.identity:
        module: nn.Module = IdentitySAE()
        values = {"architecture": "identity", "d_in": model.d_model, "d_sae": model.d_model}
    else:
        module, values = _through_sae_lens(config, choice, str(device))
    name = choice.id or choice.path or "identity"
    check_width(values.get("d_in"), model, field="sae.path" if choice.path else "sae.id", name=name)
    module = module.to(device).requires_grad_(False).eval()
    width, digest = values.get("d_sae"), _digest(module)
    description = describe(config, choice, values["architecture"], width, digest)
    metadata = values.get("metadata") or {}
    if processing := metadata.get("model_from_pretrained_kwargs"):
        log.warning(
            "%s was trained on a model loaded with %s, but the model is loaded unchanged",
            name,
            processing,
        )
    sae: Coder = multiplied(module, config.sparse)  # pyright: ignore[reportAssignmentType]
    if choice.adapter is not None:
        adapter = output_adapter.load(Path(choice.adapter.path), device)
        sae = AdaptedCoder(sae, adapter).eval()
    excluded = metadata.get("exclude_special_tokens")
    return LoadedSAE(
        sae,
        description,
        tuple(excluded) if isinstance(excluded, list) else bool(excluded),
        bool(metadata.get(EXCLUDES_FIRST)),
    )


def describe(
    config: SAEConfig,
    choice: SAEChoice,
    architecture: str,
    width: int | None,
    sha256: str | None = None,
) -> dict[str, Any]:
    """Values that identify an SAE, for the summary; `sha256` is that of its weights, if they exist."""
    return {
        "family": config.family.name,
        "block": choice.block,
        "hookpoint": str(Place.of(choice)),
        "release": choice.release,
        "id": choice.id,
        "commit": _commit(choice),
        "path": choice.path,
        "group": choice.group,
        "adapter": choice.adapter and choice.adapter.path,
        "architecture": architecture,
        "width": width,
        "stated_l0": choice.l0,
        "dtype": config.dtype.name,
        "sha256": sha256,
    }


def fetch(config: SAEConfig, choice: SAEChoice) -> str | None:
    """Download an SAE, so that it loads without a network; return the commit of its repository.

    Raises:
        ConfigError: If it was trained at another place.
        UserError: If it does not exist or cannot be downloaded.
    """
    _through_sae_lens(config, choice, "cpu")
    return _commit(choice)


def _commit(choice: SAEChoice) -> str | None:
    return hub.cached_commit(repository_of(choice.release)) if choice.release else None


def _check_as_planned(choice: SAEChoice) -> None:
    """Refuse an SAE whose files have changed since the run was planned."""
    if choice.commit is not None and _commit(choice) != choice.commit:
        raise UserError(
            f"sae.release = {choice.release!r} has changed since this run was planned: the cached "
            f"commit is not {choice.commit}"
        )
    if choice.path is not None and choice.sha256 not in (None, weights_digest(Path(choice.path))):
        raise UserError(
            f"sae.path = {choice.path!r}: the weights have changed since this run was planned"
        )
    if choice.adapter is not None:
        from_run.check_as_planned(choice.adapter)


def special_of(config: SAEConfig, sae: LoadedSAE | None, special_ids: Sequence[int]) -> Special:
    """The positions that keep their activation around an SAE, as configured, or else as it was trained.

    An SAE that was not trained on a position cannot reconstruct it.

    Args:
        config: The request.
        sae: The SAE; `None` for a new SAE.
        special_ids: BOS and EOS.
    """
    is_new = config.family is SAEFamily.new
    excluded = True if sae is None else sae.excluded
    if config.keep_special_tokens is not None:
        ids = special_ids if config.keep_special_tokens else ()
    elif isinstance(excluded, tuple):
        ids = excluded
    else:
        # Every text of Gemma begins with BOS, and Gemma Scope was not trained on it.
        ids = special_ids if excluded or is_new or config.family is SAEFamily.gemma_scope else ()
    first = config.keep_first
    if first is None:
        first = bool(ids) and (is_new or (sae is not None and sae.excludes_first))
    return Special(tuple(sorted(ids)), first, config.outlier_norm)


def splices(
    config: SAEConfig, saes: Sequence[LoadedSAE], special_ids: Sequence[int]
) -> tuple[Splice, ...]:
    """The SAEs of a run, in the order of their places; `special_ids` are BOS and EOS."""
    return tuple(
        Splice(choice.block, loaded.sae, choice.hook, special_of(config, loaded, special_ids))
        for choice, loaded in zip(config.used, saes, strict=True)
    )


def _through_sae_lens(
    config: SAEConfig, choice: SAEChoice, device: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Load an SAE; return it and the values of its config.

    Raises:
        ConfigError: If its config names another place than `choice`.
        UserError: If its files are missing or damaged, or cannot be downloaded.
    """
    dtype, path = config.dtype.name, choice.path or str(EMBEDDED_SAES / str(choice.id))
    field, name = ("sae.release", choice.release) if choice.release else ("sae.path", path)
    with quiet(), hub.explained(field, name):
        if choice.release is not None and choice.id is not None:
            sae = SAE.from_pretrained(choice.release, choice.id, device=device, dtype=dtype)
        else:
            try:
                sae = SAE.load_from_disk(path, device=device, dtype=dtype)
            except (OSError, KeyError, RuntimeError) as error:
                raise UserError(f"sae.path = {path!r} cannot be loaded: {error}") from error
    values = sae.cfg.to_dict() | {"architecture": sae.cfg.architecture()}
    settled(trained_at(values, choice.block), choice.block, choice.hook, choice.id or path)
    return sae, values


@contextmanager
def quiet() -> Iterator[None]:
    """Silence sae-lens's warnings about how the SAE's model was loaded; `load` warns once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*model_from_pretrained_kwargs.*")
        yield


def _digest(sae: nn.Module) -> str:
    """SHA-256 of the names and values of the loaded weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class SAEs:
    """The SAEs of several runs, for one model on one device. Each SAE is loaded only once."""

    def __init__(self, model: Dimensions, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._loaded: dict[str, LoadedSAE] = {}

    def of(self, config: SAEConfig) -> list[LoadedSAE]:
        """The SAEs that a run uses, in the order of `config.used`; empty if it trains new SAEs."""
        if config.family is SAEFamily.new:
            return []
        saes = []
        for choice in config.used:
            # Blocks of a group share an SAE, which is loaded as that of the first block.
            first = replace(choice, block=min([choice.block, *choice.group]))
            key = repr((config.family, config.dtype, config.sparse, first))
            if key not in self._loaded:
                self._loaded[key] = load(config, first, self._model, self._device)
            loaded, hookpoint = self._loaded[key], str(Place.of(choice))
            description = loaded.description | {"block": choice.block, "hookpoint": hookpoint}
            saes.append(replace(loaded, description=description))
        return saes
