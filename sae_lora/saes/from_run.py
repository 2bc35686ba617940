"""The result of a finished run as the starting point of another run (`init`). Imports no torch."""

from dataclasses import replace
from pathlib import Path

from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name
from sae_lora.common.files import sha256
from sae_lora.config.enums import Method, SAEFamily
from sae_lora.config.identity import ADAPTING, TRAINING_SAES
from sae_lora.config.lora_targets import canonical_alpha, canonical_blocks
from sae_lora.config.schema import Adapters, Config, LoRAConfig, SAEConfig, as_list
from sae_lora.config.serialize import load
from sae_lora.models.dimensions import Dimensions
from sae_lora.models.hookpoints import Place
from sae_lora.records.damage import damage, damage_of_weights
from sae_lora.records.folder import RunFolder, is_run
from sae_lora.saes.metadata import read_folder

_MAPS = (Method.linear_adapter, Method.mlp_adapter)


def begun(config: Config, model: Dimensions) -> Config:
    """The config with the result of the run that `init` names: SAEs, maps on their output, or adapters.

    Raises:
        ConfigError: If `init` is not a finished run of this model, or its result does not fit.
        UserError: If its files cannot be read.
    """
    assert config.init is not None
    folder = RunFolder(Path(config.init).expanduser())
    if not is_run(folder.path):
        raise _no_result(config.init, folder)
    if (cause := damage(folder)) is not None:
        raise UserError(f"init = {config.init!r} is damaged: {cause}")
    if not folder.is_finished:
        raise _no_result(config.init, folder)
    if (cause := damage_of_weights(folder, config.init_at)) is not None:
        raise UserError(f"init = {config.init!r} is damaged: {cause}")
    earlier = load(folder.config.read_text())
    if (earlier.model.name, earlier.model.revision) != (config.model.name, config.model.revision):
        because = f"it is a run of {earlier.model.name}"
        raise ConfigError("init", config.init, f"a run of {config.model.name}", because=because)
    check_goes_on(config, earlier)
    blocks = [choice.block for choice in earlier.sae.used]
    if config.layer.index is not None and sorted(as_list(config.layer.index)) != blocks:
        allowed = "null with init: the SAEs of that run keep their blocks"
        raise ConfigError("layer.index", config.layer.index, allowed, nearest="null")
    if earlier.method.kind in ADAPTING:
        lora = _with_adapters(config.lora, earlier, folder)
        return replace(config, lora=lora, sae=trained_saes(earlier, folder, model))
    return replace(config, sae=trained_saes(earlier, folder, model, config.init_at))


def trained_saes(config: Config, folder: RunFolder, model: Dimensions, at: float = 1.0) -> SAEConfig:
    """The SAEs of a finished run: trained, or with trained maps on their output.

    Args:
        config, folder, model: The run, its folder, and the size of its model.
        at: Share of its training after which the SAEs are taken.

    Raises:
        UserError: If its files cannot be read.
    """
    sae = config.sae
    if config.method.kind in _MAPS:
        used = [
            replace(choice, adapter=_weights(folder.output_adapter / str(Place.of(choice))))
            for choice in sae.used
        ]
        return replace(sae, used=used)
    if config.method.kind not in TRAINING_SAES:
        return sae
    saes = folder.sae if at == 1 else folder.sae_at / f"{at:g}"
    used = []
    for choice in sae.used:
        path = saes / str(Place(min([*choice.group, choice.block]), choice.hook))
        trained = read_folder(str(path), choice.block, choice.hook, model)
        used.append(replace(trained, l0=choice.l0, group=choice.group))
    request = {"width": None, "l0": None, "release": None, "id": None}
    pattern = str(saes.resolve() / f"blocks.{{block}}.hook_{sae.used[0].hook.name}")
    return replace(sae, family=SAEFamily.disk, path=pattern, used=used, **request)


def check_as_planned(adapters: Adapters) -> None:
    """Refuse trained weights that have changed since the run was planned."""
    if _weights(Path(adapters.path)).sha256 != adapters.sha256:
        raise UserError(f"init: the weights in {adapters.path} have changed since this run was planned")


def _no_result(init: str, folder: RunFolder) -> ConfigError:
    if inside := sorted(folder.path.glob("*/summary.json")):
        allowed = "the folder of one run in it"
        because = "it is the folder of a sweep"
        return ConfigError("init", init, allowed, nearest=inside[0].parent, because=because)
    sweep = folder.path.parent
    finished = [path.parent.name for path in sweep.glob("*/summary.json")]
    near = nearest_name(folder.path.name, finished)
    return ConfigError(
        "init",
        init,
        "the folder of a finished run, outputs/<sweep>/<run>",
        nearest=sweep / near if near else None,
        because="it is not finished" if folder.config.exists() else "it is not a run folder",
    )


def check_goes_on(config: Config, earlier: Config) -> None:
    """Refuse a run `earlier` whose result the method of `config` cannot start from.

    The result need not exist yet.

    Raises:
        ConfigError: If the methods do not fit (`init`), or that run saves nothing at this share of its
            training (`init_at`).
    """
    kind, earlier_kind = config.method.kind, earlier.method.kind
    allowed = None
    if kind is Method.sae:
        allowed = "null with method=sae, which trains a new SAE"
    elif earlier_kind in ADAPTING and kind not in ADAPTING:
        allowed = "a run that trained an SAE, or a map on its output"
    elif earlier_kind in _MAPS and kind in (*_MAPS, *TRAINING_SAES):
        allowed = "a run that trained an SAE"
    if allowed is not None:
        because = f"method={kind.name} cannot start from a run of method={earlier_kind.name}"
        raise ConfigError("init", config.init, allowed, because=because)
    if config.init_at == 1:
        return
    if earlier_kind not in TRAINING_SAES:
        allowed = f"1: a run of method={earlier_kind.name} saves no intermediate results"
        raise ConfigError("init_at", config.init_at, allowed, nearest=1)
    saved = sorted({*earlier.method.checkpoints, 1.0})
    if config.init_at not in saved:
        nearest = min(saved, key=lambda share: abs(share - config.init_at))
        shares = listed(f"{share:g}" for share in saved)
        allowed = f"one of {shares} (method.checkpoints of that run, and 1)"
        raise ConfigError("init_at", config.init_at, allowed, nearest=f"{nearest:g}")


def _with_adapters(lora: LoRAConfig, earlier: Config, folder: RunFolder) -> LoRAConfig:
    """The config of the adapters, with their initial weights.

    Raises:
        ConfigError: If these weights belong to adapters of another kind.
    """
    canonical = replace(lora, alpha=canonical_alpha(lora), blocks=canonical_blocks(lora.blocks))
    for name in ("rank", "alpha", "rank_stabilised", "dora", "targets", "blocks"):
        value, needed = getattr(canonical, name), getattr(earlier.lora, name)
        if value != needed:
            allowed = f"the value of {folder.path.name}, whose adapters are loaded"
            raise ConfigError(f"lora.{name}", value, allowed, nearest=needed)
    return replace(lora, begun=_weights(folder.adapter))


def _weights(folder: Path) -> Adapters:
    """The only weights file in a folder."""
    try:
        (file,) = folder.glob("*.safetensors")
        return Adapters(str(folder.resolve()), sha256(file))
    except (OSError, ValueError) as error:
        raise UserError(f"init: {folder} has no readable weights file (*.safetensors)") from error
