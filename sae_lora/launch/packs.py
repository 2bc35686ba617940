"""Which runs train together: those whose model goes through the same batches, as many as fit."""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import psutil

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import LauncherKind
from sae_lora.config.identity import pack_key
from sae_lora.config.schema import LauncherConfig
from sae_lora.config.validate import check_processes
from sae_lora.launch.plan import Pack, Run

_MOST = 8
"""Runs in a pack of `launcher.pack=auto`. What more of them would still save is little."""
_FILLED = 0.9
"""Share of the memory that an estimate may fill."""
_ON_A_NODE_GB = {"gpu": 40.0, "main": 8.0}
"""What a node is taken to have that does not say."""


def packed(runs: Sequence[Run], settings: LauncherConfig) -> list[Pack]:
    """The runs in as few packs as may be, of equal size; here, no fewer than there are places.

    A pack that does not fit into the memory is halved until its parts do.

    Runs that share most stand together: those with the same SAEs, then those adapted from the same
    block on.

    Args:
        runs: In any order.
        settings: What the packs are to be like, and where they will be.
    """
    groups: dict[str, Pack] = {}
    for run in runs:
        groups.setdefault(pack_key(run.config), []).append(run)
    most = _most_together(settings)
    if most == 1 or len(runs) < 2:
        return [[run] for run in runs]
    here = settings.kind is LauncherKind.local
    fewest = max(1, len(places(runs, settings)) // len(groups)) if here else 1
    return [pack for group in groups.values() for pack in _split(group, most, fewest, settings)]


def _most_together(settings: LauncherConfig) -> int:
    """The largest pack that is asked for."""
    match settings.pack:
        case "auto":
            return _MOST
        case "off" | False:  # what YAML makes of the word
            return 1
        case _:
            return settings.pack


def _split(group: Pack, most: int, fewest: int, settings: LauncherConfig) -> list[Pack]:
    from sae_lora.train.cost import first_own_block  # brings torch in

    def what_is_shared(run: Run) -> tuple[str, int]:
        return repr(run.config.sae.used), first_own_block(run.config)

    ordered = sorted(group, key=what_is_shared)
    number = min(len(group), max(fewest, -(-len(group) // most)))
    parts = _equal_parts(ordered, number)
    return [pack for part in parts for pack in _fitting(part, settings)]


def _fitting(pack: Pack, settings: LauncherConfig) -> list[Pack]:
    """The pack; its halves, or theirs, where it does not fit."""
    if len(pack) == 1 or _fits(pack, settings):
        return [pack]
    return [part for half in _equal_parts(pack, 2) for part in _fitting(half, settings)]


def _equal_parts(runs: Pack, number: int) -> list[Pack]:
    bounds = [len(runs) * part // number for part in range(number + 1)]
    return [runs[start:end] for start, end in pairwise(bounds)]


def _fits(pack: Pack, settings: LauncherConfig) -> bool:
    from sae_lora.train.cost import estimate  # brings torch in

    needed = estimate([run.config for run in pack]).peak_bytes
    return needed <= _FILLED * _room(pack, settings)


def _room(pack: Pack, settings: LauncherConfig) -> float:
    """Bytes of memory that each process of a pack may fill where it will be."""
    wants_gpu = pack[0].config.train.device.name != "cpu" and settings.gpus_per_node > 0
    if settings.kind is LauncherKind.slurm:
        if wants_gpu:
            return 1e9 * (settings.gpu_mem_gb or _ON_A_NODE_GB["gpu"])
        return 1e9 * (settings.mem_gb or _ON_A_NODE_GB["main"]) / settings.node_processes
    import torch

    # Packs at work at the same time share what they are at: a GPU, or the main memory.
    at = Counter(place.get("CUDA_VISIBLE_DEVICES") for place in places(pack, settings))
    if wants_gpu and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0).total_memory
        room = 1e9 * settings.gpu_mem_gb if settings.gpu_mem_gb else found
    else:
        room = psutil.virtual_memory().available / settings.node_processes
    return room / max(at.values())


def places(runs: Sequence[Run], settings: LauncherConfig) -> list[dict[str, str]]:
    """Where packs can be at the same time: for each place, the variables that keep a pack to it.

    Raises:
        ConfigError: Where a pack is to have more GPUs than there are, or more processes than GPUs.
    """
    together = settings.gpus_per_node
    on_cpu = together == 0 or all(run.config.train.device.name == "cpu" for run in runs)
    gpus = [] if on_cpu else _gpus()
    if gpus:
        check_processes(settings)
    if gpus and together > len(gpus):
        raise ConfigError(
            "launcher.gpus_per_node", together, f"at most {len(gpus)}, with launcher=local", len(gpus)
        )
    firsts = range(0, len(gpus) - together + 1, together or 1)
    groups = [",".join(gpus[first : first + together]) for first in firsts if gpus]
    number = settings.max_parallel or len(groups) or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    whole = number * settings.node_processes == 1 and not settings.cpus_per_task
    of_a_place = settings.cpus_per_task or cores // number
    threads = max(1, of_a_place // settings.node_processes)
    shared = {} if whole else {"OMP_NUM_THREADS": str(threads)}
    if together == 0:
        shared["CUDA_VISIBLE_DEVICES"] = ""
    return [
        shared | ({"CUDA_VISIBLE_DEVICES": groups[place % len(groups)]} if groups else {})
        for place in range(number)
    ]


def _gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch  # there already, since something was fetched

    return [str(number) for number in range(torch.cuda.device_count())]
