"""The adapters, through peft: which matrices of which blocks, fresh, saved, loaded and merged."""

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import Initialisation
from sae_lora.config.lora_targets import adapted_blocks, listed_matrices, target_matrices
from sae_lora.config.schema import LoRAConfig
from sae_lora.dropout import Dropout
from sae_lora.models import LanguageModel

_ROLES: dict[str, frozenset[str]] = {
    name: frozenset(roles.split())
    for name, roles in {
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
    }.items()
}
"""What a matrix does, by the end of its name. Fused matrices do several things at once."""


_MORE_DIRECTIONS = 16
"""Are looked for than are needed: the last of them are inexact."""


def attach(model: LanguageModel, config: LoRAConfig, first_sae: int) -> PeftModel:
    """Puts fresh adapters into the model (B = 0: they change nothing yet).

    Initial values come from torch's global random state.

    Args:
        model: The language model; changed in place.
        config: Rank, scale and where.
        first_sae: Block of the first SAE; `blocks=after` begins behind it.

    Returns:
        peft's view of the same model, for saving.

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
    """Turns the rows of A to the largest right-singular vectors of the matrix, as far as it has any.

    They are as long as peft's are on average, 1 / √3.
    """
    base = module.get_base_layer()
    weight = base.weight.float() if isinstance(base, nn.Linear) else base.weight.float().T
    for adapter in module.lora_A.values():
        rank = min(adapter.weight.shape[0], *weight.shape)
        wanted = min(rank + _MORE_DIRECTIONS, *weight.shape)
        _, _, directions = torch.svd_lowrank(weight, wanted, niter=4)
        adapter.weight[:rank] = directions.T[:rank] / 3**0.5


def replace_dropout(model: LanguageModel, kind: Callable[[float], nn.Module]) -> None:
    """Has another module drop the adapters' inputs, where any are dropped.

    Args:
        model: The model, adapters in place.
        kind: Makes the module, of the share that is dropped.
    """
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
    found: list[str] = []
    roles_seen: set[str] = set()
    for block in blocks:
        for module in model.blocks[block].modules():
            name = names[id(module)]
            roles = _roles_of(name) if not isinstance(module, nn.ModuleList) else frozenset()
            roles_seen |= roles
            if roles and roles <= wanted:
                found.append(name)
            elif roles & wanted:
                fused = "".join(matrix for matrix in ("q", "k", "v", "gate", "up") if matrix in roles)
                raise ConfigError(
                    "lora.targets",
                    targets,
                    "a set that takes all or none of them",
                    nearest="qkv" if fused == "qkv" else "mlp",
                    because=f"this model holds {fused} in one matrix ({name})",
                )
    if not found:
        raise ConfigError(
            "lora.targets", targets, listed_matrices(roles_seen), because="this model has no such matrix"
        )
    return found


def _roles_of(name: str) -> frozenset[str]:
    for end, roles in _ROLES.items():
        if name == end or name.endswith(f".{end}"):
            return roles
    return frozenset()


def set_adapter_dropout(model: LanguageModel, training: bool) -> None:
    """Switches the adapters' dropout on or off.

    The rest of the model stays in evaluation mode: its own dropout (GPT-2 has some) would make
    student and teacher differ for no reason.
    """
    for module in model.model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train(training)


def trainable_weights(model: LanguageModel) -> dict[str, nn.Parameter]:
    """The adapters' weights by name: all that an optimiser may move."""
    return {name: weight for name, weight in model.model.named_parameters() if weight.requires_grad}


def save(adapters: PeftModel, folder: Path, base_model: str) -> None:
    """Writes the adapters in peft's format, for `PeftModel.from_pretrained`.

    Args:
        adapters: What `attach` returned.
        folder: Where.
        base_model: Repository or folder of the model they belong to.
    """
    adapters.peft_config["default"].base_model_name_or_path = base_model
    # No embedding is adapted; asked to find that out itself, peft would look the base model up online.
    adapters.save_pretrained(str(folder), save_embedding_layers=False)


def load(model: LanguageModel, folder: Path) -> PeftModel:
    """Puts saved adapters into the model, frozen and without dropout.

    Args:
        model: The language model they belong to; changed in place.
        folder: Where `save` wrote them.

    Returns:
        peft's view of the same model.

    Raises:
        UserError: Where they are missing, damaged, or another model's.
    """
    try:
        with warnings.catch_warnings():
            # peft goes on without weights that the file lacks, and only warns of it.
            warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            adapters = PeftModel.from_pretrained(
                model.model, str(folder), torch_device=str(model.device)
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UserWarning) as error:
        raise UserError(f"the adapters in {folder} cannot be loaded: {error}") from error
    return adapters.eval()


def begin_with(adapters: PeftModel, folder: Path) -> None:
    """Gives fresh adapters the values of saved ones.

    Args:
        adapters: What `attach` returned.
        folder: Where `save` wrote adapters of the same shape.

    Raises:
        UserError: Where they are missing, damaged or of another shape.
    """
    try:
        given = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        result = set_peft_model_state_dict(adapters, given)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"init: the adapters in {folder} cannot be loaded: {error}") from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise UserError(
            f"init: the adapters in {folder} belong to other matrices than lora.targets and lora.blocks "
            f"name, such as {[*missing, *result.unexpected_keys][0]}"
        )


class AdaptedMatrix(NamedTuple):
    """A matrix of the model, and what its adapter makes of it.

    Args:
        name: Its dotted path in the transformers model.
        block: The block that it is in.
        kind: Its path inside of the block, such as `self_attn.q_proj`.
        reads_stream: Whether it reads the residual stream (through a norm), rather than what attention
            or MLP have made of it.
        weight: W, `[output, input]`, without the adapter.
        delta: ΔW, the same shape: what it has become less W.
        a: A, `[rank, input]`.
        b: B, `[output, rank]`.
        scale: Of B · A, which is ΔW where there is no magnitude.
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
        """How many weights the adapter has."""
        magnitude = 0 if self.magnitude is None else self.magnitude.numel()
        return self.a.numel() + self.b.numel() + magnitude


def adapted_matrices(model: LanguageModel) -> Iterator[AdaptedMatrix]:
    """The matrices that have adapters, block by block; one at a time, as they may be large.

    Args:
        model: The model, adapters in place.
    """
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


_A_IN_FILE = ".lora_A.weight"


def saved_inputs(folder: Path) -> list[tuple[str, int]]:
    """The matrices of saved adapters, by name, and how many inputs each has; no weights are read.

    Args:
        folder: Where `save` wrote them.

    Raises:
        UserError: Where they are missing or damaged.
    """
    with _opened(folder) as file:
        keys = _keys_of_a(file)
        return sorted((name, int(file.get_slice(key).get_shape()[1])) for name, key in keys.items())


def saved_a(folder: Path, name: str) -> Tensor:
    """A of one matrix of saved adapters, `[rank, input]`.

    Args:
        folder: Where `save` wrote them.
        name: The matrix, as `saved_inputs` has it.

    Raises:
        UserError: Where they are missing or damaged.
    """
    with _opened(folder) as file:
        return file.get_tensor(_keys_of_a(file)[name])


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    path = weights_file(folder)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"the adapters in {folder} cannot be read: {error}") from error


def _keys_of_a(file: Any) -> dict[str, str]:
    """A's keys in a file by the dotted path of the matrix in the transformers model.

    peft's own view of that lies around it.
    """
    keys: list[str] = file.keys()
    return {
        key.removeprefix("base_model.model.").removesuffix(_A_IN_FILE): key
        for key in keys
        if key.endswith(_A_IN_FILE)
    }


def weights_file(folder: Path) -> Path:
    """The file in a folder of saved adapters that holds their weights."""
    return folder / SAFETENSORS_WEIGHTS_NAME


def merged(adapters: PeftModel) -> PreTrainedModel:
    """The model with the adapters added to its weights, which are changed in place."""
    return adapters.merge_and_unload()  # pyright: ignore[reportReturnType]


def republish(folder: Path, to: Path, base_model: str | None, revision: str | None) -> None:
    """Writes saved adapters once more, with another word on which model they belong to.

    Args:
        folder: Where `save` wrote them.
        to: A folder that is there.
        base_model: Repository of that model; `None` where it is in none.
        revision: Its commit.

    Raises:
        UserError: Where they are missing or damaged.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        load_file(weights)  # a file that is cut short is found here
        config = PeftConfig.from_pretrained(str(folder))
        shutil.copyfile(weights, to / weights.name)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapters in {folder} cannot be read: {error}") from error
    config.base_model_name_or_path = base_model
    config.revision = revision
    config.save_pretrained(str(to))
