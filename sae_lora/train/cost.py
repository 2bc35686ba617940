"""What runs that train together will cost, from shapes alone: floating-point operations and peak memory.

Per token, with two operations to a multiply-add, and every matrix of the model counted once:

    block     = 2 · matrices + 4 · context · d_attention
    backward  = 2 · matrices + 8 · context · d_attention
    SAE       = 4 · d_model · d_sae, half of it with `sae.sparse`
    head      = 2 · d_model · d_vocab

    a training step = blocks and SAEs of the trunk + head, once more for every eight runs
                    + per run: blocks, their backward, SAEs (twice, for theirs, or but once with
                               `sae.sparse`) of its live part
                               + 6 · its adapters' weights + 2 heads

    other methods     mezo: blocks and SAEs of the live part twice, no backward, 4 · adapters' weights
                      linear_adapter, mlp_adapter: the first SAE once; the others as above
                      sae_finetune, e2e: an SAE three times, with `method.mse` five times
                      sae: blocks up to the last SAE, SAEs three times; no head
                      a new SAE that is standard, gated or matryoshka: what its own losses take beside
                      (`_OWN_LOSSES`)

A run's live part begins at its first adapted block; the gradient passes through all of it. The trunk is
the teacher and what lies before the live parts, each block once for every row of SAEs before it, however
many runs read it. The model is frozen, so that the gradient of its matrices is never made. Evaluations
come on top.

    memory = model + SAEs + 16 bytes per adapter weight (float32: itself, gradient, AdamW's two; with
               several processes, the gradients once more on their way; of an SAE in training 24: the
               gradient of its own loss apart, and what it is evaluated as)
           + max(what the backward passes need, the SAEs' latents)
           + room for logits: 3 float32 copies of those of a chunk, 2 of those of a few tokens
           + hidden states kept for evaluations (`train.eval_cache_gb`)
           + with method=sae, the buffer of activations; no backward pass goes through the model

    what a backward pass needs, per token and live block = input and output of every matrix, in the
        precision of computing; for an adapted one rank · 4 bytes, and with dropout or a precision other
        than float32 its input once more in float32
        (with `train.activation_checkpointing` that of one block, and a hidden state for each)
    besides, 6 hidden states per token and run; with `train.kl=full` 7 float32 copies of its logits
        (of eight runs at a time; others wait their turn)
    latents = 3 copies, for the tokens of a training or evaluation batch

Tokens of training are those of one pass of one process: `train.micro_batch_size`, or its share of the
batch.

CUDA itself takes another half a gigabyte.
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
from sae_lora.config.schema import Config, ModelConfig, SAEConfig, TrainConfig
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import load_shapes
from sae_lora.models.lora import target_modules
from sae_lora.saes.sparse import is_wide
from sae_lora.splice.head import room_bytes
from sae_lora.train.distill import turns

_BYTES = {DType.float32: 4, DType.bfloat16: 2}


class _OwnLosses(NamedTuple):
    """What sae-lens's losses of an SAE cost a step, in d_model · d_sae operations per token.

    Args:
        forward: A pass with all of them.
        with_mse: Their gradient and that of the squared error, together.
        without: Theirs alone.
    """

    forward: int = 4
    with_mse: int = 8
    without: int = 0


_OWN_LOSSES = {
    Architecture.standard: _OwnLosses(without=4),  # of the penalty, through the encoder
    Architecture.gated: _OwnLosses(10, 16, 8),  # three encoders and two decoders
    Architecture.matryoshka: _OwnLosses(5, 10, 6),  # half of the decoder once more
}
"""Where they are more than the squared error. Dead latents that are taught come on top."""


@dataclass(frozen=True)
class Estimate:
    """What the training of a pack costs."""

    flops: float
    """Floating-point operations of all training steps; evaluations come on top."""
    peak_bytes: float
    """Memory at its fullest."""
    adapter_weights: int
    """Trainable parameters, of all runs."""


def estimate(configs: Sequence[Config]) -> Estimate:
    """What the runs will cost that train together. Downloads no weights, and holds none.

    Args:
        configs: Of the runs, with their SAEs resolved. An SAE whose width is not known before loading
            counts as none.

    Raises:
        UserError: Where the model's config cannot be found or fetched.
    """
    common = configs[0]
    model = _shapes(common.model.name, common.model.pinned_revision)
    sizes = _Sizes.of(model)
    runs = [_Run.of(model, config) for config in configs]
    micro_batch = common.train.micro_batch_size or common.train.batch_size
    processes = common.launcher.nodes * common.launcher.node_processes
    share = -(-common.train.batch_size // processes)
    at_once = min(share, micro_batch) * common.data.context_length
    per_token = _flops(model, sizes, runs, common.data.context_length)
    weights = sum(run.weights for run in runs)
    saes = {sae for run in runs for sae in run.saes}

    computed = _BYTES[common.train.dtype]
    per_run = 6 * sizes.d_model * computed
    of_each = [run.saved(model, sizes, common.train.dtype) + per_run for run in runs]
    graphs = max(sum(turn) for turn in turns(of_each))
    if common.train.kl is KLComputation.full:
        graphs += 7 * 4 * sizes.d_vocab
    batch = max(at_once, common.train.eval_batch_tokens)
    latents = 3 * batch * max(sae.width * sae.bytes for sae in saes)
    held = (
        sum(weight.numel() for weight in model.model.parameters()) * computed
        + sum(2 * sizes.d_model * sae.width * sae.bytes for sae in saes)
        + sum(
            ((24 if run.trains_saes else 16) + (4 if processes > 1 else 0)) * run.weights for run in runs
        )
        + _kept_for_logits(model, at_once, common.train)
        + _kept_for_evaluation(common, runs, sizes.d_model * computed)
        + _buffered(common, saes, sizes.d_model * computed)
    )
    return Estimate(
        flops=per_token * step_tokens(common) * train_steps(common),
        peak_bytes=held + max(at_once * graphs, latents),
        adapter_weights=weights,
    )


def _kept_for_evaluation(config: Config, runs: Sequence["_Run"], state_bytes: int) -> float:
    """Bytes of hidden states that are kept from one evaluation to the next; states of a token."""
    entering = {(run.first, run.frozen) for run in runs}
    needed = (1 + len(entering)) * config.data.validation_tokens * state_bytes
    return needed if needed <= 1e9 * config.train.eval_cache_gb else 0


def _kept_for_logits(model: LanguageModel, at_once: int, config: TrainConfig) -> int:
    """Bytes of the room in which students are set beside the model."""
    on_gpu = config.device is not Device.cpu and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    tokens = config.eval_batch_tokens
    if config.kl is KLComputation.fused:
        tokens = max(tokens, at_once)
    return room_bytes(tokens, config.kl_chunk_tokens, model.config.vocab_size, device)


def _flops(model: LanguageModel, sizes: "_Sizes", runs: Sequence["_Run"], context: int) -> float:
    """Of a step, per token."""
    attention = 4 * context * sizes.d_attention
    forward = [2 * sizes.weights(block) + attention for block in model.blocks]
    head = 2 * sizes.d_model * sizes.d_vocab
    if runs[0].kind is Method.sae:
        last = max(sae.place.block for run in runs for sae in run.saes)
        of_saes = sum(
            (run.own_losses.forward + run.own_losses.with_mse) * sae.width
            for run in runs
            for sae in _each_once(run.saes)
        )
        return sum(forward[: last + 1]) + sizes.d_model * of_saes

    trunk = {(block, ()) for block in range(len(forward))}
    coded = set()
    total = head
    for run in runs:
        trunk |= {
            # With those inside of it.
            (block, tuple(sae for sae in run.frozen if sae.place < Place(block)))
            for block in range(run.first)
        }
        coded |= {run.frozen[: place + 1] for place in range(len(run.frozen))}
        live = forward[run.first :]
        if run.recomputes and run.kind is not Method.mezo:
            total += sum(live)
        if run.mse:  # what a later SAE reads is changed by those before: its error goes back to them
            last = run.live[-1].place.block
            total += sum(flops + attention for flops in forward[run.first : last + 1])
        if run.kind is Method.mezo:
            total += 2 * sum(live) + 4 * run.weights
        else:
            total += sum(2 * flops + attention for flops in live)
            total += 0 if run.trains_saes else 6 * run.weights
        total += sizes.d_model * sum(
            run.times(sae, is_first=place == 0) * sae.width for place, sae in enumerate(run.live)
        )
        total += 2 * head
    total += (len(turns(runs)) - 1) * head
    total += sum(forward[block] for block, _ in trunk)
    last = [saes[-1] for saes in coded]
    return total + sum((2 if sae.sparse else 4) * sizes.d_model * sae.width for sae in last)


@dataclass(frozen=True)
class _SAE:
    """What an SAE costs, and what tells it from another."""

    place: Place
    name: str
    width: int
    bytes: int
    """Of a number."""
    sparse: bool
    group: tuple[int, ...]
    """The blocks that share it; none where it has one to itself."""


def _each_once(saes: Sequence[_SAE]) -> list[_SAE]:
    """Without those that are the same SAE at another block."""
    return list({sae.group or (sae.place, sae.name): sae for sae in saes}.values())


@dataclass(frozen=True)
class _Run:
    """What a run adds to a pack."""

    kind: Method
    first: int
    """The first block that it computes itself."""
    adapted: list[tuple[int, int]]
    """Inputs and outputs of every adapted matrix of the model."""
    saes: tuple[_SAE, ...]
    rank: int
    dropout: float
    recomputes: bool
    """Whether activations are made once more for the backward pass."""
    weights: int
    """Trainable parameters."""
    mse: bool
    """Whether the SAEs' own error is part of the loss."""
    is_low_rank: bool
    """Whether LoRA on SAEs is what is trained."""
    own_losses: _OwnLosses
    """Of its SAEs, where they are trained."""

    @classmethod
    def of(cls, model: LanguageModel, config: Config) -> "_Run":
        size = _BYTES[config.sae.dtype]
        saes = tuple(
            _SAE(
                place=Place.of(one),
                name=f"{one.release} {one.id} {one.path}",
                width=one.width or 0,
                bytes=size,
                sparse=is_wide(one.width or 0) if config.sae.sparse is None else config.sae.sparse,
                group=tuple(one.group),
            )
            for one in config.sae.used
        )
        adapted: list[tuple[int, int]] = []
        if config.method.kind in ADAPTING:
            blocks = _adapted_blocks(config, len(model.blocks))
            names = target_modules(model, blocks, config.lora.targets)
            adapted = [_inputs_and_outputs(model.model.get_submodule(name)) for name in names]
            weights = sum(config.lora.rank * sum(shape) for shape in adapted)
            weights += sum(outputs for _, outputs in adapted) if config.lora.dora else 0
        else:
            d_model = model.config.hidden_size
            weights = sum(_own_weights(config, d_model, sae.width) for sae in _each_once(saes))
        return cls(
            kind=config.method.kind,
            first=first_own_block(config),
            adapted=adapted,
            saes=saes,
            rank=config.lora.rank,
            dropout=config.lora.dropout,
            recomputes=config.train.activation_checkpointing,
            weights=weights,
            mse=config.method.kind is Method.sae_finetune and config.method.mse,
            is_low_rank=config.method.kind is Method.sae_finetune and bool(config.method.rank),
            own_losses=_own_losses(config.sae),
        )

    @property
    def trains_saes(self) -> bool:
        """Whether SAEs are what is trained."""
        return self.kind in TRAINING_SAES

    @property
    def frozen(self) -> tuple[_SAE, ...]:
        """The SAEs that no training changes, nor what they read."""
        return tuple(sae for sae in self.saes if sae not in self.live)

    @property
    def live(self) -> tuple[_SAE, ...]:
        """The other SAEs."""
        return tuple(
            sae for sae in self.saes if self.kind not in ADAPTING or sae.place.block >= self.first
        )

    def times(self, sae: _SAE, *, is_first: bool) -> int:
        """Of what a live SAE costs per token, what d_model · d_sae is multiplied by."""
        once = 2 if sae.sparse else 4
        match self.kind:
            case Method.mezo:
                return 2 * once
            case Method.sae_finetune | Method.e2e:
                # LoRA on it moves no b_dec, to which a gradient would go through the encoder.
                own, back = self.own_losses, 6 if self.is_low_rank and is_first else 8
                of_own = back + own.with_mse - 8 if self.mse else own.without
                return own.forward + back + of_own
            case Method.linear_adapter | Method.mlp_adapter if is_first:
                return once
            case _:
                return 2 if sae.sparse else 8

    def saved(self, model: LanguageModel, sizes: "_Sizes", dtype: DType) -> int:
        """Bytes per token that its backward pass needs."""
        if self.kind is Method.mezo:
            return 0
        copies = self.dropout > 0 or dtype is not DType.float32
        live = [] if self.kind is Method.sae else model.blocks[self.first :]
        whole = _BYTES[dtype] * sum(
            inputs + outputs for block in live for inputs, outputs in sizes.matrices(block)
        ) + sum(4 * self.rank + (4 * inputs if copies else 0) for inputs, _ in self.adapted)
        if self.recomputes and len(live):
            whole = len(live) * sizes.d_model * _BYTES[dtype] + whole // len(live)
        return whole + (sum(4 * 4 * sae.width for sae in self.saes) if self.trains_saes else 0)


def _own_losses(sae: SAEConfig) -> _OwnLosses:
    """Of a new SAE; of one that is there, what it is like is not known before it is loaded."""
    is_new = sae.family is SAEFamily.new
    return _OWN_LOSSES.get(sae.architecture, _OwnLosses()) if is_new else _OwnLosses()


def _buffered(config: Config, saes: Collection[_SAE], state_bytes: int) -> int:
    """Bytes of activations that are shuffled among each other; states of a token."""
    if config.method.kind is not Method.sae:
        return 0
    step = step_tokens(config)
    steps = max(1, min(train_steps(config), config.method.buffer_tokens // step))
    return steps * step * state_bytes * len({sae.group or sae.place for sae in saes})


def _own_weights(config: Config, d_model: int, width: int) -> int:
    """Trainable parameters in the place of one SAE, which counts as two matrices and two biases."""
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
    """The first block that a run computes itself, its SAEs being resolved."""
    if config.method.kind not in ADAPTING:
        return min(Place.of(choice).begins for choice in config.sae.used)
    model = _shapes(config.model.name, config.model.pinned_revision)
    return min(_adapted_blocks(config, len(model.blocks)))


def _adapted_blocks(config: Config, n_blocks: int) -> list[int]:
    first_sae = min(choice.block for choice in config.sae.used)
    return adapted_blocks(config.lora.blocks, first_sae, n_blocks)


@cache
def _shapes(name: str, revision: str | None) -> LanguageModel:
    return load_shapes(ModelConfig(name=name, revision=revision))


def _inputs_and_outputs(module: nn.Module) -> tuple[int, int]:
    shape = module.get_parameter("weight").shape
    return (shape[1], shape[0]) if isinstance(module, nn.Linear) else (shape[0], shape[1])


@dataclass(frozen=True)
class _Sizes:
    d_model: int
    d_vocab: int
    d_attention: int
    """Heads times their width: what scores and mixing cost depends on."""

    @classmethod
    def of(cls, model: LanguageModel) -> "_Sizes":
        config = model.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.hidden_size, config.vocab_size, heads * width)

    def matrices(self, block: nn.Module) -> Sequence[tuple[int, int]]:
        """Inputs and outputs of every matrix in the block."""
        return [
            _inputs_and_outputs(module)
            for module in block.modules()
            if getattr(module, "weight", None) is not None and module.get_parameter("weight").dim() == 2
        ]

    def weights(self, block: nn.Module) -> int:
        """How many weights its matrices have."""
        return sum(inputs * outputs for inputs, outputs in self.matrices(block))
