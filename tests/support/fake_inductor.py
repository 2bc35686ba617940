"""Compiled blocks on the stand-in for CUDA: torch plans the kernels of a GPU, and generates none.

Its compiler fuses operations and arranges memory as for an H200. The kernels of the plan, the bytes
that they read and write, and the memory that they take are counted. Graphs run without numbers.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch

import torch
from torch import fx

from tests.support import h200


class Requests(Protocol):
    """Counters of requests to the device."""

    kernels: int
    moved: int
    seconds: Counter[str]

    def paused(self) -> AbstractContextManager[None]:
        """A context in which nothing is counted."""
        ...


class Memory(Protocol):
    """The memory of the device, counted."""

    now: int
    peak: int

    def paused(self) -> AbstractContextManager[None]:
        """A context in which new tensors are not counted."""
        ...


@contextmanager
def as_on_a_gpu(requests: Requests, memory: Memory) -> Iterator[None]:
    """Inside the block, compiled blocks run with shapes only, and what is planned is counted."""
    import torch._dynamo.convert_frame as convert_frame
    from torch._dynamo import config as tracing
    from torch._inductor import config
    from torch._inductor.runtime.hints import DeviceProperties

    from sae_lora.splice import compiled, stack
    from sae_lora.train import passes

    h200 = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=90,
        major=9,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    )
    trace = convert_frame.ConvertFrameAssert.__call__

    def traced(self: Any, *arguments: Any, **named: Any) -> Any:
        with memory.paused():  # the tensors of a trace are no tensors of a step
            return trace(self, *arguments, **named)

    with ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith("torch") and hasattr(module, "has_triton"):
                patches.enter_context(patch.object(module, "has_triton", lambda *_: True))
        for owner, name, stand_in in (
            (compiled, "BACKEND", _planning(requests, memory)),
            (stack.Stack, "compiled_difference", lambda *_: 0.0),
            (passes, "relative", lambda *_: 0.0),
            (torch.cuda, "get_device_capability", lambda *_: (h200.major, 0)),
            (DeviceProperties, "create", classmethod(lambda *_: h200)),
            # The modes that count are no part of what is compiled.
            (convert_frame, "is_in_any_mode_without_ignore_compile_internals", lambda: False),
            (convert_frame.ConvertFrameAssert, "__call__", traced),
        ):
            patches.enter_context(patch.object(owner, name, stand_in))
        patches.enter_context(tracing.patch(inline_torch_dispatch_torch_compile=False))
        patches.enter_context(config.patch(joint_graph_constant_folding=False))  # needs numbers
        yield


class _Plan(NamedTuple):
    """The plan of the compiler for a graph."""

    kernels: int
    moved: int
    """Bytes that they read and write."""
    memory: int
    """Peak bytes of the tensors that they make."""
    seconds: Counter[str]
    """The projected time of the kernels, by what they are for."""


def _planning(requests: Requests, memory: Memory) -> Callable[..., Any]:
    """A backend of `torch.compile`."""
    from torch._inductor.compile_fx import compile_fx

    def compiled(graph: fx.GraphModule, inputs: Sequence[Any], **named: Any) -> Callable[..., Any]:
        with memory.paused(), requests.paused():
            plan = _plan(graph, inputs, is_inference=named.get("is_inference", False))

        def run(arguments: list[Any]) -> Any:
            before, entering = memory.peak, memory.now
            with requests.paused():
                outputs = graph.forward(*arguments)
            arguments.clear()
            # On the way the graph makes tensors that a fused kernel does not write to memory.
            memory.peak = max(before, memory.now, entering + plan.memory)
            requests.kernels += plan.kernels
            requests.moved += plan.moved
            requests.seconds += plan.seconds
            return outputs

        run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
        return run

    return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=compiled)


def _plan(graph: fx.GraphModule, inputs: Sequence[Any], *, is_inference: bool) -> _Plan:
    from torch._guards import detect_fake_mode
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import MultiOutput
    from torch._inductor.memory import estimate_peak_memory, get_freeable_input_buf
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V
    from torch.utils._ordered_set import OrderedSet

    with ExitStack() as handlers:
        handlers.enter_context(V.set_fake_mode(detect_fake_mode(inputs)))
        handlers.enter_context(V.set_debug_handler(DebugContext()))
        compile_fx._recursive_post_grad_passes(graph, is_inference=is_inference)
        compile_fx.record_original_output_strides(graph)
        shapes = compile_fx.shape_env_from_inputs(inputs)
        lowered = GraphLowering(graph, shape_env=shapes, is_inference=is_inference)
        handlers.enter_context(V.set_graph_handler(lowered))
        handlers.enter_context(V.set_extern_kernel_nodes([]))
        lowered.run(*inputs)
        lowered._update_scheduler()
        nodes = lowered.scheduler.nodes
        given = get_freeable_input_buf(nodes, OrderedSet(lowered.graph_inputs))
        outputs = OrderedSet(lowered.get_output_names())
        with_inputs, _ = estimate_peak_memory(nodes, given, outputs)
        kernels = [
            node
            for node in nodes
            if not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, MultiOutput)
        ]
        return _Plan(
            len(kernels),
            sum(node.get_read_write_buffers_sizes() for node in kernels),
            with_inputs - sum(buffer.mpi_buffer.size_free for buffer in given.values()),
            sum(map(_seconds, kernels), Counter()),
        )


def _seconds(kernel: Any) -> Counter[str]:
    """The projected time of a kernel. Generated ones multiply no matrices."""
    name, flops, dtype = "", 0, None
    if kernel.is_extern():
        name, flops = str(kernel.node.op_overload), kernel.estimate_flops() or 0
        dtype = kernel.node.inputs[0].get_dtype() if kernel.node.inputs else None
    return h200.seconds(name, flops, dtype, kernel.get_read_write_buffers_sizes())
