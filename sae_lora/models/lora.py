"""Adapters, through peft: the matrices that they adapt, and fresh ones."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Initialisation
from sae_lora.config.lora_targets import adapted_blocks, listed_matrices, target_matrices
from sae_lora.config.schema import LoRAConfig
from sae_lora.models.language_model import LanguageModel

_ROLES = {
    # Llama, Gemma, Qwen, Mistral and most others
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    # Phi-3
    "qkv_proj": "q k v",
    "gate_up_proj": "gate up",
    # GPT-NeoX (Pythia)
    "query_key_value": "q k v",
    "attention.dense": "o",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    # GPT-2
    "c_attn": "q k v",
    "attn.c_proj": "o",
    "c_fc": "up",
    "mlp.c_proj": "down",
    # OPT
    "out_proj": "o",
    "fc1": "up",
    "fc2": "down",
}
"""The roles of a matrix, by the end of its name. Fused matrices have several."""
_MORE_DIRECTIONS = 16
"""Directions that are computed beyond those needed: the last ones are inexact."""


def attach(model: LanguageModel, config: LoRAConfig, first_sae: int) -> PeftModel:
    """Put fresh adapters into the model (B = 0: they change nothing yet); returns peft's view of it.

    Initial values come from torch's global random state. `blocks=after` begins behind block `first_sae`.

    Raises:
        ConfigError: Where the model has no such blocks or matrices.
    """
    blocks = adapted_blocks(config.blocks, first_sae, len(model.blocks))
    adapters = get_peft_model(
        model.model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] peft takes fractions too
            lora_dropout=config.dropout,
            use_rslora=config.rank_stabilised,
            use_dora=config.dora,
            target_modules=target_modules(model, blocks, config.targets),
            bias="none",
        ),
    )
    if config.init is Initialisation.svd:
        for module in model.model.modules():
            if isinstance(module, LoraLayer):
                _begin_along_the_matrix(module)
    if model.device.type == "cpu":
        replace_dropout(model, Dropout)
    return adapters  # pyright: ignore[reportReturnType]


@torch.no_grad()
def _begin_along_the_matrix(module: Any) -> None:
    """Set the rows of A to the largest right-singular vectors of the matrix, as far as it has any.

    Their length is the mean length of peft's rows, 1 / √3.
    """
    base = module.get_base_layer()
    weight = base.weight.float() if isinstance(base, nn.Linear) else base.weight.float().T
    for adapter in module.lora_A.values():
        rank = min(adapter.weight.shape[0], *weight.shape)
        wanted = min(rank + _MORE_DIRECTIONS, *weight.shape)
        _, _, directions = torch.svd_lowrank(weight, wanted, niter=4)
        adapter.weight[:rank] = directions.T[:rank] / 3**0.5


def replace_dropout(model: LanguageModel, kind: Callable[[float], nn.Module]) -> None:
    """Replace the modules that drop the adapters' inputs by `kind(share)`."""
    for module in model.model.modules():
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                if isinstance(dropout, nn.Dropout | Dropout):
                    module.lora_dropout[name] = kind(dropout.p)


def target_modules(model: LanguageModel, blocks: Sequence[int], targets: Any) -> list[str]:
    """Full names of the matrices to adapt.

    Raises:
        ConfigError: Where the architecture has none of the kind, or fuses it with others.
    """
    wanted = set(target_matrices(targets))
    names = {id(module): name for name, module in model.model.named_modules()}
    matrices: list[str] = []
    roles_seen: set[str] = set()
    for block in blocks:
        for module in model.blocks[block].modules():
            name = names[id(module)]
            roles = _roles_of(name) if not isinstance(module, nn.ModuleList) else set()
            roles_seen |= roles
            if roles and roles <= wanted:
                matrices.append(name)
            elif roles & wanted:
                fused = "".join(matrix for matrix in ("q", "k", "v", "gate", "up") if matrix in roles)
                raise ConfigError(
                    "lora.targets",
                    targets,
                    "a set that takes all or none of them",
                    nearest="qkv" if fused == "qkv" else "mlp",
                    because=f"this model holds {fused} in one matrix ({name})",
                )
    if not matrices:
        raise ConfigError(
            "lora.targets", targets, listed_matrices(roles_seen), because="this model has no such matrix"
        )
    return matrices


def _roles_of(name: str) -> set[str]:
    for end, roles in _ROLES.items():
        if name == end or name.endswith(f".{end}"):
            return set(roles.split())
    return set()


def set_adapter_dropout(model: LanguageModel, training: bool) -> None:
    """Switch the adapters' dropout on or off.

    The rest of the model stays in evaluation mode: its own dropout (GPT-2 has some) would make
    student and teacher differ for no reason.
    """
    for module in model.model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train(training)


def trainable_weights(model: LanguageModel) -> dict[str, nn.Parameter]:
    """The adapters' weights by name."""
    return {name: weight for name, weight in model.model.named_parameters() if weight.requires_grad}


class AdaptedMatrix(NamedTuple):
    """A matrix of the model with its adapter.

    Args:
        name: Its dotted path in the transformers model.
        block: Its block.
        kind: Its path inside the block, such as `self_attn.q_proj`.
        reads_stream: Whether it reads the residual stream (through a norm), rather than states inside
            attention or MLP.
        weight: W, `[output, input]`, without the adapter.
        delta: ΔW, the same shape: the adapted matrix less W.
        a: A, `[rank, input]`.
        b: B, `[output, rank]`.
        scale: Factor of B · A; the product is ΔW where there is no magnitude.
        magnitude: DoRA's lengths of its outputs, `[output]`; `None` for plain LoRA.
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
        """Number of weights of the adapter."""
        magnitude = 0 if self.magnitude is None else self.magnitude.numel()
        return self.a.numel() + self.b.numel() + magnitude


def adapted_matrices(model: LanguageModel) -> Iterator[AdaptedMatrix]:
    """The matrices that have adapters, block by block; one at a time, as they may be large."""
    names = {id(module): name for name, module in model.model.named_modules()}
    for block, inside in enumerate(model.blocks):
        for kind, module in inside.named_modules():
            if isinstance(module, LoraLayer):
                yield _adapted_matrix(module, names[id(module)], block, kind)


@torch.no_grad()
def _adapted_matrix(module: Any, name: str, block: int, kind: str) -> AdaptedMatrix:
    (adapter,) = module.active_adapters
    base = module.get_base_layer()
    weight, delta = base.weight.float(), module.get_delta_weight(adapter).float()
    if not isinstance(base, nn.Linear):  # GPT-2's matrices lie the other way round
        weight, delta = weight.T, delta.T
    magnitude = None
    if adapter in module.lora_magnitude_vector:
        magnitude = module.lora_magnitude_vector[adapter].weight.detach()
        directed = weight + delta
        delta = (magnitude.float() / directed.norm(dim=1))[:, None] * directed - weight
    return AdaptedMatrix(
        name=name,
        block=block,
        kind=kind,
        reads_stream=not _roles_of(name) & {"o", "down"},
        weight=weight,
        delta=delta,
        a=module.lora_A[adapter].weight.detach(),
        b=module.lora_B[adapter].weight.detach(),
        scale=float(module.scaling[adapter]),
        magnitude=magnitude,
    )


_LEVELS = 2**16


class Dropout(nn.Module):
    """`nn.Dropout`, with the share rounded to 1 / 65,536 and masks drawn four at a time.

    The expectation of the output is the input, exactly: the scale follows the rounded share. Masks come
    from torch's global random state.

    Args:
        p: Share of the elements that become zero while training.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = round(p * _LEVELS) / _LEVELS

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return inputs
        words = torch.empty(-(-inputs.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        levels = words.view(torch.int16)[: inputs.numel()].view(inputs.shape)
        kept = levels >= round(self.p * _LEVELS) - _LEVELS // 2
        return inputs * kept.to(inputs.dtype).mul_(1 / (1 - self.p))
