"""The metadata of SAEs: what is done about each key, and the place of training. Imports no torch."""

import enum
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

from sae_lora.common.errors import ConfigError, listed
from sae_lora.config.enums import Hook, Reads
from sae_lora.config.schema import Config, SAEChoice
from sae_lora.embedded import SAES as EMBEDDED_SAES
from sae_lora.models.dimensions import Dimensions
from sae_lora.models.hookpoints import Place
from sae_lora.saes.formats.folder import SCALER, UNUSED_FACTOR, read
from sae_lora.saes.formats.weights import FLOATS, check_weights
from sae_lora.saes.places import TRANSCODERS, is_transcoder, reads_of, settled, trained_at
from sae_lora.saes.pretrained_table import converter_of, model_of, same_model

Stated = Mapping[str, Any]
"""Values in an SAE's config and metadata, by the key of today's SAELens."""


class Use(enum.Enum):
    """The treatment of a key."""

    applied = "SAELens or the splice computes with it"
    checked = "compared with the request and the model; what does not fit is refused"
    noted = "compared with the run; a difference is a note in the plan, the summary and the report"
    informative = "not used"


class Key(NamedTuple):
    """A key of an SAE's metadata."""

    use: Use
    type: Any = object
    """The type of its value: a class, a list of a class, or a union of them."""
    allowed: tuple[Any, ...] | None = None
    """The values that can be used; `None` for any value."""
    because: str = ""
    """Why other values are refused."""
    least: float | None = None
    """The smallest number that can be used."""


_NUMBER = int | float
EXCLUDES_FIRST = "exclude_first_position"
"""Our key in an SAE's metadata: true if it was not trained on the first position of sequences."""
_OF_A_HEAD = "it was trained on a single attention head"
KEYS: dict[str, Key] = {
    "architecture": Key(
        Use.applied,
        str,
        ("standard", "gated", "jumprelu", "topk", "abstopk", "matching_pursuit", *TRANSCODERS),
        "this is no SAE or transcoder of single tokens that SAELens knows",
    ),
    "normalize_activations": Key(
        Use.applied,
        str,
        ("none", "layer_norm", "constant_norm_rescale"),
        "the weights do not include the factor or the matrix of this normalisation",
    ),
    "reshape_activations": Key(
        Use.applied, str, ("none",), "it was trained on another activation than the output of one block"
    ),
    "activation_fn": Key(Use.applied, str, ("relu", "topk"), "SAELens would compute ReLU instead"),
    "activation_fn_kwargs": Key(Use.applied, dict),
    "activation_fn_kwargs.k": Key(Use.applied, int, least=1),
    "activation_fn_kwargs.signed": Key(
        Use.applied, bool, (False,), "SAELens would set negative latents to zero"
    ),
    "finetuning_scaling_factor": Key(Use.applied, bool),
    "apply_b_dec_to_input": Key(Use.applied, bool),
    "rescale_acts_by_decoder_norm": Key(Use.applied, bool),
    "k": Key(Use.applied, int, least=1),
    "residual_threshold": Key(Use.applied, _NUMBER, least=0),
    "max_iterations": Key(Use.applied, int, least=1),
    "stop_on_duplicate_support": Key(Use.applied, bool),
    "exclude_special_tokens": Key(Use.applied, bool | list[int]),
    EXCLUDES_FIRST: Key(Use.applied, bool),
    "group_blocks": Key(Use.applied, list[int]),
    "d_in": Key(Use.checked, int, least=1),
    "d_sae": Key(Use.checked, int, least=1),
    "d_out": Key(Use.checked, int, least=1),
    "hook_name": Key(Use.checked, str),
    "hook_name_out": Key(Use.checked, str),
    "hook_head_index": Key(Use.checked, allowed=(), because=_OF_A_HEAD),
    "hook_head_index_out": Key(Use.checked, allowed=(), because=_OF_A_HEAD),
    "hook_layer": Key(Use.noted, int),
    "model_name": Key(Use.noted, str),
    "model_from_pretrained_kwargs": Key(Use.noted, dict),
    "model_from_pretrained_kwargs.fold_ln": Key(Use.noted),
    "model_from_pretrained_kwargs.center_writing_weights": Key(Use.noted),
    "model_from_pretrained_kwargs.center_unembed": Key(Use.noted),
    "model_from_pretrained_kwargs.fold_value_biases": Key(Use.noted),
    "model_from_pretrained_kwargs.refactor_factored_attn_matrices": Key(Use.noted),
    "prepend_bos": Key(Use.noted, bool),
    "context_size": Key(Use.noted, int),
    "seqpos_slice": Key(Use.noted, list[int | None]),
    UNUSED_FACTOR: Key(Use.noted, _NUMBER),
    "l0": Key(Use.noted, _NUMBER),
    "model_class_name": Key(Use.informative),
    "hf_hook_name": Key(Use.checked, str),
    "hf_hook_name_out": Key(Use.informative),
    "dtype": Key(Use.noted, str, (*FLOATS.values(), *(f"torch.{name}" for name in FLOATS.values()))),
    "device": Key(Use.informative),
    "dataset_path": Key(Use.informative),
    "dataset_trust_remote_code": Key(Use.informative),
    "neuronpedia_id": Key(Use.informative),
    "sae_lens_version": Key(Use.applied, str),
    "sae_lens_training_version": Key(Use.informative),
    "training_architecture": Key(Use.informative),
    "training_architecture_details": Key(Use.informative),
    "num_dead_features": Key(Use.informative),
    "noise_scale": Key(Use.informative),
}
"""The treatment of each key that SAELens or a run writes. null always means that nothing is stated.
Other keys are ignored: old versions also wrote their settings of training."""
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Names in older versions of SAELens."""
_NESTED = ("activation_fn_kwargs", "model_from_pretrained_kwargs")
_HOOKS = ("hook_name", "hook_name_out", "hf_hook_name")
_L0_TOLERANCE = 0.25
"""Share of the stated L0 by which the measured one may differ without a note."""


def stated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in a config in SAELens's format, of version 6 or before, under today's names."""
    flat = {**values, **(values.get("metadata") or {})}
    for old, new in _RENAMED.items():
        if (value := flat.pop(old, None)) is not None and flat.get(new) is None:
            flat[new] = value
    for name in _NESTED:
        if isinstance(nested := flat.get(name), dict):
            del flat[name]
            flat |= {f"{name}.{key}": value for key, value in nested.items()}
    if isinstance(normalises := flat.get("normalize_activations"), bool):
        flat["normalize_activations"] = "expected_average_only_in" if normalises else "none"
    for name in _HOOKS:
        if isinstance(hook := flat.get(name), str):
            flat[name] = hook.strip() or None
    return {key: value for key, value in flat.items() if key != "metadata" and value is not None}


def stated_by(choice: SAEChoice) -> dict[str, Any]:
    """The metadata of a resolved SAE, without loading it: from its folder, or SAELens's table.

    Raises:
        UserError: If its config cannot be read.
    """
    if choice.release is not None:
        model, converter = model_of(choice.release), converter_of(choice.release)
        about = {} if model is None else {"model_name": model}
        is_no_sae = converter in ("temporal", "mntss_clt_layer_transcoder")
        return about | ({"architecture": converter} if is_no_sae else {})
    folder = choice.path or (choice.id and str(EMBEDDED_SAES / choice.id))
    return stated(read(folder).values) if folder else {}


def check(about: Stated, field: str, name: str, source: str = "metadata") -> None:
    """Refuse an SAE or transcoder whose metadata has a value that cannot be used.

    Args:
        about: What its metadata states.
        field, name: The key that names the SAE, and its value, for the message.
        source: The file of its metadata, for the message.

    Raises:
        ConfigError: For the first such value.
    """
    reads, writes = about.get("hook_name"), about.get("hook_name_out")
    if writes not in (None, reads) and not is_transcoder(about):
        allowed = (
            f"an SAE, which reads and writes one activation, or architecture: {listed(TRANSCODERS)}"
        )
        because = f"it reads {reads} and writes {writes} by its {source}"
        raise ConfigError(field, name, allowed, because=because)
    for key, known in KEYS.items():
        value = about.get(key)
        if value is None or known.use in (Use.noted, Use.informative):
            continue
        if not _has_type(value, known.type):
            because = f"its {source} says {key}: {value!r}"
            kind = known.type.__name__ if isinstance(known.type, type) else str(known.type)
            kind = kind.replace(" | ", " or ").replace("list[", "list of ").replace("]", "")
            allowed = f"an SAE whose {key} is of type {kind}"
            raise ConfigError(field, name, allowed, because=because)
        if known.least is not None and value < known.least:
            allowed = f"an SAE with {key} from {known.least} on"
            raise ConfigError(field, name, allowed, because=f"its {source} says {key}: {value}")
        if known.allowed is None or value in known.allowed:
            continue
        words = listed(map(_written, known.allowed))
        allowed = f"an SAE with {key}: {words}" if words else f"an SAE without {key}"
        because = f"its {source} says {key}: {_written(value)}, and {known.because}"
        raise ConfigError(field, name, allowed, because=because)
    normalises = about.get("normalize_activations", "none")
    if is_transcoder(about) and normalises != "none":
        because = f"its {source} says normalize_activations: {normalises}"
        allowed = "a transcoder with normalize_activations: none, because its output has other units"
        raise ConfigError(field, name, allowed, because=because)
    is_topk = about.get("architecture") in ("topk", "abstopk") or about.get("activation_fn") == "topk"
    k, d_sae = about.get("k", about.get("activation_fn_kwargs.k")), about.get("d_sae", math.inf)
    kind = about.get("architecture")
    if not is_topk and kind in (None, "standard", "gated") and "k" in about:
        kind = "gives no architecture" if kind is None else f"says architecture: {kind}"
        because = f"its {source} {kind}, but k: {k}, and SAELens would compute no TopK"
        allowed = "a TopK SAE with architecture: topk, or an SAE without k"
        raise ConfigError(field, name, allowed, because=because)
    if is_topk and (k is None or not 0 < k <= d_sae):
        words = "gives no k" if k is None else f"says k: {k}, d_sae: {d_sae}"
        allowed = "a TopK SAE with k from 1 to d_sae"
        raise ConfigError(field, name, allowed, because=f"its {source} {words}")


def check_complete(values: Mapping[str, Any], name: str, source: str) -> None:
    """Refuse a config in SAELens's format that lacks what an SAE cannot be loaded without.

    Args:
        values: The config.
        name: The folder of the SAE, for the message.
        source: The file of the config, for the message.

    Raises:
        ConfigError: For the first missing key, and for a version that is none.
    """
    about = stated(values)
    version = re.match(r"\d+", str(about.get("sae_lens_version")))
    if "sae_lens_version" in about and version is None:
        because = f"its {source} says sae_lens_version: {about['sae_lens_version']}"
        allowed = "an SAE with a version such as 6.5.0, or without one"
        raise ConfigError("sae.path", name, allowed, because=because)
    needed = ["d_in", "d_sae", "architecture", *(["d_out"] if is_transcoder(about) else [])]
    if "architecture" not in values and (version is None or int(version[0]) < 6):
        needed.remove("architecture")  # the standard one
    for key in needed:
        if key not in about:
            allowed = f"an SAE whose {source} gives {key}"
            raise ConfigError("sae.path", name, allowed, because=f"its {source} gives no {key}")


def _has_type(value: Any, kind: Any) -> bool:
    """True if a JSON value is of this type. true is no number, and neither are NaN and Infinity."""
    if kind is object:
        return True
    if isinstance(kind, UnionType):
        return any(_has_type(value, part) for part in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_has_type(item, *get_args(kind)) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


class Notices:
    """Notes about the SAEs of runs: one line for each difference, with its blocks."""

    def __init__(self) -> None:
        self._blocks: dict[str, set[int]] = {}

    def add(self, block: int, texts: Iterable[str]) -> None:
        """Add the differences of the SAE at a block."""
        for text in texts:
            self._blocks.setdefault(text, set()).add(block)

    @property
    def lines(self) -> list[str]:
        return [
            f"{'block' if len(blocks) == 1 else 'blocks'} {listed(sorted(blocks))}: {text}"
            for text, blocks in self._blocks.items()
        ]


def differences(about: Stated, config: Config, begins_with_bos: bool | None = None) -> list[str]:
    """Differences between a run and the metadata of its SAE, as texts.

    Args:
        about: What the SAE's metadata states.
        config: The config of the run.
        begins_with_bos: True if the sequences of the run begin with BOS; `None` if it is not known yet.
    """
    texts = [
        f"the SAE's metadata says {key}: {about[key]!r}, which is not understood"
        for key, known in KEYS.items()
        if known.use is Use.noted and key in about and not _is_understood(key, about[key])
    ]
    if UNUSED_FACTOR in about:
        texts.append(
            f"the SAE's folder states a factor of its input, {about[UNUSED_FACTOR]}, in "
            f"{SCALER}, and its normalize_activations does not ask for it: it is not used"
        )
    model, length = about.get("model_name"), about.get("context_size")
    if isinstance(model, str) and not same_model(model, config.model.name):
        texts.append(f"the SAE was trained on {model}; this run uses it in {config.model.name}")
    prefix = "model_from_pretrained_kwargs."
    changed = [key.removeprefix(prefix) for key in KEYS if key.startswith(prefix) and about.get(key)]
    if changed:
        texts.append(
            f"the SAE was trained on a model that TransformerLens had changed ({listed(changed)}); "
            "this run loads the model unchanged"
        )
    if isinstance(length, int) and config.data.context_length > length:
        texts.append(
            f"the SAE was trained on sequences of {length} tokens; "
            f"data.context_length is {config.data.context_length}"
        )
    if positions := _positions(about.get("seqpos_slice")):
        texts.append(
            f"the SAE was trained only at positions {positions} of each sequence "
            "(seqpos_slice); this run replaces the activations of all positions"
        )
    prepends = about.get("prepend_bos")
    if isinstance(prepends, bool) and begins_with_bos is not None and prepends != begins_with_bos:
        trained, now = ("with BOS", "do not") if prepends else ("without BOS", "begin with BOS")
        texts.append(
            f"the SAE was trained on sequences {trained} at the start (prepend_bos); "
            f"the sequences of this run {now}"
        )
    layer, hook = about.get("hook_layer"), about.get("hook_name")
    number = re.search(r"\.(\d+)", str(hook))
    if isinstance(layer, int) and number is not None and int(number[1]) != layer:
        texts.append(f"the SAE's hook_layer is {layer}, but its hook_name, which counts, is {hook}")
    return texts


def _is_understood(key: str, value: Any) -> bool:
    known = KEYS[key]
    if not _has_type(value, known.type) or value not in (known.allowed or [value]):
        return False
    return key != "seqpos_slice" or (1 <= len(value) <= 3 and value[2:] != [0])  # arguments of a slice


def differs_in_l0(stated_l0: float | None, measured: float) -> str | None:
    """A text if the measured L0 is far from the stated one; else `None`."""
    if not stated_l0 or abs(measured - stated_l0) <= _L0_TOLERANCE * stated_l0:
        return None
    return (
        f"the SAE is stated to have {stated_l0:g} active latents per token; "
        f"before training {measured:.3g} were measured"
    )


def _written(value: Any) -> str:
    """A value as JSON writes it, without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _positions(stated_slice: Any) -> str:
    """Positions in Python's notation, from the arguments of a slice; empty for all positions."""
    if stated_slice is None or not _is_understood("seqpos_slice", stated_slice):
        return ""
    taken = slice(*stated_slice)
    start, stop, step = taken.start or 0, taken.stop, taken.step or 1
    if (start, stop, step) == (0, None, 1):
        return ""
    return f"{start}:{'' if stop is None else stop}" + ("" if step == 1 else f":{step}")


def read_folder(
    path: str, index: int | None, hook: Hook | None, model: Dimensions, reads: Reads | None = None
) -> SAEChoice:
    """The SAE or transcoder in a folder, checked against its config.

    `index`, `hook` and `reads` are those of `layer`; what is `None`, the config gives.

    Raises:
        ConfigError: If the folder contains no SAE, or its SAE does not fit the model or the place.
        UserError: If its files cannot be read.
    """
    folder = read(path)
    values, about = folder.values, stated(folder.values)
    check(about, "sae.path", path, folder.format.config)
    place = settled(trained_at(about, "sae.path", path, index, folder.format.config), index, hook, path)
    check_fits(about, model, "sae.path", path, folder.format.config)
    check_complete(values, path, folder.format.config)
    check_weights(folder)
    reads = reads_of(about, reads, "sae.path", path, folder.format.config)
    if place is None:
        because = f"{folder.path / folder.format.config} names no hook point"
        raise ConfigError("layer.index", None, f"the index of a block: {because}")
    l0 = (values.get("metadata") or {}).get("l0") or values.get("k")
    return SAEChoice(
        block=place.block,
        hook=place.hook,
        reads=reads,
        path=str(folder.path.resolve()),
        sha256=folder.digest(),
        width=values.get("d_sae"),
        l0=l0 if _has_type(l0, _NUMBER) else None,
    )


def read_folders(paths: Sequence[str], model: Dimensions) -> list[SAEChoice]:
    """SAEs and transcoders from several folders, each at the place that its config names.

    Raises:
        ConfigError: As `read_folder`, and for two at the same place.
        UserError: If a file cannot be read.
    """
    choices: dict[Place, SAEChoice] = {}
    for path in paths:
        choice = read_folder(path, None, None, model)
        if (other := choices.setdefault(place := Place.of(choice), choice)) is not choice:
            because = f"{other.path} is at {place}, too"
            raise ConfigError("sae.path", path, "one SAE or transcoder per place", because=because)
    # The names of hooks are in the order of the forward pass.
    return sorted(choices.values(), key=lambda choice: (choice.block, choice.hook.name))


def check_fits(
    about: Stated, model: Dimensions, field: str, name: str, source: str = "metadata"
) -> None:
    """Refuse an SAE that another width of the residual stream or another vocabulary belongs to.

    Args:
        about: What its metadata states, after `check`.
        model: The size of the model.
        field, name: The key that names the SAE, and its value, for the message.
        source: The file of its metadata, for the message.

    Raises:
        ConfigError: If its input is not as wide as the model's residual stream, or if it excludes token
            ids that the model does not have.
    """
    d_in, excluded = about.get("d_in"), about.get("exclude_special_tokens")
    outside = [i for i in excluded if not 0 <= i < model.d_vocab] if isinstance(excluded, list) else []
    if outside:
        allowed = f"an SAE that excludes token ids of this model, from 0 to {model.d_vocab - 1}"
        because = f"its {source} says exclude_special_tokens: {excluded}"
        raise ConfigError(field, name, allowed, because=because)
    for key, size in {"d_in": d_in, "d_out": about.get("d_out")}.items():
        if size is not None and size != model.d_model:
            allowed = f"an SAE with {key}={model.d_model}, the width of the model"
            raise ConfigError(field, name, allowed, because=f"its {key} is {size}, by its {source}")
