"""Cost of runs that train together, from shapes only: floating-point operations and peak memory.

Operations per token. A multiply-add counts as two; every matrix of the model counts once:

    block     = 2 · matrices + 4 · context · d_attention
    backward  = 2 · matrices + 8 · context · d_attention
    SAE       = 4 · d_model · d_sae, half of it with `sae.sparse`
    head      = 2 · d_model · d_vocab

    a training step = blocks and SAEs of the trunk + one head for every eight runs
                    + per run: blocks, their backward and SAEs of its live part (SAEs twice, for their
                               gradient; with `sae.sparse` once) + 6 · its adapters' weights + 2 heads

    other methods     mezo: blocks and SAEs of the live part twice, no backward, 4 · adapters' weights
                      linear_adapter, mlp_adapter: the first SAE once; the others as above
                      sae_finetune, e2e: an SAE three times, with `method.mse` five times
                      sae: blocks up to the last SAE, SAEs three times; no head
                      a new standard, gated or matryoshka SAE: also its own losses (`_SAE_LOSSES`)

The live part of a run begins at its first adapted block; the gradient passes through all of it. The
trunk is the teacher, and the blocks before the live parts. Each block of it is computed once for each
sequence of SAEs before the block, for any number of runs. The model is frozen: its matrices get no
gradient. Evaluations are not counted.

    memory = model + SAEs + 16 bytes per adapter weight (float32: weight, gradient, two moments of AdamW)
               (with several processes 4 more, for the exchange of gradients; for an SAE in training 24
               instead of 16: also the gradient of its own loss, and the frozen copy for evaluation)
           + max(states for the backward passes, the SAEs' latents)
           + logits: 3 float32 copies for a chunk, 2 for a few tokens
           + hidden states kept for evaluations (`train.eval_cache_gb`)
           + with method=sae, the buffer of activations; no backward pass goes through the model

    states for a backward pass, per token and live block = input and output of every matrix, in
        `train.dtype`; for an adapted matrix also rank · 4 bytes, and with dropout or a precision other
        than float32 a float32 copy of its input
        (with `train.activation_checkpointing`: those of one block, and one hidden state per block)
    also 6 hidden states per token and run; with `train.kl=full` 7 float32 copies of its logits
        (for eight runs at a time; the others wait)
    latents = 3 copies, for the tokens of a training or evaluation batch

The tokens of training are those of one pass of one process: `train.micro_batch_size`, or its share of
the batch. CUDA itself takes another half a gigabyte.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from sae_lora.config.enums import Architecture, Device, DType, KLComputation, Method, SAEFamily
from sae_lora.config.identity import ADAPTING, TRAINING_SAES, step_tokens, train_steps
from sae_lora.config.lora_targets import adapted_blocks
from sae_lora.config.schema import Config, ModelConfig, TrainConfig
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import load_shapes
from sae_lora.models.lora import selection
from sae_lora.models.matrices import BlockWeight, Selection
from sae_lora.saes.sparse import is_sparse
from sae_lora.splice.kl import room_bytes
from sae_lora.train.distill import turns

_BYTES = {DType.float32: 4, DType.bfloat16: 2}


class _SAELosses(NamedTuple):
    """Cost of sae-lens's losses of an SAE in a step, in d_model · d_sae operations per token."""

    forward: int = 4
    """The forward pass with all losses."""
    with_mse: int = 8
    """The gradient of all losses together with that of the squared error."""
    without: int = 0
    """The gradient of the losses without the squared error."""


_SAE_LOSSES = {
    Architecture.standard: _SAELosses(without=4),  # gradient of the penalty, through the encoder
    Architecture.gated: _SAELosses(10, 16, 8),  # three encoders and two decoders
    Architecture.matryoshka: _SAELosses(5, 10, 6),  # half of the decoder a second time
}
"""Architectures whose losses cost more than the squared error. Losses of dead latents are left out."""


@dataclass(frozen=True)
class Estimate:
    """Cost of the training of a pack."""

    flops: float
    """Floating-point operations of all training steps, without evaluations."""
    peak_bytes: float
    """Peak memory, in bytes."""
    adapter_weights: int
    """Number of trainable parameters of all runs."""


def estimate(configs: Sequence[Config]) -> Estimate:
    """Estimate the cost of runs that train together, without loading weights.

    Args:
        configs: Configs of the runs, with their SAEs resolved. An SAE whose width is not known before
            loading counts as having width 0.

    Raises:
        UserError: If the model's config does not exist or cannot be downloaded.
    """
    common = configs[0]
    model = _shapes(common.model.name, common.model.pinned_revision)
    sizes = _Sizes(model)
    runs = [_Run(model, config) for config in configs]
    micro_batch = common.train.micro_batch_size or common.train.batch_size
    processes = common.launcher.nodes * common.launcher.node_processes
    share = -(-common.train.batch_size // processes)
    at_once = min(share, micro_batch) * common.data.context_length
    per_token = _flops(sizes, runs, common.data.context_length)
    saes = {sae for run in runs for sae in run.saes}

    state_bytes = sizes.d_model * _BYTES[common.train.dtype]
    graphs = max(sum(turn) for turn in turns([run.saved(sizes) + 6 * state_bytes for run in runs]))
    if common.train.kl is KLComputation.full:
        graphs += 7 * 4 * sizes.d_vocab
    batch = max(at_once, common.train.eval_batch_tokens)
    latents = 3 * batch * max(sae.width * sae.bytes for sae in saes)
    exchanged = 4 if processes > 1 else 0
    held = (
        sizes.weights * _BYTES[common.train.dtype]
        + sum(2 * sizes.d_model * sae.width * sae.bytes for sae in saes)
        + sum(((24 if run.trains_saes else 16) + exchanged) * run.weights for run in runs)
        + _kept_for_logits(sizes.d_vocab, at_once, common.train)
        + _kept_for_evaluation(common, runs, state_bytes)
        + _buffered(common, saes, state_bytes)
    )
    return Estimate(
        flops=per_token * step_tokens(common) * train_steps(common),
        peak_bytes=held + max(at_once * graphs, latents),
        adapter_weights=sum(run.weights for run in runs),
    )


def _kept_for_evaluation(config: Config, runs: Sequence["_Run"], state_bytes: int) -> float:
    """Bytes of hidden states that are kept between evaluations; a state takes `state_bytes`."""
    entering = {(run.first, run.frozen) for run in runs}
    needed = (1 + len(entering)) * config.data.validation_tokens * state_bytes
    return needed if needed <= 1e9 * config.train.eval_cache_gb else 0


def _kept_for_logits(d_vocab: int, at_once: int, config: TrainConfig) -> int:
    """Bytes of the logits that are compared at once; `at_once` is the number of training tokens."""
    on_gpu = config.device is not Device.cpu and torch.cuda.is_available()
    tokens = config.eval_batch_tokens
    if config.kl is KLComputation.fused:
        tokens = max(tokens, at_once)
    return room_bytes(tokens, config.kl_chunk_tokens, d_vocab, "cuda" if on_gpu else "cpu")


def _buffered(config: Config, saes: Collection["_SAE"], state_bytes: int) -> int:
    """Bytes of the activation buffer; an activation takes `state_bytes`."""
    if config.method.kind is not Method.sae:
        return 0
    step = step_tokens(config)
    steps = max(1, min(train_steps(config), config.method.buffer_tokens // step))
    return steps * step * state_bytes * len({sae.group or sae.place for sae in saes})


def _flops(sizes: "_Sizes", runs: Sequence["_Run"], context: int) -> float:
    """Operations of a training step per token."""
    attention = 4 * context * sizes.d_attention
    forward = [
        2 * sum(inputs * outputs for inputs, outputs in block) + attention for block in sizes.blocks
    ]
    head = 2 * sizes.d_model * sizes.d_vocab
    if runs[0].kind is Method.sae:
        last = max(sae.place.block for run in runs for sae in run.saes)
        of_saes = sum(
            (run.sae_losses.forward + run.sae_losses.with_mse) * sae.width
            for run in runs
            for sae in _each_once(run.saes)
        )
        return sum(forward[: last + 1]) + sizes.d_model * of_saes

    trunk = {(block, ()) for block in range(len(forward))}
    encoded = set()
    total = head
    for run in runs:
        trunk |= {
            # Including the SAEs inside the block.
            (block, tuple(sae for sae in run.frozen if sae.place.begins <= block))
            for block in range(run.first)
        }
        encoded |= {run.frozen[: index + 1] for index in range(len(run.frozen))}
        live = forward[run.first :]
        if run.mse:  # the error of later SAEs has a gradient for earlier ones, which change their input
            last = run.live[-1].place.block
            total += sum(flops + attention for flops in forward[run.first : last + 1])
        if run.kind is Method.mezo:
            total += 2 * sum(live) + 4 * run.weights
        else:
            total += sum(live) if run.config.train.activation_checkpointing else 0
            total += sum(2 * flops + attention for flops in live)
            total += 0 if run.trains_saes else 6 * run.weights
        total += sizes.d_model * sum(
            run.times(sae, is_first=index == 0) * sae.width for index, sae in enumerate(run.live)
        )
        total += 2 * head
    total += (len(turns(runs)) - 1) * head
    total += sum(forward[block] for block, _ in trunk)
    last = [saes[-1] for saes in encoded]
    return total + sum((2 if sae.sparse else 4) * sizes.d_model * sae.width for sae in last)


@dataclass(frozen=True)
class _SAE:
    """The properties of an SAE that costs depend on, and its identity."""

    place: Place
    name: str
    width: int
    bytes: int
    """Bytes per number."""
    sparse: bool
    group: tuple[int, ...]
    """The blocks that share it; empty if it belongs to one block."""


def _each_once(saes: Sequence[_SAE]) -> list[_SAE]:
    """The SAEs; an SAE that several blocks share occurs once."""
    return list({sae.group or (sae.place, sae.name): sae for sae in saes}.values())


class _Run:
    """The properties of a run that the costs of its pack depend on."""

    def __init__(self, model: LanguageModel, config: Config) -> None:
        self.config = config
        self.kind = config.method.kind
        self.trains_saes = self.kind in TRAINING_SAES
        self.mse = self.kind is Method.sae_finetune and config.method.mse
        """True if the SAEs' squared error is part of the loss."""
        # The architecture of an existing SAE is not known before it is loaded.
        known = _SAE_LOSSES if config.sae.family is SAEFamily.new else {}
        self.sae_losses = known.get(config.sae.architecture, _SAELosses())
        self.first = first_own_block(config)
        """The first block that it computes itself."""
        self.saes = tuple(
            _SAE(
                place=Place.of(choice),
                name=f"{choice.release} {choice.id} {choice.path}",
                width=choice.width or 0,
                bytes=_BYTES[config.sae.dtype],
                sparse=is_sparse(config.sae.sparse, choice.width or 0),
                group=tuple(choice.group),
            )
            for choice in config.sae.used
        )
        self.live = tuple(
            sae for sae in self.saes if self.kind not in ADAPTING or sae.place.block >= self.first
        )
        """The SAEs that are trained, or whose input training changes."""
        self.frozen = tuple(sae for sae in self.saes if sae not in self.live)
        self.adapted: list[BlockWeight] = []
        """Every adapted weight of the model."""
        if self.kind in ADAPTING:
            self.adapted = _selection(model, config).adapted
            weights = sum(
                weight.adapter_weights(config.lora.rank, dora=config.lora.dora)
                for weight in self.adapted
            )
        else:
            d_model = model.config.hidden_size
            weights = sum(_sae_weights(config, d_model, sae.width) for sae in _each_once(self.saes))
        self.weights = weights
        """Number of trainable parameters."""

    def times(self, sae: _SAE, *, is_first: bool) -> int:
        """Operations of a live SAE per token, in units of d_model · d_sae."""
        once = 2 if sae.sparse else 4
        match self.kind:
            case Method.mezo:
                return 2 * once
            case Method.sae_finetune | Method.e2e:
                # With LoRA b_dec is not trained, so that the first SAE needs no gradient of its input.
                is_low_rank = self.kind is Method.sae_finetune and self.config.method.rank
                losses, back = self.sae_losses, 6 if is_low_rank and is_first else 8
                back_from_losses = back + losses.with_mse - 8 if self.mse else losses.without
                return losses.forward + back + back_from_losses
            case Method.linear_adapter | Method.mlp_adapter if is_first:
                return once
            case _:
                return 2 if sae.sparse else 8

    def saved(self, sizes: "_Sizes") -> int:
        """Bytes per token that are saved for the backward pass."""
        if self.kind is Method.mezo:
            return 0
        lora, train = self.config.lora, self.config.train
        copies = lora.dropout > 0 or train.dtype is not DType.float32
        live = [] if self.kind is Method.sae else sizes.blocks[self.first :]
        states = _BYTES[train.dtype] * sum(sum(shape) for block in live for shape in block)
        states += sum(4 * lora.rank + (4 * weight.inputs if copies else 0) for weight in self.adapted)
        if train.activation_checkpointing and live:
            states = len(live) * sizes.d_model * _BYTES[train.dtype] + states // len(live)
        return states + (sum(4 * 4 * sae.width for sae in self.saes) if self.trains_saes else 0)


def _sae_weights(config: Config, d_model: int, width: int) -> int:
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
    if config.method.kind not in ADAPTING:
        return min(Place.of(choice).begins for choice in config.sae.used)
    model = _shapes(config.model.name, config.model.pinned_revision)
    return min(adapted_blocks(config.lora.blocks, _first_sae(config), len(model.blocks)))


def left_out(config: Config) -> dict[str, int]:
    """Weights in the adapted blocks that stay frozen: paths inside a block, and numbers of weights.

    Weights of one dimension are not counted. Empty for methods that adapt no block.
    """
    if config.method.kind not in ADAPTING:
        return {}
    model = _shapes(config.model.name, config.model.pinned_revision)
    return _selection(model, config).left_out


_selections: dict[tuple[LanguageModel, str], Selection] = {}
"""Selections by model and by the keys that they depend on, because runs of a sweep share them."""


def _selection(model: LanguageModel, config: Config) -> Selection:
    lora, first_sae = config.lora, _first_sae(config)
    key = model, repr((first_sae, lora.blocks, lora.targets, lora.dropout > 0, lora.dora))
    if key not in _selections:
        _selections[key] = selection(model, lora, first_sae)
    return _selections[key]


def _first_sae(config: Config) -> int:
    return min(choice.block for choice in config.sae.used)


@cache
def _shapes(name: str, revision: str | None) -> LanguageModel:
    return load_shapes(ModelConfig(name=name, revision=revision))


def _inputs_and_outputs(module: nn.Module) -> tuple[int, int]:
    shape = module.get_parameter("weight").shape
    return (shape[1], shape[0]) if isinstance(module, nn.Linear) else (shape[0], shape[1])


class _Sizes:
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
