"""The result of a finished run, as another run begins with it. Imports no torch."""

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
from sae_lora.records.folder import RunFolder
from sae_lora.saes.metadata import read_folder

_MAPS = (Method.linear_adapter, Method.mlp_adapter)


def begun(config: Config, model: Dimensions) -> Config:
    """The config with the result of the run that `init` names: SAEs, maps on them, or adapters.

    Raises:
        ConfigError: Where that is no finished run of this model, or its result does not fit.
        UserError: Where its files cannot be read.
    """
    assert config.init is not None
    folder = RunFolder(Path(config.init).expanduser())
    if not folder.is_finished:
        raise _no_result(config.init, folder)
    before = load(folder.config.read_text())
    if (before.model.name, before.model.revision) != (config.model.name, config.model.revision):
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
    """The SAEs that a finished run has left: trained, or with trained maps on them.

    `at` is the share of its training after which they are taken.

    Raises:
        UserError: Where its files cannot be read.
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
    made = folder.sae if at == 1 else folder.sae_at / f"{at:g}"
    used = []
    for choice in sae.used:
        path = made / str(Place(min([*choice.group, choice.block]), choice.hook))
        trained = read_folder(str(path), choice.block, choice.hook, model)
        used.append(replace(trained, l0=choice.l0, group=choice.group))
    request = {"width": None, "l0": None, "release": None, "id": None}
    pattern = str(made.resolve() / f"blocks.{{block}}.hook_{sae.used[0].hook.name}")
    return replace(sae, family=SAEFamily.disk, path=pattern, used=used, **request)


def check_as_planned(adapters: Adapters) -> None:
    """Refuse trained weights that have changed since the run was planned."""
    if _weights(Path(adapters.path)).sha256 != adapters.sha256:
        raise UserError(f"init: {adapters.path} holds other weights than when this run was planned")


def _no_result(init: str, folder: RunFolder) -> ConfigError:
    sweep = folder.path.parent
    finished = [path.parent.name for path in sweep.glob("*/summary.json")]
    near = nearest_name(folder.path.name, finished)
    return ConfigError(
        "init",
        init,
        "the folder of a finished run, outputs/<sweep>/<run>",
        nearest=sweep / near if near else None,
        because="it is not finished" if folder.config.exists() else "it is no run",
    )


def check_goes_on(config: Config, before: Config) -> None:
    """Refuse a result of `before` that the method of `config` cannot begin with; it need not exist yet.

    Raises:
        ConfigError: Names `init`, or `init_at` where the run keeps nothing at that share.
    """
    kind, earlier = config.method.kind, before.method.kind
    allowed = None
    if kind is Method.sae:
        allowed = "null with method=sae, whose SAE is new"
    elif earlier in ADAPTING and kind not in ADAPTING:
        allowed = "a run that has trained an SAE, or a map on what it puts back"
    elif earlier in _MAPS and kind in (*_MAPS, *TRAINING_SAES):
        allowed = "a run that has trained an SAE"
    if allowed is not None:
        because = f"with method={kind.name} it cannot be one of method={earlier.name}"
        raise ConfigError("init", config.init, allowed, because=because)
    if config.init_at == 1:
        return
    if earlier not in TRAINING_SAES:
        allowed = f"1: a run of method={earlier.name} keeps nothing on its way"
        raise ConfigError("init_at", config.init_at, allowed, nearest=1)
    kept = sorted({*before.method.checkpoints, 1.0})
    if config.init_at not in kept:
        nearest = min(kept, key=lambda share: abs(share - config.init_at))
        shares = listed(f"{share:g}" for share in kept)
        allowed = f"one of {shares}: method.checkpoints of that run, or 1"
        raise ConfigError("init_at", config.init_at, allowed, nearest=f"{nearest:g}")


def _with_adapters(lora: LoRAConfig, before: Config, folder: RunFolder) -> LoRAConfig:
    """The adapters' config, with the weights that they begin with.

    Raises:
        ConfigError: Where those belong to other adapters.
    """
    wanted = replace(lora, alpha=canonical_alpha(lora), blocks=canonical_blocks(lora.blocks))
    for name in ("rank", "alpha", "rank_stabilised", "dora", "targets", "blocks"):
        value, needed = getattr(wanted, name), getattr(before.lora, name)
        if value != needed:
            raise ConfigError(f"lora.{name}", value, f"what {folder.path.name} has", nearest=needed)
    return replace(lora, begun=_weights(folder.adapter))


def _weights(folder: Path) -> Adapters:
    """The one file of weights in a folder."""
    try:
        (file,) = folder.glob("*.safetensors")
        return Adapters(str(folder.resolve()), sha256(file))
    except (OSError, ValueError) as error:
        raise UserError(f"init: {folder} holds no file of weights that can be read") from error
