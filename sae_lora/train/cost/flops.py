"""Floating-point operations of a training step; `estimate.py` has the formula."""

from collections.abc import Sequence

from sae_lora.config.enums import (
    Method,
)
from sae_lora.train.cost.runs import CountedRun, Sizes, each_once
from sae_lora.train.distill import turns


def _forward(sizes: Sizes, context: int) -> list[float]:
    """Operations of each block per token."""
    attention = 4 * context * sizes.d_attention
    return [2 * sum(inputs * outputs for inputs, outputs in block) + attention for block in sizes.blocks]


def evaluation_flops(sizes: Sizes, runs: Sequence[CountedRun], context: int) -> tuple[float, float]:
    """Operations of the first evaluation and of each later one, per held-out token."""
    forward, head = _forward(sizes, context), 2 * sizes.d_model * sizes.d_vocab
    spliced = {run.saes for run in runs}
    first = sum(forward)  # of the plain model, whose states before the head are kept
    for saes in spliced:
        first += sum(forward[saes[0].place.begins :]) + head
        first += sum(4 * sizes.d_model * sae.width for sae in saes)
    each = head
    for run in runs:
        each += sum(forward[run.first :]) + head + 2 * run.products
        each += sum(4 * sizes.d_model * sae.width for sae in run.live)
    return first + each, each


def step_flops(sizes: Sizes, runs: Sequence[CountedRun], context: int) -> float:
    """Operations of a training step per token."""
    attention = 4 * context * sizes.d_attention
    forward = _forward(sizes, context)
    head = 2 * sizes.d_model * sizes.d_vocab
    if runs[0].kind is Method.sae:
        last = max(sae.place.block for run in runs for sae in run.saes)
        of_saes = sum(
            (run.sae_losses.forward + run.sae_losses.with_mse) * sae.width
            for run in runs
            for sae in each_once(run.saes)
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
            between = forward[run.live[0].place.begins : run.live[-1].place.block + 1]
            total += sum(flops + attention for flops in between)
        if run.kind is Method.mezo:
            total += 2 * sum(live) + 4 * run.weights
        else:
            total += sum(live) if run.config.train.activation_checkpointing else 0
            total += sum(2 * flops + attention for flops in live)
            total += (6 if run.config.method.lora_lr != 0 else 4) * run.products
        total += sizes.d_model * sum(
            run.times(sae, is_first=index == 0) * sae.width for index, sae in enumerate(run.live)
        )
        total += 2 * head
    total += (len(turns(runs)) - 1) * head
    total += sum(forward[block] for block, _ in trunk)
    last = [saes[-1] for saes in encoded]
    return total + sum((2 if sae.sparse else 4) * sizes.d_model * sae.width for sae in last)
