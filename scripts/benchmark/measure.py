"""Paired times: compared functions take turns in one process, so that disturbances slow both."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """Ratio of the times of a call and a faster call, over rounds."""

    median: float
    least: float
    most: float


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, including its work on a GPU."""
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def taking_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call in each round, after a warm-up round.

    Args:
        calls: The compared functions, by name.
        rounds: Number of rounds.
        device: Device of the functions.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        # Every second round has the reverse order, so that the order has no effect on average.
        order = list(calls) if number % 2 == 0 else list(calls)[::-1]
        for name in order:
            gc.collect()
            times[name].append(seconds(calls[name], device))
    return times


def ratio(slower: Sequence[float], quicker: Sequence[float]) -> Ratio:
    """Ratio of paired times."""
    ratios = [slow / quick for slow, quick in zip(slower, quicker, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def wait(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
