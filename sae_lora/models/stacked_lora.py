"""LoRA adapters of several runs in one model: each run has its rows of the batch, and its own adapters.

A frozen matrix multiplies the rows of all runs at once. The adapters of one matrix are batched products,
one for all runs whose ranks are similar: on a GPU a smaller number of larger kernels.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sae_lora.models import lora
from sae_lora.models.language_model import LanguageModel

Draw = Callable[[int, Tensor], object]
"""Fills int64 `[word]` with the next random words of a run, given its number."""


def can_stack(model: LanguageModel) -> bool:
    """True if all adapters of a model are plain LoRA on matrices of modules of its own."""
    return all(_is_plain(layer) for layer in lora.adapters_by_weight(model).values())


def _is_plain(layer: Any) -> bool:
    is_matrix = type(layer.get_base_layer()) in (nn.Linear, Conv1D)
    return is_matrix and not layer.lora_variant and list(layer.lora_A) == ["default"]


class StackedModel:
    """A view of a model in which the adapters of several runs act, each on its rows of the batch.

    The weights of the runs become views of larger tensors, so that both see every change.

    Args:
        model: The plain model.
        runs: The models of the runs, with adapters at the same matrices; see `can_stack`. The rows of
            the batch belong to them in this order, and are equally many. They are in the order of
            `padded_rank`.
    """

    def __init__(self, model: LanguageModel, runs: Sequence[LanguageModel]) -> None:
        self.view = model.view()
        of_runs = [lora.adapters_by_weight(run) for run in runs]
        self._draws = _Draws()
        self._layers = []
        for name in of_runs[0]:
            layers = [of_run[name] for of_run in of_runs]
            stacked = StackedLoRA(layers, self._draws)
            self.view.model.set_submodule(name.removesuffix(".weight"), stacked)
            self._layers.append(stacked)

    def begin(self, draw: Draw | None) -> None:
        """Prepare a forward pass: read the weights of the runs. Without `draw`, there is no dropout."""
        self._draws.draw = draw
        with torch.no_grad():
            for layer in self._layers:
                layer.read()

    def give_gradients(self) -> None:
        """Give the runs the gradients of their weights, after a backward pass."""
        for layer in self._layers:
            layer.give_gradients()

    def forget_gradients(self) -> None:
        """Begin a step without gradients."""
        for layer in self._layers:
            layer.zero_grad(set_to_none=True)


class _Draws:
    """The random words of a pass. The layers of a model share one."""

    draw: Draw | None = None


class StackedLoRA(nn.Module):
    """A frozen matrix with one adapter for each run.

    Args:
        layers: peft's adapters of the matrix, one for each run, in the order of `padded_rank`.
        draws: The random words of dropout.
    """

    def __init__(self, layers: Sequence[LoraLayer], draws: _Draws) -> None:
        super().__init__()
        self.base_layer = layers[0].get_base_layer()
        self._draws = draws
        self._shares = [lora.dropout_share(layer) for layer in layers]
        device = layers[0].lora_A["default"].weight.device
        thresholds = [lora.dropout_threshold(share) for share in self._shares]
        self._thresholds = torch.tensor(thresholds, dtype=torch.int16, device=device)[:, None]
        scales = [layer.scaling["default"] for layer in layers]
        self._scales = torch.tensor(scales, device=device)[:, None, None]
        kept = [1 - share for share in self._shares]
        self._dropout_scales = self._scales / torch.tensor(kept, device=device)[:, None, None]
        self._pairs: list[tuple[nn.Parameter, nn.Parameter, tuple[Any, ...]]] = []
        """Each weight of a run, the stack that it is in, and its place there."""
        self._runs: list[slice] = []
        """The runs of each batched product."""
        self.stacks = nn.ParameterList()
        """A `[run, rank, input]` and B `[run, output, rank]` of each batched product. Beyond the rank of
        a run they are zero, and so are their gradients."""
        for _, members in groupby(layers, lambda layer: padded_rank(layer.r["default"])):
            self._add(list(members))

    def _add(self, layers: Sequence[LoraLayer]) -> None:
        """Add a batched product for these runs."""
        first = self._runs[-1].stop if self._runs else 0
        self._runs.append(slice(first, first + len(layers)))
        weights = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
        (some_a, some_b), rank = weights[0], padded_rank(layers[0].r["default"])
        a_stack = nn.Parameter(some_a.new_zeros(len(layers), rank, some_a.shape[1]))
        b_stack = nn.Parameter(some_b.new_zeros(len(layers), some_b.shape[0], rank))
        for run, (a, b) in enumerate(weights):
            self._pairs.append((a, a_stack, (run, slice(len(a)))))
            self._pairs.append((b, b_stack, (run, slice(None), slice(b.shape[1]))))
        self.stacks.extend([a_stack, b_stack])
        for weight, stack, place in self._pairs[-2 * len(layers) :]:
            view = stack.data[place]
            view.copy_(weight.data)
            if view.is_contiguous():  # as AdamW's kernels need it
                weight.data = view

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some models read its dtype."""
        return self.base_layer.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # pyright: ignore[reportReturnType]

    def read(self) -> None:
        """Copy the weights of the runs that are no views of the stacks."""
        for weight, stack, place in self._pairs:
            view = stack.data[place]
            if weight.data_ptr() != view.data_ptr() or not view.is_contiguous():
                view.copy_(weight.data)

    def give_gradients(self) -> None:
        """Set the gradients of the runs' weights."""
        for weight, stack, place in self._pairs:
            assert stack.grad is not None
            weight.grad = stack.grad[place].contiguous()

    def forward(self, inputs: Tensor) -> Tensor:
        """The output `[run · sequence, ..., output]` of inputs `[run · sequence, ..., input]`."""
        mask = None if self._draws.draw is None else self._mask(inputs, self._draws.draw)
        scales = self._scales if mask is None else self._dropout_scales
        matrix = self.weight if isinstance(self.base_layer, nn.Linear) else self.weight.T
        return _Adapted.apply(inputs, matrix, self.bias, mask, scales, self._runs, *self.stacks)

    def _mask(self, inputs: Tensor, draw: Draw) -> Tensor | None:
        """True where a run keeps an input, `[run, row, input]`; the same masks as `lora.Dropout`."""
        if not any(self._shares):
            return None
        n_runs, width = len(self._shares), inputs.shape[-1]
        number = inputs.numel() // n_runs
        words = torch.zeros(n_runs, -(-number // 4), dtype=torch.int64, device=inputs.device)
        for run, share in enumerate(self._shares):
            if share:
                draw(run, words[run])
        levels = words.view(torch.int16)[:, :number]
        return (levels >= self._thresholds).view(n_runs, -1, width)


_RANKS = 16
"""The smallest padded rank: what the matrix units of a GPU multiply at least."""


def padded_rank(rank: int) -> int:
    """The rank to which an adapter is padded with zeros, so that runs share a product: 16, 64, 256, …"""
    padded = _RANKS
    while padded < rank:
        padded *= 4
    return padded


class _Adapted(Function):
    """The product with a frozen matrix, and the adapters of several runs, with their gradients.

    Inputs under the mask are computed again in the backward pass. What torch would keep for it takes
    several times the memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scales: Tensor,
        runs: Sequence[slice],
        *stacks: Tensor,
    ) -> Tensor:
        output = functional.linear(inputs, matrix, bias)
        by_run = output.view(len(scales), -1, output.shape[-1])
        kept = _kept(inputs, mask, len(scales), stacks[0].dtype)
        lowered = []
        for which, a, b in zip(runs, stacks[::2], stacks[1::2], strict=True):
            low = torch.bmm(kept[which], a.mT).mul_(scales[which])
            _add_product(by_run[which], low, b.mT)
            lowered.append(low)
        ctx.runs = runs
        ctx.save_for_backward(inputs, matrix, mask, scales, *stacks, *lowered)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        inputs, matrix, mask, scales, *rest = ctx.saved_tensors
        n_runs, n_groups = len(scales), len(ctx.runs)
        stacks, lowered = rest[: 2 * n_groups], rest[2 * n_groups :]
        (gradient,) = gradients
        of_inputs = gradient @ matrix if ctx.needs_input_grad[0] else None
        kept = _kept(inputs, mask, n_runs, stacks[0].dtype)
        by_run = gradient.reshape(n_runs, -1, gradient.shape[-1]).to(stacks[0].dtype)
        of_stacks: list[Tensor] = []
        for which, low, a, b in zip(ctx.runs, lowered, stacks[::2], stacks[1::2], strict=True):
            of_low = torch.bmm(by_run[which], b).mul_(scales[which])
            of_stacks += [torch.bmm(of_low.mT, kept[which]), torch.bmm(by_run[which].mT, low)]
            if of_inputs is None:
                continue
            into = of_inputs.view(n_runs, -1, of_inputs.shape[-1])[which]
            if mask is None:
                _add_product(into, of_low, a)
            else:
                into += torch.bmm(of_low, a).mul_(mask[which])
        return of_inputs, None, None, None, None, None, *of_stacks


def _kept(inputs: Tensor, mask: Tensor | None, n_runs: int, dtype: torch.dtype) -> Tensor:
    """The inputs that dropout keeps, and zeros, `[run, row, input]`."""
    by_run = inputs.reshape(n_runs, -1, inputs.shape[-1])
    return (by_run if mask is None else by_run * mask).to(dtype)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a batched product to a tensor, which may have less precision."""
    if to.dtype == left.dtype:
        to.baddbmm_(left, right)
    else:
        to += torch.bmm(left, right)
