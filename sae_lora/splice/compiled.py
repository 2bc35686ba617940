"""Blocks of a model, compiled by torch's inductor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sae_lora.models.language_model import LanguageModel

BACKEND = "inductor"
"""The compiler of torch, as `torch.compile` names it."""
_KINDS = 64
"""The number of kinds of a block's code (types of attention, shapes, with gradients or without) that
torch may compile; with its own limit of 8 it would go on without."""


class CompiledBlocks:
    """The blocks of a model, compiled when they first run; in use only inside `in_use`.

    Blocks of one structure share the compiled code. A block with an SAE inside runs as it is.

    Args:
        model: The model. Its weights may change, but not their shapes.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._blocks = [(block, _Compiled(block)) for block in model.blocks]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the `with` block, the model runs its compiled blocks."""
        from torch._dynamo import config  # takes seconds, and most processes need it not

        before = [block.__dict__.get("forward") for block, _ in self._blocks]
        try:
            for block, compiled in self._blocks:
                block.forward = compiled
            with config.patch(recompile_limit=_KINDS):
                yield
        finally:
            for (block, _), forward in zip(self._blocks, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward


class _Compiled:
    """The forward pass of a block, compiled."""

    def __init__(self, block: nn.Module) -> None:
        self._plain = block.forward
        # A symbol for the size of the batch, which differs between teacher and stacks, would make
        # compilation four times as long; the shapes of a training are few.
        self._compiled = torch.compile(block.forward, backend=BACKEND, dynamic=False)
        self._inside = [module for module in block.modules() if module is not block]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        # A hook of an SAE belongs to one pass: code compiled with it would serve no other.
        is_hooked = any(module._forward_hooks for module in self._inside)
        return (self._plain if is_hooked else self._compiled)(*arguments, **keywords)
