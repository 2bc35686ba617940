"""Time of a piece of torch code: in products of matrices, their rate, and the rest."""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from scripts.benchmark.memory import PeakMemory

_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda output, query, key, value, *_, **__: sdpa_backward_flop_count(output, query, key, value)
    ),
}
"""Operations in attention on a CPU, which torch does not count; as it counts a GPU's, masked or not."""
_LISTED = 10
_SIDE = {"cpu": 4096, "cuda": 8192}
_TIMES = 5


@dataclass(frozen=True)
class Work:
    """The work of a call."""

    flops: float
    """Floating-point operations in products of matrices and in attention, two to a multiply-add."""
    in_products: float
    """Share of the time that goes into them."""
    flops_per_second: float
    """While it does; 0 where it never does."""
    peak_bytes: float
    """Peak bytes of all tensors that the call makes."""
    operators: dict[str, float]
    """Share of the time in each of torch's operators itself, of those with the largest."""


def work_of(call: Callable[[], object], device: torch.device) -> Work:
    """Profiles a call, which is made twice.

    Args:
        call: The call; it has been made before, so that nothing is set up while it is profiled.
        device: Its device; on a GPU, the GPU's time counts.
    """
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter, PeakMemory() as memory:
        call()
    counted = counter.get_flop_counts().get("Global", {})
    flops = {str(operator).replace(".", "::"): number for operator, number in counted.items()}

    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no lines of its own on the error stream
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    seconds: Counter[str] = Counter()
    in_products = 0.0
    for operator in found.key_averages():
        if operator.device_type.name == "CPU":  # and no kernel, whose time its operator has
            own = operator.self_device_time_total if on_gpu else operator.self_cpu_time_total
            seconds[operator.key] += own / 1e6
            if operator.key in flops:  # attention leaves its kernel to an operator inside of it
                inside = operator.device_time_total if on_gpu else operator.cpu_time_total
                in_products += inside / 1e6
    whole = seconds.total()
    return Work(
        flops=sum(flops.values()),
        in_products=in_products / whole,
        flops_per_second=sum(flops.values()) / in_products if in_products else 0.0,
        peak_bytes=memory.peak,
        operators={name: one / whole for name, one in seconds.most_common(_LISTED)},
    )


def peak_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The most that a product of two large matrices reached."""
    side = _SIDE[device.type]
    one, other = torch.randn(2, side, side, device=device).to(dtype)
    into = torch.empty_like(one)
    best = float("inf")
    for _ in range(_TIMES):
        started = time.perf_counter()
        torch.mm(one, other, out=into)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
