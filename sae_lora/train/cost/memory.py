"""Memory of forward and backward passes, counted without weights and without a GPU.

A block of each kind runs on torch's meta device: every operation makes tensors with shapes but without
numbers, and `PeakMemory` adds up their storages. All blocks of one kind take equal memory.
"""

import enum
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_lora.common.errors import UserError
from sae_lora.config.enums import Attention, DType, Initialisation
from sae_lora.config.schema import LoRAConfig, ModelConfig
from sae_lora.models import lora
from sae_lora.models.attention.choice import check_attention, choose_attention
from sae_lora.models.config_faults import asks_for_content, with_unusual_numbers
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import load_shapes, silence_transformers
from sae_lora.models.part_check import check_shapes, runs_not_alone
from sae_lora.splice.stacked_lora import StackedModel

BYTES = {DType.float32: 4, DType.bfloat16: 2}
"""Bytes per number."""
PROCESS_BYTES = 630_000_000
"""Memory of a process on a CPU before it loads the model: Python, the imported libraries, and the text.
`python -m scripts.benchmark.memory --process` measures it."""
HEAP = 1.75
"""Memory of the C heap on a CPU, relative to the tensors that blocks keep for the backward pass. Between
these, the heap has holes of freed tensors, which stay resident. By glibc's own count
(mallinfo2), 630 MB of tensors in a step of SmolLM2-135M needed 1.13 GB of heap; a small Gemma-2 needs
1.4 times its tensors, SmolLM2 in a pack of four 1.85 times."""
CUDA_BYTES = 500_000_000
"""Memory of CUDA itself in each process on a GPU."""


class PeakMemory(TorchDispatchMode):
    """Context in which the bytes of all new tensors are counted until they are freed.

    `now` and `peak` are the current and the largest number of bytes. On the meta device, a question to
    the content of a tensor ("is no position padded?") is answered with yes.

    Args:
        device: The kind of device whose memory is counted; `None`: all devices.
        granularity: Memory is allocated in multiples of so many bytes.
    """

    def __init__(self, device: str | None = None, granularity: int = 1) -> None:
        super().__init__()
        self._device, self._granularity = device, granularity
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        if asks_for_content(function, arguments):
            return True
        inputs = {storage._cdata for storage in self._storages((arguments, keywords))}
        if function is _grouped_mm and arguments[0].is_meta:
            result = _grouped_product(*arguments, **(keywords or {}))
        else:
            result = function(*arguments, **(keywords or {}))
        for storage in self._storages(result):
            if storage._cdata not in inputs:  # a view of an input needs no new memory
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        return [
            leaf.untyped_storage()
            for leaf in tree_leaves(tree)
            if isinstance(leaf, torch.Tensor) and self._device in (None, leaf.device.type)
        ]


_grouped_mm = torch.ops.aten._grouped_mm.default


def _grouped_product(
    left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """The shape of the product of an expert's rows with its matrix, for all experts.

    Torch's own function for shapes refuses float32, which devices accept.
    """
    if left.dim() == right.dim() == 2:  # the gradient of the matrices
        return left.new_empty(len(offs), len(left), right.shape[-1])
    return left.new_empty(left.shape[-2], right.shape[-1])


class _FusedAttention(TorchFunctionMode):
    """Context in which torch's attention on the meta device is the fused one where real devices fuse it.

    On the meta device alone, torch would make the whole matrix of scores.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        if function is functional.scaled_dot_product_attention and arguments[0].is_meta:
            return _attention(*arguments, **keywords)
        return function(*arguments, **keywords)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The arguments are those of torch's `scaled_dot_product_attention`."""
    # Not fused on a CPU: keys that are broadcast to the heads of the query (Falcon), values of another
    # width than keys (latent attention), masks that have a gradient (Doge).
    broadcast = not enable_gqa and query.shape[:-2] != key.shape[:-2]
    masked_with_gradient = attn_mask is not None and attn_mask.requires_grad
    if broadcast or query.shape[-1] != value.shape[-1] or masked_with_gradient:
        given = attn_mask, dropout_p, is_causal
        return functional.scaled_dot_product_attention(
            query, key, value, *given, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def _as_on_devices() -> Iterator[None]:
    """Context in which modules on the meta device run the operations of real devices."""
    autocast = torch.autocast  # refuses the meta device, also where peft only turns it off

    def without_meta(device_type: str, *arguments: Any, **keywords: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *arguments, **keywords)

    torch.autocast = without_meta  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _FusedAttention():
            yield
    finally:
        torch.autocast = autocast


class Gradient(enum.Enum):
    """The gradients that a forward pass prepares."""

    none = "none"
    of_weights = "of_weights"
    """Gradients of the adapters; the input needs none."""
    through = "through"
    """Gradients of the input, and of adapters if there are any."""


class Pass(NamedTuple):
    """Memory of a pass through a part of the model, in bytes, besides weights and input."""

    kept: int
    """Memory after the forward pass: the output, and all that the backward pass needs."""
    forward: int
    """Peak memory in the forward pass."""
    backward: int
    """Peak memory in the backward pass, if there is one: `kept` is part of it."""


class Graph(NamedTuple):
    """Memory of a student's forward and backward pass through several blocks, in bytes."""

    kept: int
    """Memory after the forward pass."""
    extra: int
    """Additional memory that the backward pass takes at its peak."""
    of_saes: int = 0
    """Memory after the forward pass of SAEs in training, besides `kept`."""


@dataclass(frozen=True)
class Adapters:
    """The properties of adapters that memory depends on."""

    rank: int
    dropout: bool
    dora: bool
    targets: tuple[str, ...] | str
    stacked: bool = False
    """True if the run is in a stack."""

    @classmethod
    def of(cls, config: LoRAConfig) -> "Adapters":
        targets = config.targets if isinstance(config.targets, str) else tuple(config.targets)
        return cls(config.rank, config.dropout > 0, config.dora, targets)

    def attached_to(self, model: LanguageModel, blocks: Collection[int]) -> LanguageModel:
        """A view of the model with these adapters in these blocks, in training mode."""
        view = model.view()
        config = LoRAConfig(
            rank=self.rank,
            dropout=0.5 if self.dropout else 0.0,
            dora=self.dora,
            targets=self.targets if isinstance(self.targets, str) else list(self.targets),
            blocks=sorted(blocks),
            init=Initialisation.kaiming,
        )
        lora.attach(view, config, first_sae=0)
        lora.set_adapter_dropout(view, True)
        adapters = lora.plain_adapters(view) if self.stacked else None
        if adapters is None:
            return view
        stacked = StackedModel(model, [adapters])
        stacked.begin(lambda run, words: None)
        return stacked.view


@dataclass(frozen=True)
class CountedModel:
    """A model in the form in which its passes are counted; hashable, so that each is counted once."""

    name: str
    revision: str | None
    dtype: DType
    """Precision of the computation."""
    attention: Attention
    on_gpu: bool

    def blocks(self) -> list[int]:
        """For each block, the last block of the same kind."""
        return _kinds(self)

    def graph(
        self,
        first: int,
        tokens: tuple[int, int],
        adapters: Adapters | None,
        adapted: Collection[int],
        *,
        through_first: bool,
        recomputes: bool = False,
    ) -> Graph:
        """Memory of a student from block `first` to the states that the head reads.

        Args:
            first: The first block that the student computes.
            tokens: Number of sequences and their length.
            adapters, adapted: The adapters and the adapted blocks.
            through_first: True if the input of the first block needs a gradient.
            recomputes: True with activation checkpointing.
        """
        kinds = self.blocks()
        passes = []
        for block in range(first, len(kinds) + 1):
            gradient = Gradient.through if block > first or through_first else Gradient.of_weights
            passes.append(
                self.block_pass(block, tokens, adapters if block in adapted else None, gradient)
            )
        if recomputes:
            *blocks, norm = passes
            output = tokens[0] * tokens[1] * _meta(self).config.hidden_size * self.bytes
            extra = max(one.backward for one in blocks) if blocks else 0
            return Graph(len(blocks) * output + norm.kept, extra)
        extra, freed = 0, 0
        for one in reversed(passes):
            extra = max(extra, one.backward - one.kept - freed)
            freed += one.kept
        return Graph(sum(one.kept for one in passes), extra)

    def inference(
        self, tokens: tuple[int, int], adapters: Adapters | None, adapted: Collection[int]
    ) -> int:
        """Peak memory of a forward pass without gradients, of any block, in bytes."""
        kinds = self.blocks()
        passes = [
            self.block_pass(block, tokens, adapters if block in adapted else None, Gradient.none)
            for block in range(len(kinds) + 1)
        ]
        return max(one.forward for one in passes)

    def block_pass(
        self, block: int, tokens: tuple[int, int], adapters: Adapters | None, gradient: Gradient
    ) -> Pass:
        """Memory of one block; after the last block, of the norm before the head."""
        kinds = self.blocks()
        kind = kinds[block] if block < len(kinds) else len(kinds)
        return _memory_of(_Part(self, kind, tokens, adapters, gradient))

    @property
    def bytes(self) -> int:
        """Bytes per number."""
        return BYTES[self.dtype]


@cache
def _without_numbers(model: CountedModel) -> LanguageModel:
    config = ModelConfig(name=model.name, revision=model.revision)
    shapes = load_shapes(config).model
    for weight in shapes.parameters():
        weight.data = weight.data.to(getattr(torch, model.dtype.name))
    device = torch.device("cuda" if model.on_gpu else "cpu")
    check_attention(model.attention, device)
    kernels = (Attention.sdpa, Attention.flash_attention_2, Attention.flex_attention)
    attention = Attention.sdpa if model.attention in kernels else model.attention
    with with_unusual_numbers(config):
        choose_attention(shapes, attention, device)
    return LanguageModel(shapes)


@cache
def _meta(model: CountedModel) -> LanguageModel:
    """The same after its first pass, which also finds its structure.

    Raises:
        UserError: If the output of its blocks is no residual stream.
    """
    counted = _without_numbers(model)
    with _as_on_devices(), PeakMemory():
        tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
        resid = counted.resid_entering(len(counted.blocks), tokens)
    check_shapes(counted, {len(counted.blocks) - 1: resid}, [1, 2, counted.config.hidden_size])
    return counted


@cache
def _kinds(model: CountedModel) -> list[int]:
    shapes = _without_numbers(model)
    types = getattr(shapes.config, "layer_types", None) or [""] * len(shapes.blocks)
    kinds = [(repr(block), kind) for block, kind in zip(shapes.blocks, types, strict=True)]
    last = {kind: block for block, kind in enumerate(kinds)}
    return [last[kind] for kind in kinds]


@cache
def _adapted(model: CountedModel, adapters: Adapters | None) -> LanguageModel:
    """The model with adapters in one block of each kind."""
    if adapters is None:
        return _meta(model)
    silence_transformers()
    with torch.device("meta"):
        view = adapters.attached_to(_meta(model), set(_kinds(model)))
    lora.replace_dropout(view, _DropoutOnGPU if model.on_gpu else lora.Dropout)
    return view


class _DropoutOnGPU(nn.Module):
    """Dropout as on a GPU, which keeps a byte per element; on the meta device, torch's keeps a number.

    Args:
        p: Share of the elements that are zero.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(inputs, self.p, self.training)[0] if self.p else inputs


class _Part(NamedTuple):
    """A pass through one block, or through the norm after the last block."""

    model: CountedModel
    block: int
    tokens: tuple[int, int]
    adapters: Adapters | None
    gradient: Gradient


@cache
def _memory_of(part: _Part) -> Pass:
    try:
        return _counted(part)
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise runs_not_alone(_without_numbers(part.model), part.block, error) from error
    except Exception:  # shapes that depend on numbers (the experts of JetMoE) raise errors of any kind
        return _of_matrices(part)


def _of_matrices(part: _Part) -> Pass:
    """Memory of a block that cannot be counted, at least: inputs and outputs of every matrix."""
    model, block, tokens, adapters, gradient = part
    model_shapes = _without_numbers(model)
    if block == len(model_shapes.blocks):  # the norm before the head, which is small
        return Pass(0, 0, 0)
    experts = model_shapes.config_value("num_experts_per_tok") or 1
    weights = [weight for weight in model_shapes.blocks[block].parameters() if weight.dim() > 1]
    shapes = [weight.shape[-2:] for weight in weights for _ in range(experts if weight.dim() > 2 else 1)]
    number = tokens[0] * tokens[1]
    numbers = [sum(shape) for shape in shapes]
    largest = number * model.bytes * max(numbers)
    low_rank = 4 * adapters.rank * len(shapes) if adapters is not None else 0
    all_states = number * (model.bytes * sum(numbers) + low_rank)
    kept = all_states if gradient is not Gradient.none else largest
    return Pass(kept, kept, kept + largest)


def _counted(part: _Part) -> Pass:
    model, block, tokens, adapters, gradient = part
    adapted = _adapted(model, adapters)
    with torch.device("meta"):
        ids = torch.zeros(tokens, dtype=torch.long)
        shape = (*tokens, adapted.config.hidden_size)
        dtype = getattr(torch, model.dtype.name)
        resid = torch.empty(shape, dtype=dtype, requires_grad=gradient is Gradient.through)
        given = resid if block else None  # block 0 reads the embedding
        with _as_on_devices(), PeakMemory() as memory:
            with torch.set_grad_enabled(gradient is not Gradient.none):
                if block < len(adapted.blocks):
                    output = adapted.resid_entering(block + 1, ids, block, given)
                else:
                    output = adapted.hidden(ids, block, given)
            kept, forward, backward = memory.now, memory.peak, 0
            if output.requires_grad:
                memory.peak = memory.now
                output.backward(torch.empty_like(output))
                backward = memory.peak
    adapted.model.zero_grad()
    return Pass(kept, forward, backward)
