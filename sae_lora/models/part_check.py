"""Checks that the parts of a model compute alone what they compute in the whole model."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.models.dimensions import short_cause, stated
from sae_lora.models.language_model import LanguageModel, observed
from sae_lora.models.stand_ins import first_argument

_PROBE_TOKENS = 8


def check_parts(model: LanguageModel) -> None:
    """Check that blocks and head compute alone what they compute in the model, and only from the past.

    Each block runs alone on the output of the block before it. If each repeats its output, then every
    segment of blocks does.

    Raises:
        UserError: If a part computes something else.
    """
    sizes = stated(model.config_value)
    tokens = torch.arange(_PROBE_TOKENS, device=model.device).repeat(2, 1)
    tokens[1, -1] += 1  # the rows differ only in the last token
    tokens %= sizes["d_vocab"]
    with model.supported(), torch.no_grad():
        outputs, logits = _observe(model, tokens)
        check_shapes(model, dict(enumerate(outputs)), [*tokens.shape, sizes["d_model"]])
        for block in range(len(outputs)):
            _check_block(model, tokens, outputs, block)
        if list(logits.shape) != [*tokens.shape, sizes["d_vocab"]]:
            raise model.unsupported(
                f"its logits have the shape {list(logits.shape)} "
                f"instead of [batch, pos, d_vocab] = {[*tokens.shape, sizes['d_vocab']]}"
            )
        with model.supported("its head does not run on the last hidden state alone: "):
            repeated = model.logits(model.hidden(tokens, len(outputs), outputs[-1]))
        if not agree(repeated, logits):
            raise model.unsupported("its head reads more than the last hidden state")
        # The rows may be computed in another order, for example in other groups of experts.
        if not agree(logits[1, :-1], logits[0, :-1], 1e-3):
            raise model.unsupported("it is not causal: its logits depend on later tokens")


def _observe(model: LanguageModel, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """The output of each block, and the logits, in a forward pass of the transformers model."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        for block in model.blocks:
            handle = block.register_forward_pre_hook(
                lambda _, positional, named: inputs.append(first_argument(positional, named).clone()),
                with_kwargs=True,
            )
            hooks.callback(handle.remove)
        blocks = dict(enumerate(model.blocks))
        hooks.enter_context(observed(blocks, lambda _, output: outputs.append(output.clone())))
        logits = model.model(input_ids=tokens, use_cache=False).logits
    if len(outputs) != len(model.blocks):
        raise model.unsupported(
            f"a forward pass runs {len(outputs)} blocks, and the model has {len(model.blocks)}"
        )
    for block, output in enumerate(outputs):
        if not output.isfinite().all():
            raise model.unsupported(f"the output of block {block} holds NaN or infinity")
    if logits.isnan().any():  # a model may exclude tokens by logits of −∞
        raise model.unsupported("its logits hold NaN")
    for block in range(1, len(outputs)):
        if not torch.equal(inputs[block], outputs[block - 1]):
            raise model.unsupported(
                f"block {block} reads something else than the output of block {block - 1}"
            )
    return outputs, logits


def check_shapes(model: LanguageModel, outputs: Mapping[int, Tensor], shape: list[int]) -> None:
    """Check that the outputs of blocks, by block, have the shape `[batch, pos, d_model]`.

    Raises:
        UserError: If one has another shape.
    """
    for block, output in outputs.items():
        if list(output.shape) != shape:
            raise model.unsupported(
                f"the output of block {block} has the shape {list(output.shape)} "
                f"instead of [batch, pos, d_model] = {shape}"
            )


def runs_not_alone(model: LanguageModel, block: int, error: Exception) -> UserError:
    """The error for a block that failed on the tokens and the output of the block before it."""
    return model.unsupported(f"{_alone(block)}{short_cause(error)}")


def _alone(block: int) -> str:
    previous = f"the output of block {block - 1}" if block else "the embedding"
    return f"block {block} does not run on the tokens and {previous} alone: "


def _check_block(model: LanguageModel, tokens: Tensor, outputs: list[Tensor], block: int) -> None:
    """Check that a block alone repeats its output, and that its input stays as it is."""
    previous = f"the output of block {block - 1}" if block else "the embedding"
    resid = outputs[block - 1].clone() if block else None
    with model.supported(_alone(block)):
        repeated = model.resid_entering(block + 1, tokens, block, resid)
    if not agree(repeated, outputs[block]):
        raise model.unsupported(f"block {block} reads more than the tokens and {previous}")
    if resid is not None and not torch.equal(resid, outputs[block - 1]):
        raise model.unsupported(f"block {block} writes into its input")


def agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """True if two tensors `[..., width]` are equal at each position up to rounding.

    `tolerance` is the largest distance, as a share of the norm, in precise dtypes.
    """
    rounding = max(tolerance, 8 * torch.finfo(expected.dtype).eps)
    distance = (actual.double() - expected.double()).norm(dim=-1)
    return bool((distance <= rounding * expected.double().norm(dim=-1)).all())
