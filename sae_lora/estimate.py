"""What a run will cost, from shapes alone: floating-point operations and peak memory of its training.

Per token, with two operations to a multiply-add, and every matrix of the model counted once:

    forward   = Σ blocks (2 · matrices + 4 · context · d_attention)
    backward  = Σ live blocks (2 · matrices + 8 · context · d_attention)
    SAE       = 4 · d_model · d_sae                 adapters = 2 · their weights
    head      = 2 · d_model · d_vocab

    a training step = 2 forwards (teacher, student) + SAE + adapters
                    + 1 backward + 2 adapters (+ SAE, where adapters lie before it) + 3 heads

A block is live from the first adapted one on: the gradient passes through it. The model is frozen, so
that the gradient of its matrices is never made. Evaluations come on top.

    memory = model + SAEs + 16 bytes per adapter weight (float32: itself, gradient, AdamW's two)
           + max(what the backward pass needs, the SAEs' latents)

    what the backward pass needs, per token and live block = input and output of every matrix, in the
        precision of computing; for an adapted one rank · 4 bytes, and with dropout or a precision other
        than float32 its input once more in float32
    besides, 6 hidden states per token, and 7 float32 copies of the logits of one chunk
    latents = 3 copies, for the tokens of a training or evaluation batch

CUDA itself takes another half a gigabyte.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from torch import nn

from sae_lora.checks import adapted_blocks
from sae_lora.config import Config, DType, ModelConfig, train_steps
from sae_lora.lora import target_modules
from sae_lora.models import LanguageModel, load_shapes

_BYTES = {DType.float32: 4, DType.bfloat16: 2}


@dataclass(frozen=True)
class Estimate:
    """What the training of a run costs."""

    flops: float
    """Floating-point operations of all training steps; evaluations come on top."""
    peak_bytes: float
    """Memory at its fullest."""
    adapter_weights: int
    """Trainable parameters."""


def estimate(config: Config) -> Estimate:
    """What the run will cost. Downloads no weights, and holds none.

    Args:
        config: With its SAEs resolved. An SAE whose width is not known before loading counts as
            none.

    Raises:
        UserError: Where the model's config cannot be found or fetched.
    """
    model = _shapes(config.model.name, config.model.pinned_revision)
    first_sae = min(choice.block for choice in config.sae.used)
    first = min(adapted_blocks(config.lora.blocks, first_sae, len(model.blocks)))
    adapted = _adapted(model, config, first_sae)
    sizes = _sizes(model)
    context = config.data.context_length
    d_sae = [choice.width or 0 for choice in config.sae.used]

    attention = 4 * context * sizes.d_attention
    forward = sum(2 * sizes.weights(block) + attention for block in model.blocks)
    backward = sum(2 * sizes.weights(block) + 2 * attention for block in model.blocks[first:])
    saes = sum(4 * sizes.d_model * width for width in d_sae)
    before = [choice.block >= first for choice in config.sae.used]
    saes_backward = sum(
        4 * sizes.d_model * width for width, is_live in zip(d_sae, before, strict=True) if is_live
    )
    weights = sum(config.lora.rank * (inputs + outputs) for inputs, outputs in adapted)
    head = 2 * sizes.d_model * sizes.d_vocab
    per_token = 2 * forward + saes + 2 * weights + backward + 4 * weights + saes_backward + 3 * head
    step_tokens = config.train.batch_size * context

    computed = _BYTES[config.train.dtype]
    copies = config.lora.dropout > 0 or config.train.dtype is not DType.float32
    saved = computed * sum(
        inputs + outputs for block in model.blocks[first:] for inputs, outputs in sizes.matrices(block)
    ) + sum(4 * config.lora.rank + (4 * inputs if copies else 0) for inputs, _ in adapted)
    chunk = min(step_tokens, config.train.kl_chunk_tokens)
    needed = step_tokens * (saved + 6 * sizes.d_model * computed) + 7 * 4 * chunk * sizes.d_vocab
    sae_bytes = _BYTES[config.sae.dtype]
    batch = max(step_tokens, config.train.eval_batch_tokens)
    latents = 3 * batch * max(d_sae) * sae_bytes
    held = (
        sum(weight.numel() for weight in model.model.parameters()) * computed
        + sum(2 * sizes.d_model * width for width in d_sae) * sae_bytes
        + 16 * weights
    )
    return Estimate(
        flops=per_token * step_tokens * train_steps(config),
        peak_bytes=held + max(needed, latents),
        adapter_weights=weights,
    )


@cache
def _shapes(name: str, revision: str | None) -> LanguageModel:
    return load_shapes(ModelConfig(name=name, revision=revision))


def _adapted(model: LanguageModel, config: Config, first_sae: int) -> list[tuple[int, int]]:
    """Inputs and outputs of every adapted matrix."""
    blocks = adapted_blocks(config.lora.blocks, first_sae, len(model.blocks))
    names = target_modules(model, blocks, config.lora.targets)
    return [_inputs_and_outputs(model.model.get_submodule(name)) for name in names]


def _inputs_and_outputs(module: nn.Module) -> tuple[int, int]:
    shape = module.get_parameter("weight").shape
    return (shape[1], shape[0]) if isinstance(module, nn.Linear) else (shape[0], shape[1])


@dataclass(frozen=True)
class _Sizes:
    d_model: int
    d_vocab: int
    d_attention: int
    """Heads times their width: what scores and mixing cost depends on."""

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


def _sizes(model: LanguageModel) -> _Sizes:
    config = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _Sizes(config.hidden_size, config.vocab_size, heads * width)
