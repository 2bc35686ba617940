"""Frozen SAEs, loaded through sae-lens, and their descriptions."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import (
    get_conversion_loader_name,
    get_sae_lens_config_from_hf,
)
from sae_lens.loading.pretrained_saes_directory import (
    get_config_overrides,
    get_repo_id_and_folder_name,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from sae_lora.common import hub
from sae_lora.common.console import Report, no_report
from sae_lora.common.errors import ConfigError, UserError, is_out_of_memory
from sae_lora.config.enums import SAEFamily
from sae_lora.config.schema import SAEChoice, SAEConfig
from sae_lora.embedded import SAES as EMBEDDED_SAES
from sae_lora.models.dimensions import Dimensions
from sae_lora.models.hookpoints import Place
from sae_lora.saes import from_run, metadata, output_adapter, probe, sparse, transcoders
from sae_lora.saes.formats import converters
from sae_lora.saes.formats import folder as folders
from sae_lora.saes.formats.weights import check_weights, damaged
from sae_lora.saes.metadata import EXCLUDES_FIRST, check_fits, stated, stated_by
from sae_lora.saes.output_adapter import AdaptedCoder
from sae_lora.saes.places import reads_of, settled, trained_at
from sae_lora.saes.pretrained_table import repository_of
from sae_lora.saes.sparse import multiplied
from sae_lora.splice.hooks import Coder, Splice
from sae_lora.splice.positions import Special


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
    stated: dict[str, Any] = field(default_factory=dict)
    """Its metadata, under today's names of SAELens."""


def load(config: SAEConfig, choice: SAEChoice, model: Dimensions, device: torch.device) -> LoadedSAE:
    """The chosen SAE on the device, frozen, checked against its metadata.

    Raises:
        ConfigError: If it was trained at another place, its input has another width, its weights are no
            numbers, or it does not reconstruct tokens one by one.
        UserError: If its files are missing or damaged, or have changed since the run was planned.
    """
    _check_as_planned(choice)
    if config.family is SAEFamily.identity:
        module: nn.Module = IdentitySAE()
        values = {"architecture": "identity", "d_in": model.d_model, "d_sae": model.d_model}
        about: dict[str, Any] = {}
    else:
        module, values, about = _through_sae_lens(config, choice, str(device))
    key, name = _named(choice)
    check_fits(stated(values), model, key, name)
    module = module.to(device).requires_grad_(False).eval()
    width, digest = values.get("d_sae"), _digest(module)
    description = describe(config, choice, values["architecture"], width, digest)
    used = transcoders.with_skip(multiplied(module, config.sparse), module)
    sae: Coder = used  # pyright: ignore[reportAssignmentType]
    if choice.adapter is not None:
        adapter = output_adapter.load(Path(choice.adapter.path), device)
        sae = AdaptedCoder(sae, adapter).eval()
    metadata = values.get("metadata") or {}
    excluded = metadata.get("exclude_special_tokens")
    return LoadedSAE(
        sae,
        description,
        tuple(excluded) if isinstance(excluded, list) else bool(excluded),
        bool(metadata.get(EXCLUDES_FIRST)),
        about,
    )


def _named(choice: SAEChoice) -> tuple[str, str]:
    """The key that names an SAE, and its value, for messages."""
    return "sae.path" if choice.path else "sae.id", choice.id or choice.path or "identity"


def describe(
    config: SAEConfig,
    choice: SAEChoice,
    architecture: str,
    width: int | None,
    sha256: str | None = None,
) -> dict[str, Any]:
    """Values that identify an SAE, for the summary; `sha256` is that of its weights, if they exist."""
    reads = {} if choice.reads is None else {"reads": choice.reads.name}
    return reads | {
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


def write_copy(config: SAEConfig, choice: SAEChoice, folder: Path) -> str:
    """Write an SAE, as the run uses it, into a new folder in sae-lens's format.

    Returns:
        The SHA-256 of its weights, as in `LoadedSAE.description`.

    Raises:
        UserError: If its files are missing or damaged, or have changed since the run was planned, or if
            sae-lens does not load the same SAE again.
    """
    _check_as_planned(choice)
    module, _, _ = _through_sae_lens(config, choice, "cpu")
    module.save_model(folder)  # pyright: ignore[reportCallIssue]
    copy, _, _ = _through_sae_lens(config, replace(choice, path=str(folder)), "cpu")
    if (digest := _digest(module)) != _digest(copy):
        raise UserError(f"sae.path = {choice.path!r}: sae-lens cannot save this SAE and load it again")
    return digest


def fetch(config: SAEConfig, choice: SAEChoice) -> tuple[str | None, dict[str, Any]]:
    """Download an SAE, so that it loads without a network, and check it.

    Returns:
        The commit of its repository, and what its metadata states.

    Raises:
        ConfigError: If it was trained at another place, or it cannot be used.
        UserError: If it does not exist, is damaged, or cannot be downloaded.
    """
    _, _, about = _through_sae_lens(config, choice, "cpu")
    return _commit(choice), about


def _commit(choice: SAEChoice) -> str | None:
    return hub.cached_commit(repository_of(choice.release)) if choice.release else None


def _check_as_planned(choice: SAEChoice) -> None:
    """Refuse an SAE whose files have changed since the run was planned."""
    if choice.commit is not None and _commit(choice) != choice.commit:
        raise UserError(
            f"sae.release = {choice.release!r} has changed since this run was planned: the cached "
            f"commit is not {choice.commit}"
        )
    if choice.path is not None and choice.sha256 not in (
        None,
        folders.read(choice.path).digest(),
    ):
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
        Splice(
            choice.block,
            loaded.sae,
            choice.hook,
            special_of(config, loaded, special_ids),
            config.tf32,
            choice.reads,
        )
        for choice, loaded in zip(config.used, saes, strict=True)
    )


def _through_sae_lens(
    config: SAEConfig, choice: SAEChoice, device: str
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Load an SAE and check that a splice can use it.

    Returns:
        The SAE, the values of its config, and what its own metadata states, without the defaults that
        SAELens adds to the config.

    Raises:
        ConfigError: If its config names another place than `choice`, or the SAE cannot be used.
        UserError: If its files are missing or damaged, or cannot be downloaded.
    """
    key, name = _named(choice)
    if choice.release is not None and choice.id is not None:
        sae, about = _from_release(choice.release, choice.id, config, device)
    else:
        sae = _from_folder(choice.path or str(EMBEDDED_SAES / str(choice.id)), config, device)
        about = stated_by(choice)
    values = sae.cfg.to_dict() | {"architecture": sae.cfg.architecture()}
    # SAELens may have folded a normalisation into the weights.
    now = stated(values) | about | {"normalize_activations": values["normalize_activations"]}
    metadata.check(now, key, name)
    settled(trained_at(now, key, name, choice.block), choice.block, choice.hook, name)
    reads = reads_of(now, choice.reads, key, name)
    if reads is not choice.reads:  # the plan did not know that it is a transcoder
        because = f"{name} is a transcoder"
        raise ConfigError("layer.reads", None, "what it reads", reads and reads.name, because)
    _keep_statistics(sae)
    probe.check_weights(sae.state_dict(), values, key, name)
    probe.check_coder(sae, sae.cfg.d_in, key, name)
    return sae, values, about


def _from_release(
    release: str, identifier: str, config: SAEConfig, device: str
) -> tuple[SAE[Any], dict[str, Any]]:
    """Load an SAE of a release; SAELens folds the factor of its input if its table has it.

    Returns:
        The SAE, and what its metadata states.

    Raises:
        UserError: If it does not exist, is damaged, or cannot be downloaded.
    """
    try:
        with quiet(), hub.explained("sae.release", release):
            is_native = get_conversion_loader_name(release) == "sae_lens"
            sae = SAE.from_pretrained(
                release,
                identifier,
                device=device,
                dtype=config.dtype.name,
                converter=converters.load_from_hub if is_native else None,
            )
            if not is_native:  # SAELens states what is known
                return sae, stated(sae.cfg.to_dict())
            overrides = get_config_overrides(release, identifier)
            place = get_repo_id_and_folder_name(release, identifier)
            return sae, stated(get_sae_lens_config_from_hf(*place, cfg_overrides=overrides))
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"sae.id = {identifier!r} of {release} cannot be loaded by SAELens: {_line(error)}"
        ) from error


def _from_folder(path: str, config: SAEConfig, device: str) -> SAE[Any]:
    """Load the SAE in a folder, and fold the factor of its input if the folder states it.

    Raises:
        ConfigError: If its config states something that cannot be used.
        UserError: If a file is missing or damaged.
    """
    folder = folders.read(path)
    metadata.check(stated(folder.values), "sae.path", path, folder.format.config)
    metadata.check_complete(folder.values, path, folder.format.config)
    check_weights(folder)
    try:
        with quiet():
            sae = SAE.load_from_disk(
                path, device=device, dtype=config.dtype.name, converter=converters.load
            )
    except SafetensorError as error:
        raise damaged(folder) from error
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"sae.path = {path!r} cannot be loaded: {folder.weights}: {_line(error)}"
        ) from error
    if folder.factor is not None:
        sae.fold_activation_norm_scaling_factor(folder.factor)
    return sae


def _line(error: Exception) -> str:
    """An error of a library in one line, with its class: the text of a `KeyError` is only the key."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _keep_statistics(sae: Any) -> None:
    """Let an SAE decode several times after one `encode`.

    An SAE that normalises each token keeps the statistics of its last input to undo this in `decode`;
    SAELens then deletes them. No gradient flows through the statistics that are kept.
    """
    denormalise = sae.run_time_activation_norm_fn_out

    def keeping(recon: Tensor) -> Tensor:
        before = vars(sae).copy()
        output = denormalise(recon)
        for name in before.keys() - vars(sae).keys():
            if before[name].shape[:-1] != recon.shape[:-1]:
                raise RuntimeError("these latents are not those of the SAE's last input")
            setattr(sae, name, before[name].detach())
        return output

    sae.run_time_activation_norm_fn_out = keeping


@contextmanager
def quiet() -> Iterator[None]:
    """Silence sae-lens's warnings about how the SAE's model was loaded: the plan has a note."""
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


LOADING = "loading SAEs"
"""The stage in which `SAEs` loads."""


class SAEs:
    """The SAEs of several runs, for one model on one device. Each SAE is loaded only once."""

    def __init__(self, model: Dimensions, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._loaded: dict[str, LoadedSAE] = {}

    def of(self, config: SAEConfig, report: Report = no_report) -> list[LoadedSAE]:
        """The SAEs that a run uses, in the order of `config.used`; empty if it trains new SAEs.

        `report` is called with the SAEs that are loaded.
        """
        if config.family is SAEFamily.new:
            return []
        saes = []
        for number, choice in enumerate(config.used):
            report(LOADING, number, len(config.used))
            # Blocks of a group share an SAE, which is loaded as that of the first block.
            first = replace(choice, block=min([choice.block, *choice.group]))
            key = repr((config.family, config.dtype, config.sparse, first))
            if key not in self._loaded:
                self._loaded[key] = load(config, first, self._model, self._device)
            loaded, hookpoint = self._loaded[key], str(Place.of(choice))
            description = loaded.description | {"block": choice.block, "hookpoint": hookpoint}
            saes.append(replace(loaded, description=description))
        return saes

    def divide(self, processes: int) -> None:
        """Divide the loaded SAEs among processes; all of them must call this, with the same SAEs."""
        for _, loaded in sorted(self._loaded.items()):
            sparse.divide(loaded.sae, self._device, processes)  # pyright: ignore[reportArgumentType]
