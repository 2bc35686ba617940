"""LoRA adapters of several runs in one model: each run has its rows of the batch, and its own adapters.

A frozen matrix multiplies the rows of all runs at once. The adapters of one matrix are batched products,
one for all runs whose ranks are similar: on a GPU a smaller number of larger kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from sae_lora.models import lora
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.lora import PlainAdapter
from sae_lora.models.stand_ins import first_argument

Draw = Callable[[int, Tensor], object]
"""Fills int64 `[word]` with the next random words of a run, given its number."""


class StackedModel:
    """A view of a model in which the adapters of several runs act, each on its rows of the batch.

    The weights of the runs become views of larger tensors, so that both see every change.

    Args:
        model: The plain model.
        runs: The adapters of each run, at the same matrices, by the dotted path of their modules. The
            rows of the batch belong to the runs in this order, which is that of `padded_rank`, and are
            equally many.
        dtype: The precision in which adapters are multiplied. Their weights are float32.
    """

    def __init__(
        self,
        model: LanguageModel,
        runs: Sequence[Mapping[str, PlainAdapter]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.view = model.view()
        self._draw: Draw | None = None
        self._layers: list[StackedLoRA] = []
        for name in runs[0]:
            stacked = StackedLoRA([adapters[name] for adapters in runs], dtype)
            self.view.model.set_submodule(name, stacked)
            self._layers.append(stacked)
        shares = [next(iter(adapters.values())).dropout for adapters in runs]
        if any(shares):
            order = self._order(len(runs))
            for block in self.view.blocks:
                inside = set(block.modules())
                if layers := [layer for layer in order if layer in inside]:
                    self._drop_inputs(block, _Masks(layers, shares, model.device))

    def begin(self, draw: Draw | None) -> None:
        """Prepare a forward pass: read the weights of the runs. Without `draw`, there is no dropout."""
        self._draw = draw
        with torch.no_grad():
            for layer in self._layers:
                layer.read()
            rounded = [stack for layer in self._layers for stack in layer.rounded]
            if rounded:  # all at once, in few kernels
                stacks = [stack for layer in self._layers for stack in layer.stacks]
                torch._foreach_copy_(rounded, stacks)  # pyright: ignore[reportPrivateImportUsage]

    def give_gradients(self) -> None:
        """Add the gradients of a backward pass to those of the runs' weights."""
        with torch.no_grad():
            for layer in self._layers:
                layer.give_gradients()

    @torch.no_grad()
    def _order(self, n_runs: int) -> list["StackedLoRA"]:
        """The layers in the order in which the model calls them, which is that of their masks."""
        if self.view.device.type == "meta":  # without numbers, any order will do
            return self._layers
        called: dict[StackedLoRA, None] = {}
        with ExitStack() as hooks:
            for layer in self._layers:
                handle = layer.register_forward_pre_hook(
                    lambda *_, layer=layer: called.setdefault(layer)
                )
                hooks.callback(handle.remove)
            self.view.hidden(torch.zeros(n_runs, 2, dtype=torch.long, device=self.view.device))
        return list(called)

    def _drop_inputs(self, block: nn.Module, masks: "_Masks") -> None:
        """Give the layers of a block their masks whenever it runs.

        All are drawn before, so that the block itself can be compiled.
        """

        def give(_: object, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._draw is not None:
                states = first_argument(positional, named)
                masks.give(states.shape[:-1].numel(), self._draw)

        block.register_forward_pre_hook(give, with_kwargs=True)
        block.register_forward_hook(lambda *_: masks.take_back())


class _Masks:
    """The dropout of the layers of one block, with the same masks as `lora.Dropout`.

    Args:
        layers: The layers, in the order in which the block calls them.
        shares: The share of the inputs that are zero, for each run.
        device: The device of the masks.
    """

    def __init__(
        self, layers: Sequence["StackedLoRA"], shares: Sequence[float], device: torch.device
    ) -> None:
        self._layers, self._shares = layers, shares
        thresholds = [lora.dropout_threshold(share) for share in shares]
        self._thresholds = torch.tensor(thresholds, dtype=torch.int16, device=device)[:, None]

    def give(self, rows: int, draw: Draw) -> None:
        """Give each layer its mask for a batch with this number of rows, those of all runs."""
        n_runs = len(self._shares)
        sizes = [rows // n_runs * layer.width for layer in self._layers]
        words = [-(-size // 4) for size in sizes]  # four inputs for each word
        make = torch.empty if all(self._shares) else torch.zeros
        drawn = make(n_runs, sum(words), dtype=torch.int64, device=self._thresholds.device)
        for run, share in enumerate(self._shares):
            if share:
                draw(run, drawn[run])
        kept = drawn.view(torch.int16) >= self._thresholds
        starts = accumulate(words, initial=0)
        for layer, start, size in zip(self._layers, starts, sizes, strict=False):
            layer.mask = kept[:, 4 * start : 4 * start + size].view(n_runs, -1, layer.width)

    def take_back(self) -> None:
        """Let the backward pass alone hold the masks."""
        for layer in self._layers:
            layer.mask = None


class StackedLoRA(nn.Module):
    """A frozen matrix with one adapter for each run.

    Args:
        adapters: The adapters of the matrix, one for each run, in the order of `padded_rank`.
        dtype: The precision in which they are multiplied.
    """

    def __init__(self, adapters: Sequence[PlainAdapter], dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = adapters[0].base
        self.width = adapters[0].a.shape[1]
        """Number of inputs."""
        self.mask: Tensor | None = None
        """True where a run keeps an input, `[run, row, input]`; `None` without dropout."""
        self._is_transposed = adapters[0].is_transposed
        device = adapters[0].a.device
        scales = [adapter.scale for adapter in adapters]
        self._scales = torch.tensor(scales, device=device)[:, None, None]
        kept = [1 - adapter.dropout for adapter in adapters]
        self._dropout_scales = self._scales / torch.tensor(kept, device=device)[:, None, None]
        self._pairs: list[tuple[nn.Parameter, nn.Parameter, tuple[Any, ...]]] = []
        """Each weight of a run, the stack that it is in, and its place there."""
        self._runs: list[slice] = []
        """The runs of each batched product."""
        self.stacks = nn.ParameterList()
        """A `[run, rank, input]` and B `[run, output, rank]` of each batched product. Beyond the rank of
        a run they are zero, and so are their gradients."""
        for rank, members in groupby(adapters, lambda adapter: padded_rank(adapter.rank)):
            self._add(list(members), rank)
        self.rounded: list[Tensor] = []
        """The stacks in the precision in which they are multiplied, if that is another one."""
        if dtype is not self.stacks[0].dtype:
            self.rounded = [torch.empty_like(stack, dtype=dtype) for stack in self.stacks]

    def _add(self, adapters: Sequence[PlainAdapter], rank: int) -> None:
        """Add a batched product of this padded rank for these runs."""
        first = self._runs[-1].stop if self._runs else 0
        self._runs.append(slice(first, first + len(adapters)))
        a, b = adapters[0].a, adapters[0].b
        a_stack = nn.Parameter(a.new_zeros(len(adapters), rank, a.shape[1]))
        b_stack = nn.Parameter(b.new_zeros(len(adapters), b.shape[0], rank))
        self.stacks.extend([a_stack, b_stack])
        pairs = []
        for run, adapter in enumerate(adapters):
            pairs.append((adapter.a, a_stack, (run, slice(adapter.rank))))
            pairs.append((adapter.b, b_stack, (run, slice(None), slice(adapter.rank))))
        for weight, stack, place in pairs:
            view = stack.data[place]
            view.copy_(weight.data)
            if view.is_contiguous():  # as AdamW's kernels need it
                weight.data = view
        self._pairs += pairs

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some models read its dtype."""
        return self.base_layer.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        return bias if isinstance(bias, Tensor) else None

    def read(self) -> None:
        """Copy the weights of the runs that are no views of the stacks."""
        for weight, stack, place in self._pairs:
            view = stack.data[place]
            if weight.data_ptr() != view.data_ptr() or not view.is_contiguous():
                view.copy_(weight.data)

    def give_gradients(self) -> None:
        """Add the gradients of the stacks to those of the runs' weights, and keep none."""
        for weight, stack, place in self._pairs:
            assert stack.grad is not None
            gradient = stack.grad[place].contiguous()  # as AdamW's kernels need it
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        for stack in self.stacks:
            stack.grad = None

    def forward(self, inputs: Tensor) -> Tensor:
        """The output `[run · sequence, ..., output]` of inputs `[run · sequence, ..., input]`."""
        scales = self._scales if self.mask is None else self._dropout_scales
        matrix = self.weight.T if self._is_transposed else self.weight
        return _Adapted.apply(
            inputs,
            matrix,
            self.bias,
            self.mask,
            scales,
            self._runs,
            self.rounded or list(self.stacks),
            *self.stacks,
        )


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

    Adapters are multiplied in the precision of `operands`. Inputs under the mask are computed again in
    the backward pass. What torch would keep for it takes several times the memory.
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
        operands: Sequence[Tensor],
        *stacks: Tensor,
    ) -> Tensor:
        output = functional.linear(inputs, matrix, bias)
        by_run = output.view(len(scales), -1, output.shape[-1])
        kept = _kept(inputs, mask, len(scales), operands[0].dtype)
        lowered = []
        changes = kept.new_empty(by_run.shape)
        for which, a, b in zip(runs, operands[::2], operands[1::2], strict=True):
            lowered.append(torch.bmm(kept[which], a.mT))
            torch.bmm(lowered[-1], b.mT, out=changes[which])
        by_run.addcmul_(changes, scales)
        ctx.runs = runs
        ctx.save_for_backward(inputs, matrix, mask, scales, *operands, *lowered)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        inputs, matrix, mask, scales, *rest = ctx.saved_tensors
        n_runs, n_operands = len(scales), 2 * len(ctx.runs)
        operands, lowered = rest[:n_operands], rest[n_operands:]
        (gradient,) = gradients
        kept = _kept(inputs, mask, n_runs, operands[0].dtype)
        # Multiplied by the scales, the gradient has their precision.
        scaled = (gradient.reshape(n_runs, -1, gradient.shape[-1]) * scales).to(kept.dtype)
        is_wanted = ctx.needs_input_grad[0]
        of_kept = torch.empty_like(kept) if is_wanted else None
        of_stacks: list[Tensor] = []
        for which, low, a, b in zip(ctx.runs, lowered, operands[::2], operands[1::2], strict=True):
            of_low = torch.bmm(scaled[which], b)
            of_stacks.append(_in_float32(of_low.mT, kept[which]))
            of_stacks.append(_in_float32(scaled[which].mT, low))
            if of_kept is not None:
                torch.bmm(of_low, a, out=of_kept[which])
        of_inputs = None
        if of_kept is not None:
            of_inputs = gradient @ matrix
            if mask is not None:
                of_kept.mul_(mask)
            of_inputs += of_kept.view_as(of_inputs)
        return of_inputs, *[None] * 6, *of_stacks


def _kept(inputs: Tensor, mask: Tensor | None, n_runs: int, dtype: torch.dtype) -> Tensor:
    """The inputs that dropout keeps, and zeros, `[run, row, input]`."""
    by_run = inputs.reshape(n_runs, -1, inputs.shape[-1])
    return (by_run if mask is None else by_run * mask).to(dtype)


def _in_float32(first: Tensor, second: Tensor) -> Tensor:
    """The batched product, which a GPU does not round to the precision of its factors."""
    if first.device.type == "cuda" and first.dtype is not torch.float32:
        return torch.bmm(first, second, out_dtype=torch.float32)
    return torch.bmm(first, second).float()
