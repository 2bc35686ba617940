"""Times of kernels on an NVIDIA H200, projected from what they compute and move; none is measured."""

from collections import Counter

import torch

_PER_SECOND = {torch.bfloat16: 474e12, torch.float32: 50e12}
"""Operations of products per second that real programs reach."""
_TF32 = 237e12
_BYTES_PER_SECOND = 0.8 * 4.8e12
_KERNEL_S = 2e-6
"""Time of a kernel that does nothing."""


def seconds(name: str, flops: float, dtype: torch.dtype | None, moved: float) -> Counter[str]:
    """The time of a kernel by what it is for: its start, and the longer of computing and moving.

    The host's time is left out.

    Args:
        name: The operation.
        flops: Operations of products of matrices.
        dtype: The precision of the factors.
        moved: Bytes that it reads and writes.
    """
    kind = "attention" if "attention" in name else "products" if flops else "rest"
    tf32 = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
    rate = _TF32 if tf32 else _PER_SECOND.get(dtype or torch.float32, _PER_SECOND[torch.float32])
    return Counter({"starts": _KERNEL_S, kind: max(flops / rate, moved / _BYTES_PER_SECOND)})
