"""What a finished run has made, as another run begins with it. Imports no torch."""

from dataclasses import replace
from pathlib import Path

from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name
from sae_lora.common.files import sha256
from sae_lora.config.enums import Method, SAEFamily
from sae_lora.config.identity import ADAPTING, TRAINING_SAES
from sae_lora.config.lora_targets import canonical_alpha, canonical_blocks
from sae_lora.config.schema import Adapters, Config, LoRAConfig, SAEChoice, SAEConfig, as_list
from sae_lora.config.serialize import load
from sae_lora.models.dimensions import Dimensions
from sae_lora.models.hookpoints import Place
from sae_lora.records.folder import RunFolder
from sae_lora.saes.metadata import read_folder

_MAPS = (Method.linear_adapter, Method.mlp_adapter)


def begun(config: Config, model: Dimensions) -> Config:
    """The config with what `init` stands for: SAEs, maps on what they put back, or adapters.

    Args:
        config: With `init`.
        model: The model that it is about.

    Raises:
        ConfigError: Where that is no finished run of this model, or its result does not fit.
        UserError: Where its files cannot be read.
    """
    assert config.init is not None
    folder = RunFolder(Path(config.init).expanduser())
    if not folder.is_finished:
        raise _no_result(config.init, folder)
    before = load(folder.config.read_text())
    same = before.model.name == config.model.name and before.model.revision == config.model.revision
    if not same:
        because = f"that one is of {before.model.name}"
        raise ConfigError("init", config.init, f"a run of {config.model.name}", because=because)
    check_goes_on(config, before)
    blocks = [choice.block for choice in before.sae.used]
    if config.layer.index is not None and sorted(as_list(config.layer.index)) != blocks:
        allowed = "null with init, whose SAEs stay where they are"
        raise ConfigError("layer.index", config.layer.index, allowed, nearest="null")
    if before.method.kind in ADAPTING:
        lora = _with_adapters(config.lora, before, folder)
        return replace(config, lora=lora, sae=trained_saes(before, folder, model))
    return replace(config, sae=trained_saes(before, folder, model, config.init_at))


def trained_saes(config: Config, folder: RunFolder, model: Dimensions, at: float = 1.0) -> SAEConfig:
    """The SAEs of a finished run as it has left them: its own, or with maps on what they put back.

    Args:
        config: Of the run.
        folder: Its folder.
        model: The model that it is about.
        at: Share of its training after which they are wanted.

    Raises:
        UserError: Where its files cannot be read.
    """
    sae = config.sae
    made = folder.sae if at == 1 else folder.sae_at / f"{at:g}"
    if config.method.kind in _MAPS:
        return replace(sae, used=[_with_map(choice, folder) for choice in sae.used])
    if config.method.kind in TRAINING_SAES:
        used = [_trained(choice, made, model) for choice in sae.used]
        request = {"width": None, "l0": None, "release": None, "id": None}
        path = str(made.resolve() / f"blocks.{{block}}.hook_{sae.used[0].hook.name}")
        return replace(sae, family=SAEFamily.disk, path=path, used=used, **request)
    return sae


def check_as_planned(adapters: Adapters) -> None:
    """Refuses trained weights that are others than when the run was planned.

    Raises:
        UserError: Names them.
    """
    if _weights(Path(adapters.path)).sha256 != adapters.sha256:
        raise UserError(f"init: {adapters.path} holds other weights than when this run was planned")


def _no_result(init: str, folder: RunFolder) -> ConfigError:
    """Why the folder is none to begin with."""
    beside = folder.path.parent
    others = [path.parent.name for path in beside.glob("*/summary.json")]
    near = nearest_name(folder.path.name, others)
    state = "is not finished" if folder.config.exists() else "is no run"
    return ConfigError(
        "init",
        init,
        "the folder of a finished run, outputs/<sweep>/<run>",
        nearest=beside / near if near else None,
        because=f"it {state}",
    )


def check_goes_on(config: Config, before: Config) -> None:
    """Refuses a result that the method cannot begin with, whether or not it is there yet.

    Args:
        config: Of the run that would begin with it.
        before: Of the run whose result it is.

    Raises:
        ConfigError: Names `init`, or `init_at` where nothing is kept then.
    """
    _check_method(config, before)
    if config.init_at == 1:
        return
    if before.method.kind not in TRAINING_SAES:
        allowed = f"1: a run of method={before.method.kind.name} keeps nothing on its way"
        raise ConfigError("init_at", config.init_at, allowed, nearest=1)
    kept = sorted({*before.method.checkpoints, 1.0})
    if config.init_at not in kept:
        nearest = min(kept, key=lambda one: abs(one - config.init_at))
        allowed = f"one of {listed(f'{one:g}' for one in kept)}: method.checkpoints of that run, or 1"
        raise ConfigError("init_at", config.init_at, allowed, nearest=f"{nearest:g}")


def _check_method(config: Config, before: Config) -> None:
    """Refuses a result that the method cannot begin with."""
    kind, earlier = config.method.kind, before.method.kind
    if kind is Method.sae:
        allowed = "null with method=sae, whose SAE is new"
    elif earlier in ADAPTING and kind not in ADAPTING:
        allowed = "a run that has trained an SAE, or a map on what it puts back"
    elif earlier in _MAPS and kind in (*_MAPS, *TRAINING_SAES):
        allowed = "a run that has trained an SAE"
    else:
        return
    because = f"with method={kind.name} it cannot be one of method={earlier.name}"
    raise ConfigError("init", config.init, allowed, because=because)


def _with_adapters(lora: LoRAConfig, before: Config, folder: RunFolder) -> LoRAConfig:
    """The adapters' config, with what they begin with.

    Raises:
        ConfigError: Where these are others.
    """
    wanted = replace(lora, alpha=canonical_alpha(lora), blocks=canonical_blocks(lora.blocks))
    for name in ("rank", "alpha", "rank_stabilised", "dora", "targets", "blocks"):
        value, needed = getattr(wanted, name), getattr(before.lora, name)
        if value != needed:
            raise ConfigError(f"lora.{name}", value, f"what {folder.path.name} has", nearest=needed)
    return replace(lora, begun=_weights(folder.adapter))


def _with_map(choice: SAEChoice, folder: RunFolder) -> SAEChoice:
    return replace(choice, adapter=_weights(folder.output_adapter / str(Place.of(choice))))


def _trained(choice: SAEChoice, made: Path, model: Dimensions) -> SAEChoice:
    path = made / str(Place(min([*choice.group, choice.block]), choice.hook))
    return replace(
        read_folder(str(path), choice.block, choice.hook, model), l0=choice.l0, group=choice.group
    )


def _weights(folder: Path) -> Adapters:
    """The one file of weights in a folder.

    Raises:
        UserError: Where it cannot be read.
    """
    try:
        (file,) = folder.glob("*.safetensors")
        return Adapters(str(folder.resolve()), sha256(file))
    except (OSError, ValueError) as error:
        raise UserError(f"init: {folder} holds no file of weights that can be read") from error
