"""Time of torch code, its share in matrix products, and the rate of these."""

import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sae_lora.train.cost.memory import PeakMemory

_NOT_COUNTED = {
    torch.ops.aten.bmm: lambda first, second, *_, **__: 2 * math.prod(first) * second[-1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda output, query, key, value, *_, **__: sdpa_backward_flop_count(output, query, key, value)
    ),
}
"""Counts of FLOPs that torch lacks: of batched products with a precision of their own, and of attention
on a CPU, where masks are ignored, as on a GPU."""
_LISTED = 10
_SIDE = {"cpu": 4096, "cuda": 8192}
_TIMES = 5


@dataclass(frozen=True)
class Work:
    """The work of a call."""

    flops: float
    """FLOPs of matrix products and attention; a multiply-add counts as two."""
    in_products: float
    """Share of the time that matrix products and attention take."""
    flops_per_second: float
    """FLOPs divided by this time; 0 if there are none."""
    peak_bytes: float
    """Peak bytes of all tensors that the call makes."""
    operators: dict[str, float]
    """Share of the time in torch's operators without the ones they call; the largest shares only."""


def work_of(call: Callable[[], object], device: torch.device) -> Work:
    """Profile a function by calling it twice.

    Args:
        call: The function. It must have been called before, so that its set-up is not profiled.
        device: Device of the function. On a GPU, the GPU's time counts.
    """
    with FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED) as counter, PeakMemory() as memory:
        call()
    counted = counter.get_flop_counts().get("Global", {})
    flops = {str(operator).replace(".", "::"): number for operator, number in counted.items()}

    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no messages of the profiler on the error stream
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    seconds: Counter[str] = Counter()
    in_products = 0.0
    for operator in profiler.key_averages():
        if operator.device_type.name == "CPU":  # a GPU kernel's time is also counted in its operator
            self_time = operator.self_device_time_total if on_gpu else operator.self_cpu_time_total
            seconds[operator.key] += self_time / 1e6
            if operator.key in flops:  # total time, because attention calls another operator
                total_time = operator.device_time_total if on_gpu else operator.cpu_time_total
                in_products += total_time / 1e6
    whole = seconds.total()
    return Work(
        flops=sum(flops.values()),
        in_products=in_products / whole,
        flops_per_second=sum(flops.values()) / in_products if in_products else 0.0,
        peak_bytes=memory.peak,
        operators={name: time / whole for name, time in seconds.most_common(_LISTED)},
    )


@dataclass(frozen=True)
class Product:
    """The products of two matrices of one size in a call."""

    sizes: list[int]
    """Batch, rows, columns, and the size that is summed over."""
    number: int
    seconds: float
    flops: float


def products_of(call: Callable[[], object]) -> list[Product]:
    """The products of matrices in a call on a CPU, from the longest to the shortest in total."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        call()
    products: dict[tuple[int, ...], Product] = {}
    for operator in profiler.key_averages(group_by_input_shape=True):
        factors = [shape for shape in operator.input_shapes if len(shape) >= 2]
        if operator.key not in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            continue
        first, second = factors[-2:] if operator.key.endswith("addmm") else factors[:2]
        sizes = (first[0] if len(first) == 3 else 1, first[-2], second[-1], first[-1])
        known = products.get(sizes, Product(list(sizes), 0, 0.0, 0.0))
        products[sizes] = Product(
            list(sizes),
            known.number + operator.count,
            known.seconds + operator.self_cpu_time_total / 1e6,
            known.flops + 2 * math.prod(sizes) * operator.count,
        )
    return sorted(products.values(), key=lambda product: -product.seconds)


def peak_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The largest measured rate of a product of two large matrices."""
    side = _SIDE[device.type]
    first, second = torch.randn(2, side, side, device=device).to(dtype)
    into = torch.empty_like(first)
    best = float("inf")
    for _ in range(_TIMES):
        started = time.perf_counter()
        torch.mm(first, second, out=into)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
