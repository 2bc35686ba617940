"""Packs: runs that train together, since the same model goes through the same batches."""

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
from sae_lora.launcher.plan import Pack, Run

_MOST = 8
"""Runs in a pack of `launcher.pack=auto`; more would save little."""
_FILLED = 0.9
"""Share of the memory that an estimate may fill."""
_GPU_GB, _NODE_GB = 40.0, 8.0
"""Memory of a GPU and of a node where the config does not say."""


def packed(runs: Sequence[Run], settings: LauncherConfig) -> list[Pack]:
    """The runs in as few packs as possible, of equal size; on this machine, one at least for each place.

    A pack that does not fit into the memory is halved until its parts do. Runs with the same SAEs come
    into the same pack, and among them runs that are adapted from the same block on.
    """
    most = {"auto": _MOST, "off": 1, False: 1}.get(settings.pack) or settings.pack  # YAML: off is false
    if most == 1 or len(runs) < 2:
        return [[run] for run in runs]
    groups: dict[str, Pack] = {}
    for run in runs:
        groups.setdefault(pack_key(run.config), []).append(run)
    here = settings.kind is LauncherKind.local
    fewest = max(1, len(places(runs, settings)) // len(groups)) if here else 1
    return [pack for group in groups.values() for pack in _split(group, most, fewest, settings)]


def _split(group: Pack, most: int, fewest: int, settings: LauncherConfig) -> list[Pack]:
    from sae_lora.train.cost import first_own_block  # brings torch in

    ordered = sorted(group, key=lambda run: (repr(run.config.sae.used), first_own_block(run.config)))
    number = min(len(group), max(fewest, -(-len(group) // most)))
    return [pack for part in _equal_parts(ordered, number) for pack in _fitting(part, settings)]


def _fitting(pack: Pack, settings: LauncherConfig) -> list[Pack]:
    """The pack, or parts of it that fit into the memory."""
    from sae_lora.train.cost import estimate  # brings torch in

    if len(pack) > 1:
        needed = estimate([run.config for run in pack]).peak_bytes
        if needed > _FILLED * _room(pack, settings):
            return [part for half in _equal_parts(pack, 2) for part in _fitting(half, settings)]
    return [pack]


def _equal_parts(runs: Pack, number: int) -> list[Pack]:
    bounds = [len(runs) * part // number for part in range(number + 1)]
    return [runs[start:end] for start, end in pairwise(bounds)]


def _room(pack: Pack, settings: LauncherConfig) -> float:
    """Bytes of memory for each process of a pack."""
    wants_gpu = pack[0].config.train.device.name != "cpu" and settings.gpus_per_node > 0
    if settings.kind is LauncherKind.slurm:
        if wants_gpu:
            return 1e9 * (settings.gpu_mem_gb or _GPU_GB)
        return 1e9 * (settings.mem_gb or _NODE_GB) / settings.node_processes
    import torch

    if wants_gpu and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        room = 1e9 * settings.gpu_mem_gb if settings.gpu_mem_gb else total
    else:
        room = psutil.virtual_memory().available / settings.node_processes
    # Packs that run at the same time share a GPU, or the main memory.
    sharing = Counter(place.get("CUDA_VISIBLE_DEVICES") for place in places(pack, settings))
    return room / max(sharing.values())


def places(runs: Sequence[Run], settings: LauncherConfig) -> list[dict[str, str]]:
    """Places for packs that run at the same time: the environment variables of each.

    Raises:
        ConfigError: Where a pack asks for more GPUs than this machine has, or more processes than GPUs.
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
    takes_all_cores = number * settings.node_processes == 1 and not settings.cpus_per_task
    threads = max(1, (settings.cpus_per_task or cores // number) // settings.node_processes)
    common = {} if takes_all_cores else {"OMP_NUM_THREADS": str(threads)}
    if together == 0:
        common["CUDA_VISIBLE_DEVICES"] = ""
    return [
        common | ({"CUDA_VISIBLE_DEVICES": groups[place % len(groups)]} if groups else {})
        for place in range(number)
    ]


def _gpus() -> list[str]:
    """GPUs that this process may use, by their names in `CUDA_VISIBLE_DEVICES`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch  # imported before, by what fetches the text

    return [str(number) for number in range(torch.cuda.device_count())]
