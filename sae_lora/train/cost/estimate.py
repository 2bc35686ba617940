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
                      a new standard, gated or matryoshka SAE: also its own losses (runs.py)

The live part of a run begins at its first adapted block; the gradient passes through all of it. The
trunk is the teacher, and the blocks before the live parts. Each block of it is computed once for each
sequence of SAEs before the block, for any number of runs. The model is frozen: its matrices get no
gradient. Evaluations are counted apart: the first with the trunk and the spliced models, the others with
the live parts alone, because their inputs are kept.

    memory of a process = Python and the imported libraries on a CPU, or CUDA itself (memory.py)
             + model (with `launcher.shard`: its share of the blocks, and three whole blocks; while it
               is loaded in another precision than its files have: also the files)
             + SAEs (with `launcher.shard`: its share, and two whole matrices)
             + 12 bytes per adapter weight (float32: weight, two moments of AdamW; 14 with the copy in
               bfloat16 that stacks multiply; for an SAE in training 20: also the gradient of its own
               loss, and the frozen copy for evaluation)
             + logits: 3 float32 copies for a chunk, 2 for a few tokens
             + hidden states kept for evaluations (`train.eval_cache_gb`)
             + with method=sae, the buffer of activations; no backward pass goes through the model
             + max(a pass of the training, a batch of an evaluation, the gradients of all weights)

    a pass of the training = hidden states of the trunk + for each run the states for its backward pass
                             and the gradient of its last hidden state + the most that the backward
                             pass, the KL or the SAEs add (for eight runs at a time; the others wait;
                             for all runs of a stack)
    a batch of an evaluation = hidden states of the trunk and of each run + the most that a block or
                               the latents of an SAE take

    Blocks are counted on the meta device (memory.py), and what compiled ones keep from the widths of
    their matrices (runs.py); on a CPU, what blocks keep for a backward pass takes
    1.75 times its size, for holes in the heap. SAEs: 2 to 5 copies of the latents exist at once, by the
    architecture (runs.py); for the backward pass of an SAE in training 4 are kept, of a dense SAE with
    live input 0 to 2.5.

The tokens of training are those of one pass of one process: `train.micro_batch_size`, or its share of
the batch.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from sae_lora.config.enums import KLComputation, Method
from sae_lora.config.identity import step_tokens, train_steps
from sae_lora.config.schema import Config, TrainConfig
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.kl import room_bytes
from sae_lora.train.cost.flops import evaluation_flops, step_flops
from sae_lora.train.cost.memory import BYTES, CUDA_BYTES, HEAP, PROCESS_BYTES, CountedModel
from sae_lora.train.cost.runs import OBSERVED, CountedRun, CountedSAE, Sizes, runs_on_gpu, shapes
from sae_lora.train.distill import turns

GRADIENT = 4
"""Bytes of the gradient of a trained weight."""
_WHOLE_BLOCKS = 3
"""Blocks of a divided model that are whole at once: the one that runs, twice, because torch copies what
it has gathered, and the next one."""
_WHOLE_MATRICES = 2
"""Matrices of divided SAEs that are whole at once: one, and what torch has copied it from."""


@dataclass(frozen=True)
class Estimate:
    """Cost of the training of a pack."""

    flops: float
    """Floating-point operations of all training steps, without evaluations."""
    evaluation_flops: float
    """Floating-point operations of all evaluations on the held-out tokens."""
    peak_bytes: float
    """Peak memory, in bytes."""
    adapter_weights: int
    """Number of trainable parameters of all runs."""


def estimate(configs: Sequence[Config], divided: bool | None = None) -> Estimate:
    """Estimate the cost of runs that train together, without loading weights.

    Args:
        configs: Configs of the runs, with their SAEs resolved. An SAE whose width is not known before
            loading counts as having width 0.
        divided: True if the processes divide the model's weights; `None`: as `launcher.shard`, with auto
            as off.

    Raises:
        UserError: If the model's config does not exist or cannot be downloaded.
    """
    common = configs[0]
    model = shapes(common.model.name, common.model.pinned_revision)
    sizes = Sizes(model)
    runs = [CountedRun(model, config) for config in configs]
    per_token = step_flops(sizes, runs, common.data.context_length)
    return Estimate(
        flops=per_token * step_tokens(common) * train_steps(common),
        evaluation_flops=_evaluation_flops(sizes, runs),
        peak_bytes=_peak_bytes(
            model, sizes, runs, bool(common.launcher.shards) if divided is None else divided
        ),
        adapter_weights=sum(run.weights for run in runs),
    )


def _evaluation_flops(sizes: Sizes, runs: Sequence[CountedRun]) -> float:
    """Operations of all evaluations: before training, after its last step, and those between."""
    config = runs[0].config
    tokens, train = config.data.validation_tokens, config.train
    first, each = evaluation_flops(sizes, runs, config.data.context_length)
    return tokens * (first + each * math.ceil(train.train_tokens / train.eval_every_tokens))


def _peak_bytes(model: LanguageModel, sizes: Sizes, runs: Sequence[CountedRun], divided: bool) -> float:
    """Peak memory of one process of a pack."""
    common = runs[0].config
    data, train = common.data, common.train
    on_gpu = runs_on_gpu(common)
    processes = common.launcher.nodes * common.launcher.node_processes
    share = -(-train.batch_size // processes)
    trained = min(share, train.micro_batch_size or share), data.context_length
    sequences = min(train.eval_batch_tokens, data.validation_tokens) // data.context_length
    evaluated = max(1, sequences), data.context_length
    state_bytes = sizes.d_model * BYTES[train.dtype]
    counted = CountedModel(
        common.model.name, common.model.pinned_revision, train.dtype, common.model.attention, on_gpu
    )
    saes = {sae for run in runs for sae in run.saes}
    gradients = GRADIENT * sum(run.weights for run in runs)
    weights, of_saes = sizes.weights, [2 * sizes.d_model * sae.width * sae.bytes for sae in saes]
    at_once: float = sum(of_saes)
    if divided and not runs[0].trains_saes:
        at_once = sum(of_saes) / processes + _WHOLE_MATRICES * max(of_saes, default=0) / 2
    if divided:
        blocks = [sum(weight.numel() for weight in block.parameters()) for block in model.blocks]
        weights += sum(blocks) / processes - sum(blocks) + _WHOLE_BLOCKS * max(blocks)
    held = (
        weights * BYTES[train.dtype]
        + at_once
        + sum(((24 if run.trains_saes else 16) - GRADIENT) * run.weights for run in runs)
        + sum(run.rounded_bytes for run in runs)
        + _kept_for_logits(sizes.d_vocab, math.prod(trained), train, on_gpu)
        + _kept_for_evaluation(common, runs, state_bytes)
        + _buffered(common, saes, state_bytes)
    )
    before = gradients if share > trained[0] else 0  # of the other parts of the step
    passes = max(
        before
        + _training(counted, sizes, runs, trained, state_bytes, 1 if on_gpu else HEAP, not divided),
        _evaluation(counted, runs, evaluated, state_bytes),
        gradients * (2 if processes > 1 else 1),  # at the end of the step, with a copy that is exchanged
    )
    if on_gpu:
        return CUDA_BYTES + held + passes
    return PROCESS_BYTES + max(held + passes, sizes.weights * _loading(model, common))


def _loading(model: LanguageModel, config: Config) -> int:
    """Peak bytes per weight while a model is loaded into main memory.

    Its files are mapped into memory, and are its weights if precisions agree.
    """
    files: torch.dtype = getattr(model.config, "dtype", None) or torch.float32
    loaded, computed = (getattr(torch, dtype.name) for dtype in (config.model.dtype, config.train.dtype))
    copied = loaded if files is not loaded else computed if computed is not loaded else None
    return files.itemsize + (copied.itemsize if copied else 0)


def _training(
    model: CountedModel,
    sizes: Sizes,
    runs: Sequence[CountedRun],
    tokens: tuple[int, int],
    state_bytes: int,
    heap: float,
    stacks: bool,
) -> float:
    """Peak bytes of one pass of the training, with `(sequences, length)` tokens.

    Each backward pass frees the states of its runs and leaves the gradients of their weights. `heap` is
    the memory of the states that blocks keep, relative to these. `stacks` is false for a divided
    model, whose runs compute alone.
    """
    size = math.prod(tokens)
    state = size * state_bytes
    latents: list[float] = [
        size * sae.bytes_of(sae.copies.encoding) for run in runs for sae in run.frozen
    ]
    full = runs[0].config.train.kl is KLComputation.full and runs[0].kind is not Method.sae
    logits = 6 * 4 * sizes.d_vocab * size if full else 0
    peaks = latents  # of the trunk, before the students
    gradients = 0
    for turn in turns(runs):
        groups = _stacks(turn) if stacks else [[run] for run in turn]
        graphs = [
            [run.graph(model, tokens, stacked=len(stack) > 1) for run in stack] for stack in groups
        ]
        # And the gradient of the last state; a stack puts those of its runs together.
        kept = [
            sum(heap * graph.kept + graph.of_saes + min(len(stack), 2) * state for graph in stack)
            for stack in graphs
        ]
        peaks.append(gradients + sum(kept) + logits)
        for number, (stack, of_runs) in enumerate(zip(groups, graphs, strict=True)):
            extra = sum(graph.extra for graph in of_runs)
            peaks.append(gradients + sum(kept[number:]) + extra)
            gradients += GRADIENT * sum(run.weights for run in stack)
    return state * _states_of_trunk(runs) + max(peaks)


def _stacks(turn: Sequence[CountedRun]) -> list[list[CountedRun]]:
    """The runs that compute a batch together, and those that do it alone."""
    stacks: dict[object, list[CountedRun]] = {}
    for run in turn:
        stacks.setdefault(run.kind_of_stack or run, []).append(run)
    return list(stacks.values())


def _evaluation(
    model: CountedModel, runs: Sequence[CountedRun], tokens: tuple[int, int], state_bytes: int
) -> float:
    """Peak bytes of the evaluation of a batch with `(sequences, length)` tokens."""
    number = math.prod(tokens)
    latents = number * max(
        sae.bytes_of(max(sae.copies.encoding, OBSERVED)) for run in runs for sae in run.saes
    )
    of_reading = 4 * 8 * number * state_bytes // model.bytes  # float64 copies of input and output
    blocks = max(model.inference(tokens, run.adapters, run.adapted_blocks) for run in runs)
    states = number * state_bytes * (_states_of_trunk(runs) + len(runs))
    return states + max(blocks, latents + of_reading)


def _states_of_trunk(runs: Sequence[CountedRun]) -> int:
    """Hidden states of a batch that exist at once, besides those of the students.

    Those of the plain model, before its head and after each SAE; and those with the SAEs.
    """
    entering = {(run.first, run.frozen) for run in runs}
    spliced = {run.saes for run in runs}
    return 1 + len({sae.place for run in runs for sae in run.saes}) + len(entering) + len(spliced)


def _kept_for_evaluation(config: Config, runs: Sequence[CountedRun], state_bytes: int) -> float:
    """Bytes of hidden states that are kept between evaluations; a state takes `state_bytes`."""
    entering = {(run.first, run.frozen) for run in runs}
    needed = (1 + len(entering)) * config.data.validation_tokens * state_bytes
    return needed if needed <= 1e9 * config.train.eval_cache_gb else 0


def _kept_for_logits(d_vocab: int, at_once: int, config: TrainConfig, on_gpu: bool) -> int:
    """Bytes of the logits that are compared at once; `at_once` is the number of training tokens."""
    tokens = config.eval_batch_tokens
    if config.kl is KLComputation.fused:
        tokens = max(tokens, at_once)
    return room_bytes(tokens, config.kl_chunk_tokens, d_vocab, "cuda" if on_gpu else "cpu")


def _buffered(config: Config, saes: Collection[CountedSAE], state_bytes: int) -> int:
    """Bytes of the activation buffer; an activation takes `state_bytes`."""
    if config.method.kind is not Method.sae:
        return 0
    step = step_tokens(config)
    steps = max(1, min(train_steps(config), config.method.buffer_tokens // step))
    return steps * step * state_bytes * len({sae.group or sae.place for sae in saes})
