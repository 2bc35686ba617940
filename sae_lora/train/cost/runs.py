"""The properties of models, SAEs and runs that costs depend on."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from sae_lora.common.errors import ConfigError, UserError, listed
from sae_lora.config.enums import Architecture, Device, DType, LauncherKind, Method, SAEFamily
from sae_lora.config.identity import ADAPTING, TRAINING_SAES
from sae_lora.config.lora_targets import adapted_blocks, in_words
from sae_lora.config.schema import Config, ModelConfig, SAEChoice
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import load_shapes
from sae_lora.models.lora import selection
from sae_lora.models.matrices import Selection
from sae_lora.saes.formats import folder
from sae_lora.saes.sparse import is_sparse
from sae_lora.splice.mlp_input import reading
from sae_lora.train.cost.memory import BYTES, Adapters, CountedModel, Graph


class SAELosses(NamedTuple):
    """Cost of sae-lens's losses of an SAE in a step, in d_model · d_sae operations per token."""

    forward: int = 4
    """The forward pass with all losses."""
    with_mse: int = 8
    """The gradient of all losses together with that of the squared error."""
    without: int = 0
    """The gradient of the losses without the squared error."""


_SAE_LOSSES = {
    Architecture.standard: SAELosses(without=4),  # gradient of the penalty, through the encoder
    Architecture.gated: SAELosses(10, 16, 8),  # three encoders and two decoders
    Architecture.matryoshka: SAELosses(5, 10, 6),  # half of the decoder a second time
    # No bias of the decoder is subtracted from the input, which needs no gradient for it.
    Architecture.transcoder: SAELosses(with_mse=6, without=2),
    Architecture.batchtopk_transcoder: SAELosses(with_mse=6),
}
"""Architectures whose losses cost more than the squared error. Losses of dead latents are left out."""


class Copies(NamedTuple):
    """Copies of the latents of a frozen SAE that exist at once: before, during and after the activation.

    Counted for sae-lens's classes; a test counts them again.
    """

    encoding: float
    kept: float
    """For the backward pass, if the input has a gradient."""
    backward: float
    """At the peak of the backward pass, with those that are kept."""

    @property
    def extra(self) -> float:
        """The most that a pass adds to those that are kept."""
        return max(self.encoding, self.backward - self.kept)


COPIES = {
    Architecture.topk: Copies(2, 0, 2),
    Architecture.standard: Copies(2, 1, 3),
    Architecture.jumprelu: Copies(4, 2, 4),
    Architecture.gated: Copies(5, 2.5, 4.5),
}
OBSERVED = 2.25
"""Copies of the latents while an evaluation reads them."""


@dataclass(frozen=True)
class CountedSAE:
    """The properties of an SAE that costs depend on, and its identity."""

    place: Place
    name: str
    width: int
    bytes: int
    """Bytes per number."""
    sparse: bool
    group: tuple[int, ...]
    """The blocks that share it; empty if it belongs to one block."""

    architecture: Architecture
    transcodes: bool = False
    """True for a transcoder."""

    @property
    def copies(self) -> Copies:
        """Copies of the latents; a `SparseSAE` keeps only the active ones."""
        counted = COPIES.get(self.architecture, COPIES[Architecture.jumprelu])
        return Copies(counted.encoding, 0.1, 2.1) if self.sparse else counted

    def bytes_of(self, copies: float) -> int:
        """Bytes per token of so many copies of the latents."""
        return int(copies * self.width * self.bytes)


def each_once(saes: Sequence[CountedSAE]) -> list[CountedSAE]:
    """The SAEs; an SAE that several blocks share occurs once."""
    return list({sae.group or (sae.place, sae.name): sae for sae in saes}.values())


class CountedRun:
    """The properties of a run that the costs of its pack depend on."""

    def __init__(self, model: LanguageModel, config: Config) -> None:
        self.config = config
        self.kind = config.method.kind
        self.trains_saes = self.kind in TRAINING_SAES
        self.mse = self.kind in (Method.sae_finetune, Method.lora_sae) and config.method.mse
        """True if the SAEs' squared error is part of the loss."""
        # The architecture of an existing SAE is not known before it is loaded.
        known = _SAE_LOSSES if config.sae.family is SAEFamily.new else {}
        self.sae_losses = known.get(config.sae.architecture, SAELosses())
        self.first = first_own_block(config)
        """The first block that it computes itself."""
        device = "cuda" if runs_on_gpu(config) else "cpu"
        self.saes = tuple(
            CountedSAE(
                place=Place.of(choice),
                name=f"{choice.release} {choice.id} {choice.path}",
                width=choice.width or 0,
                bytes=BYTES[config.sae.dtype],
                sparse=is_sparse(config.sae.sparse, choice.width or 0, device),
                group=tuple(choice.group),
                architecture=_architecture(config, choice),
                transcodes=choice.reads is not None,
            )
            for choice in config.sae.used
        )
        self.compiled_bytes = _compiled_bytes(model, config) if runs_on_gpu(config) else None
        """Bytes per token that its compiled blocks keep for the backward pass; `None` if none are."""
        adapts = self.kind in ADAPTING
        self.trains_at_saes = self.trains_saes or not adapts
        """True if it trains the SAEs, or maps on their output."""
        self.live = tuple(
            sae for sae in self.saes if self.trains_at_saes or sae.place.block >= self.first
        )
        """The SAEs that are trained, or whose input training changes."""
        self.frozen = tuple(sae for sae in self.saes if sae not in self.live)
        self.d_model: int = model.config.hidden_size
        self.n_blocks = len(model.blocks)
        self.adapters = Adapters.of(config.lora) if adapts else None
        self.adapted_blocks: list[int] = []
        weights = 0
        if adapts:
            self.adapted_blocks = adapted_blocks(
                config.lora.blocks, _first_sae(config), len(model.blocks)
            )
            weights = sum(
                weight.adapter_weights(config.lora.rank, dora=config.lora.dora)
                for weight in _selection(model, config).adapted
            )
        at_saes = 0
        if self.trains_at_saes:
            at_saes = sum(sae_weights(config, self.d_model, sae.width) for sae in each_once(self.saes))
        self.weights = at_saes + (weights if config.method.lora_lr != 0 else 0)
        """Number of trainable parameters."""
        self.products = weights + (0 if self.trains_saes else at_saes)
        """Weights of adapters, and of maps on SAEs: each takes part in one product per pass."""

    def times(self, sae: CountedSAE, *, is_first: bool) -> int:
        """Operations of a live SAE per token, in units of d_model · d_sae."""
        once = 2 if sae.sparse else 4
        match self.kind:
            case Method.mezo:
                return 2 * once
            case Method.sae_finetune | Method.lora_sae | Method.e2e:
                # The first one needs a gradient of its input only if b_dec, which is subtracted from it,
                # is trained: not with LoRA, and not for a transcoder.
                is_low_rank = self.kind is Method.sae_finetune and self.config.method.rank
                needs_none = is_first and (is_low_rank or sae.transcodes)
                losses, back = self.sae_losses, 6 if needs_none else 8
                back_from_losses = back + losses.with_mse - 8 if self.mse else losses.without
                return losses.forward + back + back_from_losses
            case Method.linear_adapter | Method.mlp_adapter if is_first:
                return once
            case _:
                return 2 if sae.sparse else 8

    @property
    def kind_of_stack(self) -> tuple[object, ...] | None:
        """Runs with equal kinds are stacked; `None`: it is alone. As `splice.stack.kind_of`."""
        stacks = self.config.train.stacks_on(gpu=runs_on_gpu(self.config))
        if self.kind is not Method.lora or not stacks or self.config.lora.dora:
            return None
        return self.first, self.live, tuple(self.adapted_blocks), repr(self.config.lora.targets)

    @property
    def rounded_bytes(self) -> int:
        """Bytes of its adapters in the precision in which stacks multiply them, if they have another."""
        products = self.config.train.products_on(gpu=runs_on_gpu(self.config))
        is_stacked = self.kind_of_stack is not None or self.compiled_bytes is not None
        return BYTES[products] * self.weights if is_stacked and products is not DType.float32 else 0

    def graph(self, model: CountedModel, tokens: tuple[int, int], *, stacked: bool = False) -> Graph:
        """Memory of its forward and backward pass with `(sequences, length)` tokens.

        Args:
            model, tokens: The model and the tokens.
            stacked: True if the run is in a stack.
        """
        adapters = self.adapters and replace(self.adapters, stacked=stacked)
        if self.kind is Method.mezo:
            blocks = model.inference(tokens, self.adapters, self.adapted_blocks)
            return Graph(math.prod(tokens) * self.d_model * model.bytes, blocks)
        number = math.prod(tokens)
        of_saes = number * sum(
            sae.bytes_of(4 if self.trains_saes else sae.copies.kept) for sae in self.live
        )
        if self.kind is Method.sae:
            return Graph(0, 0, of_saes)
        graph = model.graph(
            self.first,
            tokens,
            adapters,
            self.adapted_blocks,
            through_first=self.trains_at_saes and self.first == self.live[0].place.begins,
            recomputes=self.config.train.activation_checkpointing,
        )
        # At an SAE, the later blocks have no graph yet, or none any more.
        n_live = self.n_blocks - self.first
        later = [graph.kept * (self.n_blocks - 1 - sae.place.block) / n_live for sae in self.live]
        at_saes = (
            number * sae.bytes_of(sae.copies.extra) - freed
            for sae, freed in zip(self.live, later, strict=True)
        )
        kept = graph.kept
        if self.compiled_bytes is not None:
            kept = min(kept, self.compiled_bytes * number)
        return Graph(kept, int(max(graph.extra, *at_saes, 0)), of_saes)


def runs_on_gpu(config: Config) -> bool:
    """True if the run will be on a GPU: on a cluster by what it asks for, else by this machine."""
    if config.train.device is Device.cpu:
        return False
    if config.launcher.kind is LauncherKind.slurm:
        return config.launcher.gpus_per_node > 0
    return torch.cuda.is_available()


def _architecture(config: Config, choice: SAEChoice) -> Architecture:
    """The architecture of an SAE. One in a folder states it; that of a release is known after it is
    loaded, and JumpReLU takes the most memory of the usual ones."""
    if config.sae.family is SAEFamily.new:
        return config.sae.architecture
    if config.sae.family is SAEFamily.tiny:
        return Architecture.topk
    stated = "jumprelu"
    if choice.path is not None:
        with suppress(UserError):  # the launch refuses a folder that cannot be read
            stated = folder.read(choice.path).values.get("architecture", "standard")
    return Architecture.__members__.get(stated, Architecture.jumprelu)


def sae_weights(config: Config, d_model: int, width: int) -> int:
    """Number of trainable parameters at one SAE. The SAE itself has two matrices and two biases."""
    rank = config.method.rank
    match config.method.kind:
        case Method.linear_adapter:
            return d_model * (2 * rank if rank else d_model) + d_model
        case Method.mlp_adapter:
            return 2 * d_model * (rank or d_model) + (rank or d_model) + d_model
        case Method.sae_finetune if rank:
            return 2 * rank * (d_model + width)
        case _:
            return 2 * d_model * width + width + d_model


def first_own_block(config: Config) -> int:
    """The first block that a run computes itself. Its SAEs must be resolved."""
    trained = config.method.kind not in ADAPTING or config.method.kind in TRAINING_SAES
    first = [Place.of(choice).begins for choice in config.sae.used] if trained else []
    if config.method.kind in ADAPTING:
        n_blocks = len(shapes(config.model.name, config.model.pinned_revision).blocks)
        first += adapted_blocks(config.lora.blocks, _first_sae(config), n_blocks)
    return min(first)


def check_fits(config: Config) -> None:
    """Check that the model has what a run adapts and replaces, before its weights are loaded.

    Raises:
        ConfigError: If an SAE is inside a block that has no such place, `lora.targets` names no matrix
            of the model, or a rank is larger than that of every matrix.
    """
    model = shapes(config.model.name, config.model.pinned_revision)
    for choice in config.sae.used:
        model.module_at(str(Place.of(choice)))
        if choice.reads is not None:
            with reading(model, choice.block, choice.reads):  # raises if there is none
                pass
    kind, d_model = config.method.kind, model.config.hidden_size
    if kind in ADAPTING:
        adapted = _selection(model, config).adapted
        _check_rank("lora.rank", config.lora.rank, max(min(w.inputs, w.outputs) for w in adapted))
    if kind in (Method.linear_adapter, Method.sae_finetune) and config.method.rank is not None:
        _check_rank("method.rank", config.method.rank, d_model)


def _check_rank(key: str, rank: int, largest: int) -> None:
    if rank > largest:
        allowed = f"at most {largest}: no matrix here has a larger rank"
        raise ConfigError(key, rank, allowed, nearest=largest)


def left_out(config: Config) -> dict[str, int]:
    """Weights in the adapted blocks that stay frozen: paths inside a block, and numbers of weights.

    Weights of one dimension are not counted. Empty for methods that adapt no block.
    """
    if config.method.kind not in ADAPTING:
        return {}
    model = shapes(config.model.name, config.model.pinned_revision)
    return _selection(model, config).left_out


def notes(config: Config) -> list[str]:
    """Remarks on the adapters of a run: what they leave out, and where they hardly act."""
    if config.method.kind not in ADAPTING:
        return []
    model = shapes(config.model.name, config.model.pinned_revision)
    chosen = _selection(model, config)
    made = []
    if chosen.left_out:
        made.append(f"frozen in the adapted blocks: {in_words(chosen.left_out)}")
    replaced = {choice.block for choice in config.sae.used if choice.reads is not None}
    if blocks := sorted({each.block for each in chosen.adapted if each.part == "mlp"} & replaced):
        made.append(
            f"adapters on the MLPs of blocks {listed(blocks, 50)} act only at positions that keep their "
            "activation, because transcoders replace the MLPs' outputs (see lora.targets=attn)"
        )
    return made


_selections: dict[tuple[LanguageModel, str], Selection] = {}
"""Selections by model and by the keys that they depend on, because runs of a sweep share them."""


def _selection(model: LanguageModel, config: Config) -> Selection:
    lora, first_sae = config.lora, _first_sae(config)
    key = model, repr((first_sae, lora.blocks, lora.targets, lora.dropout > 0, lora.dora))
    if key not in _selections:
        _selections[key] = selection(model, lora, first_sae)
    return _selections[key]


def _compiled_bytes(model: LanguageModel, config: Config) -> int | None:
    """Bytes per token that compiled blocks with adapters keep; `None` if not all are known.

    Compiled code keeps what its products write, and for an adapter the input that dropout leaves, with
    its mask; between these it computes again.
    """
    train, lora = config.train, config.lora
    if config.method.kind is not Method.lora or lora.dora or not train.compiles_on(gpu=True):
        return None
    selected = _selection(model, config)
    weights = [*selected.adapted, *selected.frozen]
    blocks = range(first_own_block(config), len(model.blocks))
    is_known = all(weight.experts == 1 and weight.in_module for weight in weights)
    if not is_known or {weight.block for weight in weights} != set(blocks):
        return None
    written = sum(weight.outputs for weight in weights) + len(blocks) * model.config.hidden_size
    attended = sum(weight.inputs for weight in weights if "o" in weight.roles)
    adapted = sum(weight.inputs for weight in selected.adapted)
    of_products = BYTES[train.products_on(gpu=True)] + (lora.dropout > 0)
    return BYTES[train.dtype] * (written + attended) + of_products * adapted


def _first_sae(config: Config) -> int:
    return min(choice.block for choice in config.sae.used)


@cache
def shapes(name: str, revision: str | None) -> LanguageModel:
    """The model without weights."""
    return load_shapes(ModelConfig(name=name, revision=revision))


def _inputs_and_outputs(module: nn.Module) -> tuple[int, int]:
    shape = module.get_parameter("weight").shape
    return (shape[1], shape[0]) if isinstance(module, nn.Linear) else (shape[0], shape[1])


class Sizes:
    """Sizes of a model that costs depend on."""

    def __init__(self, model: LanguageModel) -> None:
        config = model.config
        heads = getattr(config, "num_attention_heads", None) or 0  # recurrent models have none
        # Some configs state it for each block, and raise an error when it is read as one value.
        d_head = config.to_dict().get("head_dim") or getattr(config, "head_dim", None)
        self.d_model: int = config.hidden_size
        self.d_vocab: int = config.vocab_size
        self.d_attention: int = heads * (d_head or self.d_model // (heads or 1))
        """Number of heads times their width, on which the cost of attention depends."""
        self.weights = sum(weight.numel() for weight in model.model.parameters())
        self.blocks = [
            [
                _inputs_and_outputs(module)
                for module in block.modules()
                if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
                and weight.dim() == 2
            ]
            for block in model.blocks
        ]
        """Numbers of inputs and outputs of every matrix, block by block."""
