"""LoRA adapters through peft: new adapters, the matrices that they adapt, their dropout."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sae_lora.common.errors import ConfigError, UserError, listed
from sae_lora.config.enums import Initialisation
from sae_lora.config.lora_targets import adapted_blocks
from sae_lora.config.schema import LoRAConfig
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.matrices import BlockWeight, Selection, block_weights, select

_MORE_DIRECTIONS = 16
"""Number of additional singular vectors to compute, because the last ones are inexact."""


def selection(model: LanguageModel, config: LoRAConfig, first_sae: int) -> Selection:
    """The weights of the adapted blocks, with and without adapters. The model may have no weights yet.

    Raises:
        ConfigError: If the model does not have these blocks or matrices, or peft cannot adapt them so.
    """
    blocks = adapted_blocks(config.blocks, first_sae, len(model.blocks))
    selected = select(model, blocks, config.targets)
    _check_without_module(config, [weight.path for weight in selected.adapted if not weight.in_module])
    return selected


def _check_without_module(config: LoRAConfig, paths: Sequence[str]) -> None:
    """Refuse dropout and DoRA for weights that peft can only adapt without their module."""
    for key, value, nearest in (("dropout", config.dropout, 0), ("dora", config.dora, "false")):
        if value and paths:
            raise ConfigError(
                f"lora.{key}",
                value,
                f"{nearest}, or lora.targets without {listed(dict.fromkeys(paths), 6)}",
                nearest=nearest,
                because=f"peft has no {'DoRA' if key == 'dora' else key} for the weights of experts, "
                "nor for modules whose names it takes for experts",
            )


def attach(model: LanguageModel, config: LoRAConfig, first_sae: int) -> PeftModel:
    """Add new adapters (B = 0, so they change nothing yet) to the model, and return peft's view of it.

    Initial values come from torch's global random state. `blocks=after` begins after block `first_sae`.

    Raises:
        ConfigError: If the model does not have these blocks or matrices, or does not use their modules.
        UserError: If peft adapts other weights.
    """
    weights = selection(model, config, first_sae).adapted
    modules = [weight.name.removesuffix(".weight") for weight in weights if weight.in_module]
    parameters = [weight.name for weight in weights if not weight.in_module]
    adapters = get_peft_model(
        model.model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] peft takes fractions too
            lora_dropout=config.dropout,
            use_rslora=config.rank_stabilised,
            use_dora=config.dora,
            target_modules=modules,
            target_parameters=parameters or None,
            bias="none",
        ),
    )
    _check_adapted(model, weights, config)
    if config.init is Initialisation.svd:
        for layer in _adapters(model).values():
            with model.whole(layer.get_base_layer()):
                _initialise_by_svd(layer)
    if model.device.type == "cpu":
        replace_dropout(model, Dropout)
    if model.device.type != "meta":
        _check_used(model, config)
    return adapters  # pyright: ignore[reportReturnType]


def _adapters(model: LanguageModel) -> dict[str, Any]:
    """peft's adapters by the dotted path, in the plain model, of the weight that each changes."""
    return {
        adapted_weight(name, layer): layer
        for name, layer in model.model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _check_adapted(model: LanguageModel, weights: Sequence[BlockWeight], config: LoRAConfig) -> None:
    """Check that exactly these weights have adapters, of the planned sizes.

    Raises:
        UserError: If they differ.
    """
    planned = {weight.name: weight.adapter_weights(config.rank, dora=config.dora) for weight in weights}
    made = {
        name: sum(weight.numel() for weight in _weights_of(layer))
        for name, layer in _adapters(model).items()
    }
    trained = sum(weight.numel() for weight in trainable_weights(model).values())
    if made != planned or trained != sum(made.values()):
        differing = sorted(dict(made.items() ^ planned.items()))
        raise UserError(
            f"lora.targets = {config.targets}: peft does not adapt exactly the selected weights of "
            f"{type(model.model).__name__}; it differs at {listed(differing, 6)}"
        )


def adapted_weight(name: str, layer: LoraLayer) -> str:
    """Dotted path in the plain model of the weight that an adapter changes; `name` is the adapter's."""
    attribute = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    return f"{name.replace('.base_layer', '')}.{attribute}"


def _weights_of(layer: LoraLayer) -> list[nn.Parameter]:
    """The weights of one adapter, without those of adapters inside it."""
    parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return [weight for part in parts for weight in part.parameters()]


def _check_used(model: LanguageModel, config: LoRAConfig) -> None:
    """Check that a forward pass runs and calls every adapter.

    A fused kernel may read a weight without calling its module: an adapter there would do nothing. Code
    that reads other attributes of a module does not find them in the adapter around it.

    Raises:
        ConfigError: If the pass fails, or does not call an adapter.
    """
    layers = _adapters(model)
    called: set[nn.Module] = set()
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    set_adapter_dropout(model, False)  # it would take numbers from the random state
    with ExitStack() as hooks, torch.no_grad():
        for layer in layers.values():
            handle = layer.register_forward_hook(  # pyright: ignore[reportAttributeAccessIssue]
                lambda module, *_: called.add(module)
            )
            hooks.callback(handle.remove)
        try:
            model.model(input_ids=tokens, use_cache=False)
        except AttributeError as error:
            because = f"{type(model.model).__name__} does not run with these adapters: {error}"
            allowed = "other matrices, such as attn"
            raise ConfigError("lora.targets", config.targets, allowed, because=because) from error
    set_adapter_dropout(model, True)
    unused = dict.fromkeys(
        re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
        for name, layer in layers.items()
        if layer not in called
    )
    if unused:
        raise ConfigError(
            "lora.targets",
            config.targets,
            f"matrices without {listed(unused, 6)}",
            because=f"{type(model.model).__name__} does not call these modules on this device",
        )


def _matrices(layer: LoraLayer, weight: Tensor) -> Tensor:
    """A weight that an adapter changes, or its change, as `[expert, output, input]`; one expert if
    it is no stack.
    """
    base = layer.get_base_layer()
    if isinstance(base, Conv1D) or (weight.dim() == 3 and getattr(base, "is_transposed", False)):
        weight = weight.mT
    return weight if weight.dim() == 3 else weight[None]


def _base_weight(layer: Any) -> Tensor:
    """The weight that an adapter changes, `[expert, output, input]`, without the change."""
    weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    return _matrices(layer, weight.detach())


def _a_of(layer: Any, adapter: str) -> Tensor:
    """A, `[expert, rank, input]`; a view of peft's weight."""
    weight = layer.lora_A[adapter].weight
    return weight.view(getattr(layer, "num_experts", 1), -1, weight.shape[1])


def _b_of(layer: Any, adapter: str) -> Tensor:
    """B, `[expert, output, rank]`; a view of peft's weight."""
    weight = layer.lora_B[adapter].weight
    return weight.view(weight.shape[0], -1, getattr(layer, "num_experts", 1)).permute(2, 0, 1)


@torch.no_grad()
def _initialise_by_svd(layer: Any) -> None:
    """Set the rows of A to the largest right-singular vectors of the matrix, as many as exist.

    Their length is the mean length of peft's rows, 1 / √3.
    """
    for adapter in layer.lora_A:
        for weight, a in zip(_base_weight(layer).float(), _a_of(layer, adapter), strict=True):
            rank = min(len(a), *weight.shape)
            computed = min(rank + _MORE_DIRECTIONS, *weight.shape)
            _, _, directions = torch.svd_lowrank(weight, computed, niter=4)
            a[:rank] = directions.T[:rank] / 3**0.5


def replace_dropout(model: LanguageModel, kind: Callable[[float], nn.Module]) -> None:
    """Replace the dropout modules of the adapters with `kind(share)`."""
    for layer in _adapters(model).values():
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout | Dropout):
                layer.lora_dropout[name] = kind(dropout.p)


def set_adapter_dropout(model: LanguageModel, training: bool) -> None:
    """Switch the adapters' dropout on or off.

    Other modules stay in evaluation mode: the model's own dropout (GPT-2 has some) would add noise to
    the difference between student and teacher.
    """
    for layer in _adapters(model).values():
        layer.lora_dropout.train(training)


def freeze(model: LanguageModel) -> None:
    """Keep the adapters as they are, without dropout."""
    set_adapter_dropout(model, False)
    for weight in trainable_weights(model).values():
        weight.requires_grad_(False)


def trainable_weights(model: LanguageModel) -> dict[str, nn.Parameter]:
    """The weights of the adapters, by name."""
    return {name: weight for name, weight in model.model.named_parameters() if weight.requires_grad}


class PlainAdapter(NamedTuple):
    """An adapter that is LoRA and nothing else, on the matrix of a module."""

    base: nn.Module
    """The module without the adapter."""
    is_transposed: bool
    """True if the module holds its matrix as `[input, output]`."""
    a: nn.Parameter
    """A, `[rank, input]`."""
    b: nn.Parameter
    """B, `[output, rank]`."""
    scale: float
    """Factor of B · A."""
    dropout: float
    """Share of the inputs that are zero in training, as `Dropout` rounds it."""

    @property
    def rank(self) -> int:
        return len(self.a)


def plain_adapters(model: LanguageModel) -> dict[str, PlainAdapter] | None:
    """The adapters by the dotted path of their modules; `None` if any is more than LoRA on a matrix."""
    plain = {}
    for name, layer in _adapters(model).items():
        base, dropouts = layer.get_base_layer(), list(layer.lora_dropout.values())
        if type(base) not in (nn.Linear, Conv1D) or layer.lora_variant or len(dropouts) != 1:
            return None
        (adapter,) = layer.lora_A
        share = getattr(dropouts[0], "p", 0.0)
        plain[name.removesuffix(".weight")] = PlainAdapter(
            base,
            isinstance(base, Conv1D),
            layer.lora_A[adapter].weight,
            layer.lora_B[adapter].weight,
            layer.scaling[adapter],
            Dropout(share).p,
        )
    return plain


class AdaptedMatrix(NamedTuple):
    """A matrix of the model with its adapter.

    Args:
        name: Dotted path in the transformers model. The matrix of an expert ends with its index:
            `experts.down_proj[3]`.
        block: Index of the block.
        kind: Path inside the block, such as `self_attn.q_proj`.
        reads_stream: True if it reads the residual stream (through a norm), false if it reads states
            inside attention or MLP.
        weight: W, `[output, input]`, without the adapter.
        delta: ΔW, `[output, input]`: the adapted matrix minus W.
        a: A, `[rank, input]`.
        b: B, `[output, rank]`.
        scale: Factor of B · A. Without a magnitude, scale · B · A is ΔW.
        magnitude: DoRA's magnitudes, `[output]`; `None` for plain LoRA.
    """

    name: str
    block: int
    kind: str
    reads_stream: bool
    weight: Tensor
    delta: Tensor
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None

    @property
    def parameters(self) -> int:
        """Number of the adapter's weights."""
        magnitude = 0 if self.magnitude is None else self.magnitude.numel()
        return self.a.numel() + self.b.numel() + magnitude


def adapted_matrices(model: LanguageModel) -> Iterator[AdaptedMatrix]:
    """The adapted matrices, block by block; an iterator, because they may be large."""
    layers = _adapters(model)
    for weight in block_weights(model, range(len(model.blocks))):
        if weight.name in layers:
            yield from _adapted_matrices(layers[weight.name], weight)


@torch.no_grad()
def _adapted_matrices(layer: Any, described: BlockWeight) -> Iterator[AdaptedMatrix]:
    (adapter,) = layer.active_adapters
    weights = _base_weight(layer).float()
    deltas = _matrices(layer, layer.get_delta_weight(adapter)).float()
    a, b = _a_of(layer, adapter).detach(), _b_of(layer, adapter).detach()
    for expert in range(len(weights)):
        weight, delta, magnitude = weights[expert], deltas[expert], None
        if adapter in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[adapter].weight.detach()
            directed = weight + delta
            delta = (magnitude.float() / directed.norm(dim=1))[:, None] * directed - weight
        index = f"[{expert}]" if len(weights) > 1 else ""
        yield AdaptedMatrix(
            name=described.name.removesuffix(".weight") + index,
            block=described.block,
            kind=described.path + index,
            reads_stream=described.reads_stream,
            weight=weight,
            delta=delta,
            a=a[expert],
            b=b[expert],
            scale=float(layer.scaling[adapter]),
            magnitude=magnitude,
        )


def dropout_threshold(share: float) -> int:
    """An input is kept if its random 16-bit integer is at least this."""
    return round(share * _LEVELS) - _LEVELS // 2


_LEVELS = 2**16


class Dropout(nn.Module):
    """`nn.Dropout` with the share rounded to a multiple of 1 / 65,536, and four masks per random word.

    The expected output is exactly the input, because the scale follows the rounded share. Masks come
    from torch's global random state.

    Args:
        p: Share of the elements that are zero in training.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = round(p * _LEVELS) / _LEVELS

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return inputs
        words = torch.empty(-(-inputs.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        levels = words.view(torch.int16)[: inputs.numel()].view(inputs.shape)
        mask = levels >= dropout_threshold(self.p)
        return inputs * mask.to(inputs.dtype).mul_(1 / (1 - self.p))
