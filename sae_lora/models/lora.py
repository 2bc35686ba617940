"""LoRA adapters through peft: new adapters, the matrices that they adapt, their dropout."""

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
"""Roles of a matrix, by the end of its name. Fused matrices have several roles."""
_MORE_DIRECTIONS = 16
"""Number of additional singular vectors to compute, because the last ones are inexact."""


def attach(model: LanguageModel, config: LoRAConfig, first_sae: int) -> PeftModel:
    """Add new adapters (B = 0, so they change nothing yet) to the model, and return peft's view of it.

    Initial values come from torch's global random state. `blocks=after` begins after block `first_sae`.

    Raises:
        ConfigError: If the model does not have these blocks or matrices.
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
                _initialise_by_svd(module)
    if model.device.type == "cpu":
        replace_dropout(model, Dropout)
    return adapters  # pyright: ignore[reportReturnType]


@torch.no_grad()
def _initialise_by_svd(module: Any) -> None:
    """Set the rows of A to the largest right-singular vectors of the matrix, as many as exist.

    Their length is the mean length of peft's rows, 1 / √3.
    """
    base = module.get_base_layer()
    weight = base.weight.float() if isinstance(base, nn.Linear) else base.weight.float().T
    for adapter in module.lora_A.values():
        rank = min(adapter.weight.shape[0], *weight.shape)
        computed = min(rank + _MORE_DIRECTIONS, *weight.shape)
        _, _, directions = torch.svd_lowrank(weight, computed, niter=4)
        adapter.weight[:rank] = directions.T[:rank] / 3**0.5


def replace_dropout(model: LanguageModel, kind: Callable[[float], nn.Module]) -> None:
    """Replace the dropout modules of the adapters with `kind(share)`."""
    for module in model.model.modules():
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                if isinstance(dropout, nn.Dropout | Dropout):
                    module.lora_dropout[name] = kind(dropout.p)


def target_modules(model: LanguageModel, blocks: Sequence[int], targets: Any) -> list[str]:
    """Full names of the matrices to adapt.

    Raises:
        ConfigError: If the architecture has no such matrix, or fuses it with other matrices.
    """
    requested = set(target_matrices(targets))
    names = {id(module): name for name, module in model.model.named_modules()}
    matrices: list[str] = []
    roles_seen: set[str] = set()
    for block in blocks:
        for module in model.blocks[block].modules():
            name = names[id(module)]
            roles = _roles_of(name) if not isinstance(module, nn.ModuleList) else set()
            roles_seen |= roles
            if roles and roles <= requested:
                matrices.append(name)
            elif roles & requested:
                fused = "".join(matrix for matrix in ("q", "k", "v", "gate", "up") if matrix in roles)
                raise ConfigError(
                    "lora.targets",
                    targets,
                    "a set with all or none of them",
                    nearest="qkv" if fused == "qkv" else "mlp",
                    because=f"this model has {fused} in one matrix ({name})",
                )
    if not matrices:
        raise ConfigError(
            "lora.targets", targets, listed_matrices(roles_seen), because="this model has no such matrix"
        )
    return matrices


def _roles_of(name: str) -> set[str]:
    for suffix, roles in _ROLES.items():
        if name == suffix or name.endswith(f".{suffix}"):
            return set(roles.split())
    return set()


def set_adapter_dropout(model: LanguageModel, training: bool) -> None:
    """Switch the adapters' dropout on or off.

    Other modules stay in evaluation mode: the model's own dropout (GPT-2 has some) would add noise to
    the difference between student and teacher.
    """
    for module in model.model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train(training)


def trainable_weights(model: LanguageModel) -> dict[str, nn.Parameter]:
    """The weights of the adapters, by name."""
    return {name: weight for name, weight in model.model.named_parameters() if weight.requires_grad}


class AdaptedMatrix(NamedTuple):
    """A matrix of the model with its adapter.

    Args:
        name: Dotted path in the transformers model.
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
    names = {id(module): name for name, module in model.model.named_modules()}
    for block, block_module in enumerate(model.blocks):
        for kind, module in block_module.named_modules():
            if isinstance(module, LoraLayer):
                yield _adapted_matrix(module, names[id(module)], block, kind)


@torch.no_grad()
def _adapted_matrix(module: Any, name: str, block: int, kind: str) -> AdaptedMatrix:
    (adapter,) = module.active_adapters
    base = module.get_base_layer()
    weight, delta = base.weight.float(), module.get_delta_weight(adapter).float()
    if not isinstance(base, nn.Linear):  # GPT-2's matrices are transposed
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
        mask = levels >= round(self.p * _LEVELS) - _LEVELS // 2
        return inputs * mask.to(inputs.dtype).mul_(1 / (1 - self.p))
