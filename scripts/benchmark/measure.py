"""Paired times: what is compared takes turns in one process, so that what slows one slows the other."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """Times of one call over those of a quicker one, round by round."""

    median: float
    least: float
    most: float


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, its work on a GPU included."""
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def taking_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """The seconds of each call in each round, after a round that is not counted.

    Args:
        calls: What is compared, by name.
        rounds: How often.
        device: Where it computes.
    """
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        # Every second round backwards: what comes after what makes no difference then.
        order = list(calls) if number % 2 == 0 else list(calls)[::-1]
        for name in order:
            gc.collect()
            found[name].append(seconds(calls[name], device))
    return found


def ratio(slower: Sequence[float], quicker: Sequence[float]) -> Ratio:
    """The ratio of paired times, round by round."""
    ratios = [one / other for one, other in zip(slower, quicker, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
