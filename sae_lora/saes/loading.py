"""SAEs through sae-lens, frozen, with what is known about them."""

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

log = logging.getLogger(__name__)


class IdentitySAE(nn.Module):
    """Puts back exactly what it reads: the splice with no gap, for checks and controls."""

    def encode(self, x: Tensor) -> Tensor:
        """The residual itself, `[..., d_model]`."""
        return x

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The same again."""
        return feature_acts


@dataclass(frozen=True)
class LoadedSAE:
    """One SAE, ready to be spliced."""

    hookpoint: str
    """Where it sits."""
    sae: Coder
    """The SAE itself."""
    description: dict[str, Any]
    """What identifies it, for the record."""
    excludes_special_tokens: bool
    """Whether its own config says that it was not trained on positions holding BOS or EOS."""

    def at(self, choice: SAEChoice) -> "LoadedSAE":
        """The same SAE at another block of those that share it."""
        hookpoint = str(Place.of(choice))
        described = self.description | {"block": choice.block, "hookpoint": hookpoint}
        return replace(self, hookpoint=hookpoint, description=described)


def load(config: SAEConfig, choice: SAEChoice, model: Dimensions, device: torch.device) -> LoadedSAE:
    """The chosen SAE on the device, frozen, checked against its own metadata.

    Raises:
        ConfigError: Where it was made for another place or another width.
        UserError: Where its files are missing, damaged, or others than when the run was planned.
    """
    _check_as_planned(choice)
    loaded = (
        _Loaded(IdentitySAE(), {"d_in": model.d_model, "d_sae": model.d_model})
        if config.family is SAEFamily.identity
        else _through_sae_lens(config, choice, str(device))
    )
    name = _name(choice)
    _check_place(loaded, choice)
    field = "sae.path" if choice.path else "sae.id"
    check_width(loaded.values.get("d_in"), model, field=field, name=name)
    sae = loaded.sae.to(device).requires_grad_(False).eval()
    digest = _digest(sae)
    metadata = loaded.values.get("metadata") or {}
    processing = metadata.get("model_from_pretrained_kwargs")
    if processing:
        log.warning(
            "%s was trained on a model loaded with %s; here the model is as it is", name, processing
        )
    return LoadedSAE(
        hookpoint=str(Place.of(choice)),
        excludes_special_tokens=bool(metadata.get("exclude_special_tokens")),
        sae=_with_adapter(multiplied(sae, config.sparse), choice, device),  # pyright: ignore[reportArgumentType]
        description=describe(
            config, choice, loaded.values.get("architecture", "identity"), loaded.values.get("d_sae")
        )
        | {"sha256": digest},
    )


def _with_adapter(sae: Coder, choice: SAEChoice, device: torch.device) -> Coder:
    if choice.adapter is None:
        return sae
    folder = Path(choice.adapter.path)
    return AdaptedCoder(sae, output_adapter.load(folder, device)).eval()


def describe(
    config: SAEConfig, choice: SAEChoice, architecture: str, width: int | None
) -> dict[str, Any]:
    """What identifies an SAE, for the record; its weights' hash comes on top."""
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
    }


def fetch(config: SAEConfig, choice: SAEChoice) -> str | None:
    """Downloads an SAE of the registry, so that it can be loaded without a network.

    Returns:
        The commit of its repository that was fetched.

    Raises:
        ConfigError: Where it was made for another place.
        UserError: Where it cannot be found or fetched.
    """
    _check_place(_through_sae_lens(config, choice, "cpu"), choice)
    return _commit(choice)


def _check_place(loaded: "_Loaded", choice: SAEChoice) -> None:
    settled(trained_at(loaded.values, choice.block), choice.block, choice.hook, _name(choice))


def _name(choice: SAEChoice) -> str:
    return choice.id or choice.path or "identity"


def _commit(choice: SAEChoice) -> str | None:
    return hub.cached_commit(repository_of(choice.release)) if choice.release else None


def _check_as_planned(choice: SAEChoice) -> None:
    """Refuses an SAE that has been exchanged under its name since the run was planned.

    Raises:
        UserError: Names it.
    """
    if choice.commit is not None and _commit(choice) != choice.commit:
        raise UserError(
            f"sae.release = {choice.release!r}: the cache holds another commit of it than when this run "
            f"was planned ({choice.commit})"
        )
    if choice.path is not None and choice.sha256 not in (None, weights_digest(Path(choice.path))):
        raise UserError(
            f"sae.path = {choice.path!r}: another SAE is there than when this run was planned"
        )
    if choice.adapter is not None:
        from_run.check_as_planned(choice.adapter)


def keeps_special_tokens(config: SAEConfig, saes: Sequence[LoadedSAE]) -> bool:
    """Whether positions holding BOS or EOS keep their activation: as asked, or as the SAEs need it.

    An SAE that was not trained on these positions cannot reconstruct them: Gemma Scope's, and those
    whose own config says that special tokens were left out.
    """
    if config.keep_special_tokens is not None:
        return config.keep_special_tokens
    # A new one is not either: residuals at BOS are so large that it would learn little else.
    without = (SAEFamily.gemma_scope, SAEFamily.new)
    return config.family in without or any(one.excludes_special_tokens for one in saes)


def splices(config: SAEConfig, saes: Sequence[LoadedSAE]) -> tuple[Splice, ...]:
    """The SAEs of a run, in the order of their places."""
    keeps = keeps_special_tokens(config, saes)
    return tuple(
        Splice(choice.block, loaded.sae, keeps, choice.hook)
        for choice, loaded in zip(config.used, saes, strict=True)
    )


@dataclass(frozen=True)
class _Loaded:
    sae: nn.Module
    values: dict[str, Any]


def _through_sae_lens(config: SAEConfig, choice: SAEChoice, device: str) -> _Loaded:
    dtype = config.dtype.name
    with quiet():
        if choice.release is not None and choice.id is not None:
            with hub.explained("sae.release", choice.release):
                sae = SAE.from_pretrained(choice.release, choice.id, device=device, dtype=dtype)
        else:
            path = choice.path or str(EMBEDDED_SAES / str(choice.id))
            with hub.explained("sae.path", path):
                try:
                    sae = SAE.load_from_disk(path, device=device, dtype=dtype)
                except (OSError, KeyError, RuntimeError) as error:
                    raise UserError(f"sae.path = {path!r} cannot be loaded: {error}") from error
    return _Loaded(sae, sae.cfg.to_dict() | {"architecture": sae.cfg.architecture()})


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings about how the SAE's model was loaded; `load` says that itself, once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*model_from_pretrained_kwargs.*")
        yield


def _digest(sae: nn.Module) -> str:
    """SHA-256 of the weights as loaded, by name."""
    digest = hashlib.sha256()
    for name, weight in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class SAEs:
    """SAEs that are loaded, each once for all runs that use it.

    Args:
        model: What they must fit.
        device: Where they are to be.
    """

    def __init__(self, model: Dimensions, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._loaded: dict[str, LoadedSAE] = {}

    def of(self, config: SAEConfig) -> list[LoadedSAE]:
        """Those that a run uses, by block; none where it makes new ones."""
        if config.family is SAEFamily.new:
            return []
        return [self._one(config, choice) for choice in config.used]

    def _one(self, config: SAEConfig, choice: SAEChoice) -> LoadedSAE:
        first = replace(choice, block=min([choice.block, *choice.group]))  # one SAE for a whole group
        key = repr((config.family, config.dtype, config.sparse, first))
        if key not in self._loaded:
            self._loaded[key] = load(config, first, self._model, self._device)
        return self._loaded[key].at(choice)
