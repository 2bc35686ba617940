"""Models that are larger than a GPU: the frozen weights of each block are divided among the processes.

torch's FSDP2 (`fully_shard`) gathers the weights of a block for its forward pass, frees them, and
gathers them again for its backward pass. The weights lie in a module of their own, a `Shard`, which runs
the block. The plain model and its views, with adapters of their own, run their blocks in the same
shards. While a block runs, the weights of the next one are gathered. All processes must run the same
blocks in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard


class Shard(nn.Module):
    """The frozen weights of a block, of which each process holds a part.

    Args:
        weights: The whole weights. They are replaced by parts when the shard is made.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.whole: list[nn.Parameter] = []
        """The tensors that hold the whole weights while the shard runs, and nothing otherwise."""

    def forward(self, run: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """The result of a function that reads the whole weights."""
        return run(*arguments, **keywords)


def divide(blocks: nn.ModuleList, device: torch.device, processes: int) -> list[Shard]:
    """Divide the weights of the blocks among the processes; all of them must call this.

    From now on the blocks have their weights only while they run, or inside `gathered`. Weights that
    several blocks share, and buffers, stay whole.

    Args:
        blocks: Frozen blocks, on any device; only one at a time is whole on the device.
        device: The device of this process.
        processes: Number of processes.

    Returns:
        The shard of each block.
    """
    mesh = init_device_mesh(device.type, (processes,))
    shards = [_divided(block, mesh) for block in blocks]
    for shard, following in pairwise(shards):
        # What is gathered for a block that does not run then serves the next time: weights are frozen.
        shard.set_modules_to_forward_prefetch([following])  # pyright: ignore[reportCallIssue]
        following.set_modules_to_backward_prefetch([shard])  # pyright: ignore[reportCallIssue]
    return shards


def _divided(block: nn.Module, mesh: DeviceMesh) -> Shard:
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in block.modules():
        for name, weight in module.named_parameters(recurse=False):
            places.setdefault(weight, []).append((module, name))
    shard = shard_of(list(places), mesh)
    for weight, of_weight in zip(shard.whole, places.values(), strict=True):
        for module, name in of_weight:
            module._parameters[name] = weight
    block.forward = partial(shard, block.forward)
    return shard


def shard_of(weights: list[nn.Parameter], mesh: DeviceMesh) -> Shard:
    """A shard of these weights, which are contiguous; all processes of the mesh must call this."""
    shard = Shard(weights)
    fully_shard(shard, mesh=mesh, reshard_after_forward=True)
    # While the shard runs, torch has the whole weights there; it uses the same tensors every time.
    shard.whole = shard(lambda: list(shard.weights))
    return shard


@contextmanager
def gathered(shards: Sequence[Shard], weight: nn.Parameter) -> Iterator[None]:
    """Inside the block, a weight is whole if a shard has a part of it; all processes must enter it."""
    shard = next((shard for shard in shards if any(weight is each for each in shard.whole)), None)
    if shard is None:
        yield
        return
    shard.unshard()  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        shard.reshard()  # pyright: ignore[reportCallIssue]
