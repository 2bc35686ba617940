"""The weights of a model's blocks: their parts and roles, and the choice of those that get adapters.

Parts and roles come from the structure of a block where it decides: its modules, and the widths that a
matrix reads and writes. Names decide the rest, such as which of two matrices is the query.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from sae_lora.common.errors import ConfigError, listed, nearest_name
from sae_lora.config.lora_targets import (
    ATTENTION,
    MLP,
    PARTS,
    TARGET_SETS,
    is_pattern,
    listed_matrices,
    matches,
    target_words,
)
from sae_lora.models.language_model import LanguageModel


class Kind(Enum):
    """The use of a weight."""

    matrix = 1
    """The matrix of a linear module."""
    stack = 2
    """The matrices of several experts in one weight, `[expert, …, …]`."""
    router = 3
    """A matrix that chooses experts for a token, or tokens for attention."""
    other = 4
    """No matrix (a convolution's kernel, a table, a bias, a state's decay), or one whose module the
    forward pass does not call, so that an adapter would do nothing."""


class BlockWeight(NamedTuple):
    """A weight of two or more dimensions in a block.

    Args:
        name: Dotted path of the weight in the transformers model, as in `named_parameters`.
        block: Index of the block.
        path: Path inside the block, without a last part `weight`: `self_attn.q_proj`.
        kind: Its use.
        in_module: True if peft can adapt the linear module that holds it; otherwise it can only adapt
            the weight itself, without dropout and DoRA.
        part: `attn` or `mlp`.
        roles: Those of q, k, v, o, gate, up and down that it has; fused matrices have several.
        reads_stream: True if it reads the residual stream (through a norm), false if it reads states
            inside attention or MLP.
        experts: Number of matrices in a stack; otherwise 1.
        inputs: Width that each matrix reads.
        outputs: Width that each matrix writes.
    """

    name: str
    block: int
    path: str
    kind: Kind
    in_module: bool
    part: str
    roles: frozenset[str]
    reads_stream: bool
    experts: int
    inputs: int
    outputs: int

    def adapter_weights(self, rank: int, *, dora: bool) -> int:
        """Number of weights of an adapter of this rank."""
        return self.experts * rank * (self.inputs + self.outputs) + (self.outputs if dora else 0)


class Selection(NamedTuple):
    """The weights of the adapted blocks."""

    adapted: list[BlockWeight]
    """The weights that get adapters."""
    frozen: list[BlockWeight]
    """The other weights of two or more dimensions."""

    @property
    def left_out(self) -> dict[str, int]:
        """Paths of the frozen weights inside their blocks, each with the number of weights."""
        return dict(Counter(re.sub(r"\.\d+\.", ".*.", weight.path) for weight in self.frozen))


class _Targets:
    """The words of `lora.targets`: roles, parts of a block, and patterns."""

    def __init__(self, targets: Any) -> None:
        self.words = target_words(targets)
        names = [word for word in self.words if not is_pattern(word)]
        self.patterns = [word for word in self.words if is_pattern(word)]
        self.parts = {part for name in names for part in PARTS.get(name, ())}
        self.roles = {role for name in names if name not in PARTS for role in TARGET_SETS[name]}

    def select(self, weight: BlockWeight) -> bool:
        """True if the weight is selected. Names select no router."""
        if any(matches(weight.path, pattern) for pattern in self.patterns):
            return True
        if weight.kind is Kind.router:
            return False
        return weight.part in self.parts or (bool(weight.roles) and weight.roles <= self.roles)

    def without_effect(self, adapted: Iterable[BlockWeight]) -> list[str]:
        """The words that describe none of these weights, or that name a role of none."""
        roles = {role for weight in adapted for role in weight.roles}
        parts = {weight.part for weight in adapted}
        paths = {weight.path for weight in adapted}
        return [
            word
            for word in self.words
            if not (
                any(matches(path, word) for path in paths)
                if is_pattern(word)
                else parts & {*PARTS[word]}
                if word in PARTS
                else roles.issuperset(TARGET_SETS[word])
            )
        ]


def select(model: LanguageModel, blocks: Sequence[int], targets: Any) -> Selection:
    """Divide the weights of blocks by `lora.targets`.

    Names select matrices and stacks, patterns also routers. `all` leaves routers out: which experts a
    token uses has no gradient, and a small change of the router may exchange experts whose adapters are
    in training. Modules that are also part of a block without adapters are left out, too.

    Raises:
        ConfigError: If a target selects nothing, or only a part of a fused matrix.
    """
    asked = _Targets(targets)
    uses = Counter(id(module) for block in model.blocks for module in block.modules())
    uses.subtract(id(module) for block in blocks for module in model.blocks[block].modules())
    adapted: dict[str, BlockWeight] = {}
    frozen: dict[str, BlockWeight] = {}
    for weight, owner in _weights_and_owners(model, blocks):
        can_adapt = weight.kind is not Kind.other and uses[id(owner)] == 0
        selected = can_adapt and asked.select(weight)
        (adapted if selected else frozen)[weight.name] = weight
        if can_adapt and not selected and weight.roles & asked.roles:
            roles = {role for each in block_weights(model, blocks) for role in each.roles}
            raise _fused(weight, targets, roles)
    selection = Selection(list(adapted.values()), list(frozen.values()))
    if unmet := asked.without_effect(selection.adapted):
        raise _selects_nothing(unmet, targets, selection)
    return selection


def _fused(weight: BlockWeight, targets: Any, roles: set[str]) -> ConfigError:
    """The error for a target that is a part of this weight; `roles` are those of all weights."""
    attention = "qkv" if roles.issuperset("qkv") else "attn"
    fused = "".join(role for role in ("q", "k", "v", "gate", "up") if role in weight.roles)
    return ConfigError(
        "lora.targets",
        targets,
        "a set with all or none of them",
        nearest="mlp" if weight.part == MLP else attention,
        because=f"this model has {fused} in one matrix ({weight.name.removesuffix('.weight')})",
    )


def _selects_nothing(unmet: Sequence[str], targets: Any, selection: Selection) -> ConfigError:
    word = unmet[0]
    weights = [*selection.adapted, *selection.frozen]
    paths = dict.fromkeys(weight.path for weight in weights if weight.kind is not Kind.other)
    if not is_pattern(word):
        roles = {role for weight in weights for role in weight.roles}
        because = f"this model has no such matrix ({word}) in the adapted blocks"
        return ConfigError("lora.targets", targets, listed_matrices(roles), because=because)
    unfit = [weight.path for weight in weights if matches(weight.path, word)]
    because = f"no adapter fits {unfit[0]}" if unfit else f"the adapted blocks have no matrix {word}"
    nearest = nearest_name(word, paths)
    if nearest is not None and isinstance(targets, list):
        fitting = {each: nearest_name(each, paths) for each in unmet}
        mended = [fitting.get(str(target), str(target)) for target in targets]
        nearest = f"[{','.join(dict.fromkeys(each for each in mended if each is not None))}]"
    allowed = f"names such as attn, and patterns of {listed(paths, 30)}"
    return ConfigError("lora.targets", targets, allowed, nearest, because)


def block_weights(model: LanguageModel, blocks: Iterable[int]) -> list[BlockWeight]:
    """The weights of two or more dimensions in these blocks, without those of adapters.

    With adapters in the model, the weights are those of the plain model, by their names in it.
    """
    return [weight for weight, _ in _weights_and_owners(model, blocks)]


def _weights_and_owners(
    model: LanguageModel, blocks: Iterable[int]
) -> Iterator[tuple[BlockWeight, nn.Module]]:
    """Pairs of a weight and the module that holds it."""
    names = {id(module): name for name, module in model.model.named_modules()}
    for block in blocks:
        root = model.blocks[block]
        for name, weight in root.named_parameters():
            if weight.dim() >= 2 and ".lora_" not in name:
                *inner, attribute = name.replace(_WRAPPED, "").split(".")
                path = [("", root), *_modules_towards(root, inner)]
                owner = path[-1][1]
                full_name = f"{names[id(owner)]}.{attribute}".replace(_WRAPPED, "")
                yield _described(model, block, full_name, weight, path), owner


_WRAPPED = ".base_layer"
"""peft's name for a module inside its adapter."""


def _modules_towards(module: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules on the way to a module inside another, without adapters around them."""
    for name in names:
        module = _plain(module.get_submodule(name))
        yield name, module


def _plain(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


_ROUTES = re.compile(r"router|indexer|^gate$|expert_gate$")
"""Names of modules that choose experts, or tokens for attention."""
_IS_MLP = re.compile(r"mlp|moe|ffn|feed_?forward|^ff$")
"""Names of modules that act on each position alone."""
_IS_MLP_CLASS = re.compile(r"(mlp|moe|moeblock|feedforward|ffn)$")
"""Ends of the names of their classes, which begin with the name of the model."""
_MIXES = re.compile(r"att|mamba|mixer|conv|temporal|recurrent|deltanet")
"""Names of modules that mix positions, and of their classes."""
_LETTERS = re.compile(r"(?:^|_)w?(q|k|v|qk|kv|qkvz?)(?=_|$)")
"""Letters of queries, keys and values in names such as `q_proj`, `kv_b_proj` and `in_proj_qkvz`."""
_WORDS = {"query": "q", "key": "k", "value": "v"}
_WRITES = re.compile(
    r"(?:^|_)(?:o|out|output|down)(?=_|$)(?!_gate)|^(?:dense|c_proj|fc2|w2|dense_4h_to_h)$"
)
"""Names of matrices that write the residual stream, for matrices that read and write its width."""
_SECOND_OF_TWO = re.compile(r"_b_proj$|^wq_b$")
"""Names of matrices that read what another matrix of low rank writes."""


def _described(
    model: LanguageModel, block: int, name: str, weight: Tensor, path: Sequence[tuple[str, nn.Module]]
) -> BlockWeight:
    """Describe a weight. `name` is its dotted path in the model, `path` leads from its block to it."""
    attribute = name.rpartition(".")[2]
    names = [part for part, _ in path[1:]]
    leaf = names[-1] if attribute == "weight" and names else attribute
    told = names[-2] if leaf == "linear" and len(names) > 1 else leaf  # `q_proj.linear`
    owner = path[-1][1]
    d_model: int = model.config.hidden_size
    experts, inputs, outputs = _sizes(owner, weight)
    kind = _kind(owner, names, attribute, weight)
    if kind is Kind.matrix and (leaf in _multiplied_by(type(path[-2][1])) or _is_refused(model, leaf)):
        kind = Kind.other
    part = _part(path)
    letters = _letters(names) if part == ATTENTION else set()
    writes, reads = outputs == d_model and not letters, inputs == d_model
    if kind is Kind.stack or (writes and reads):
        writes = bool(_WRITES.search(told))
    reads = reads and not writes and not _SECOND_OF_TWO.search(told)
    roles: set[str] = set()
    if kind in (Kind.matrix, Kind.stack):
        if writes:
            roles = {"o"} if part == ATTENTION else {"down"}
        elif part == ATTENTION:
            roles = letters
        elif reads or kind is Kind.stack:
            roles = _gate_and_up(told, outputs, d_model, path)
    return BlockWeight(
        name=name,
        block=block,
        path=".".join(names if leaf != attribute else [*names, attribute]),
        kind=kind,
        in_module=_is_linear(owner) and not _is_renamed(model, leaf),
        part=part,
        roles=frozenset(roles),
        reads_stream=reads and kind is not Kind.other,
        experts=experts,
        inputs=inputs,
        outputs=outputs,
    )


def _sizes(owner: nn.Module, weight: Tensor) -> tuple[int, int, int]:
    """Numbers of experts, of inputs and of outputs, as peft reads them from the shape of a weight."""
    if isinstance(owner, Conv1D):
        return 1, weight.shape[0], weight.shape[1]
    if weight.dim() == 3:
        experts, first, second = weight.shape
        is_transposed = getattr(owner, "is_transposed", False)
        return (experts, first, second) if is_transposed else (experts, second, first)
    return 1, weight.shape[-1], weight.shape[0]


def _kind(owner: nn.Module, names: Sequence[str], attribute: str, weight: Tensor) -> Kind:
    if any(_ROUTES.search(name) for name in names):
        return Kind.router if weight.dim() == 2 and attribute == "weight" else Kind.other
    if isinstance(owner, nn.Linear | Conv1D):
        return Kind.matrix
    is_of_experts = hasattr(owner, "is_transposed") or any(
        "expert" in word.lower() for word in (*names, type(owner).__name__)
    )
    is_stack = is_of_experts and weight.dim() == 3 and not isinstance(owner, _ConvNd)
    return Kind.stack if is_stack else Kind.other


def _part(path: Sequence[tuple[str, nn.Module]]) -> str:
    """The part that the innermost module's name or class says; `mlp` if none does."""
    for name, module in reversed(path[1:]):
        kind = type(module).__name__.lower()
        if isinstance(module, nn.Linear | Conv1D):
            continue
        if _IS_MLP.search(name) or _IS_MLP_CLASS.search(kind):
            return MLP
        if _MIXES.search(name) or _MIXES.search(kind):
            return ATTENTION
    return MLP


def _letters(names: Sequence[str]) -> set[str]:
    """The roles q, k and v in the name of a matrix in attention, or of the module around it."""
    for name in reversed([name.lower() for name in names]):
        letters = {letter for letters in _LETTERS.findall(name) for letter in letters}
        letters |= {_WORDS[word] for word in name.split("_") if word in _WORDS}
        if letters or name == "c_attn":
            return letters & {"q", "k", "v"} or {"q", "k", "v"}
    return set()


def _gate_and_up(
    leaf: str, outputs: int, d_model: int, path: Sequence[tuple[str, nn.Module]]
) -> set[str]:
    """The roles (gate, up or both) of a matrix that an MLP applies to the residual stream."""
    named = {role for role in ("gate", "up") if role in leaf.split("_")}
    if leaf in _GATED:
        named = {_GATED[leaf]}
    if named or len(path) < 2:
        return named
    # The matrix that writes tells the width of the MLP: twice this width are gate and up in one matrix.
    siblings = [_plain(module) for module in path[-2][1].children()]
    for sibling in siblings:
        if isinstance(sibling, nn.Linear | Conv1D):
            _, width, written = _sizes(sibling, sibling.weight)
            if written == d_model and sibling is not path[-1][1]:
                return {"up"} if outputs == width else {"gate", "up"} if outputs == 2 * width else set()
    return set()


_GATED = {"w1": "gate", "w3": "up"}
"""Llama's names of the matrices that read."""


def _is_linear(owner: nn.Module) -> bool:
    """True if a module multiplies whole inputs with its weight, as peft's adapter for modules does."""
    if not isinstance(owner, nn.Linear | Conv1D):
        return False
    if type(owner).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    _, inputs, outputs = _sizes(owner, owner.weight)
    try:  # a subclass may divide its inputs into groups
        output = owner(torch.zeros(1, inputs, dtype=owner.weight.dtype, device=owner.weight.device))
    except (RuntimeError, ValueError, IndexError):
        return False
    return getattr(output, "shape", None) == (1, outputs)


@cache
def _multiplied_by(holder: type[nn.Module]) -> frozenset[str]:
    """Names of modules whose weight the code of a class multiplies itself, without calling the module.

    An adapter there would do nothing. Mamba's `dt_proj` is the usual case.
    """
    try:
        code = inspect.getsource(holder)
    except (OSError, TypeError):  # the source is not installed
        return frozenset()
    return frozenset(
        name
        for names in re.findall(r"self\.(\w+)\.weight @|@ self\.(\w+)\.weight", code)
        for name in names
    )


def _is_refused(model: LanguageModel, leaf: str) -> bool:
    """True if peft refuses to adapt modules of this name, because a fused kernel reads their weights."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model.model, leaf)
    except ValueError:
        return True
    return False


def _is_renamed(model: LanguageModel, leaf: str) -> bool:
    """True if peft takes a module of this name for a part of experts, of any block.

    In mixtures of experts, transformers 4 had a module for each matrix of an expert. peft turns such
    targets into the weights that hold these matrices in transformers 5, also where the target is another
    module: that of a shared expert, or of a block without experts.
    """
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model.model, None)
    except ValueError:  # peft misses another part
        return True
    return config.target_modules != {leaf}
