"""Packs: runs that train together, because they use the same model and the same batches."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, takewhile

import psutil

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import LauncherKind
from sae_lora.config.execution import LauncherConfig
from sae_lora.config.identity import pack_key
from sae_lora.config.value_checks import check_processes, check_shard
from sae_lora.launcher.halving import brackets
from sae_lora.launcher.plan import Pack, Run

_MAX_RUNS = 8
"""Largest number of runs in a pack with `launcher.pack=auto`; more would save little."""
_MAX_FILL = 0.9
"""Largest share of the memory that a pack may need, by the estimate."""
_GPU_GB, _NODE_GB = 40.0, 8.0
"""Memory of a GPU and of a node, in GB, if the config does not give it."""


def packed(runs: Sequence[Run], settings: LauncherConfig) -> list[Pack]:
    """Divide the runs into as few packs of equal size as possible.

    On this machine, there is at least one pack for each slot. A pack that does not fit into memory is
    halved until its parts fit. Runs with the same SAEs are packed together, and of these first the runs
    whose first adapted block is the same. Runs that compete (`launcher.halving`) share a pack, where
    they reach each rung together.
    """
    largest = {"auto": _MAX_RUNS, "off": 1, False: 1}.get(
        settings.pack
    ) or settings.pack  # YAML: off is false
    if largest == 1 or len(runs) < 2:
        return [[run] for run in runs]
    groups: dict[str, Pack] = {}
    for run in runs:
        groups.setdefault(pack_key(run.config), []).append(run)
    is_local = settings.kind is LauncherKind.local
    fewest = max(1, len(slots(runs, settings)) // len(groups)) if is_local else 1
    return [pack for group in groups.values() for pack in _split(group, largest, fewest, settings)]


def _split(group: Pack, largest: int, fewest: int, settings: LauncherConfig) -> list[Pack]:
    from sae_lora.train.cost.runs import first_own_block  # brings torch in

    ordered = sorted(group, key=lambda run: (repr(run.config.sae.used), first_own_block(run.config)))
    number = min(len(group), max(fewest, -(-len(group) // largest)))
    of_run = brackets(ordered)
    if of_run:
        competing: dict[str, Pack] = {}
        for run in ordered:
            competing.setdefault(of_run[run.name].bracket, []).append(run)
        parts = _whole(list(competing.values()), -(-len(group) // number))
        while len(parts) < fewest and (longest := max(parts, key=len))[1:]:
            parts.remove(longest)
            parts += _equal_parts(longest, 2)
    else:
        parts = _equal_parts(ordered, number)
    return [pack for part in parts for pack in _fitting(part, settings)]


def _whole(units: Sequence[Pack], size: int) -> list[Pack]:
    """Packs of at most this size that divide as few of these units as possible."""
    packs: list[Pack] = []
    for unit in units:
        if packs and len(packs[-1]) + len(unit) <= size:
            packs[-1] += unit
        else:
            packs += _equal_parts(unit, -(-len(unit) // size))
    return packs


def _fitting(pack: Pack, settings: LauncherConfig) -> list[Pack]:
    """The pack, or parts of it that fit into memory."""
    from sae_lora.train.cost.estimate import estimate  # brings torch in

    if len(pack) > 1:
        needed = estimate([run.config for run in pack], divides(pack, settings)).peak_bytes
        if needed > _MAX_FILL * _free_bytes(pack, settings):
            return [part for half in _equal_parts(pack, 2) for part in _fitting(half, settings)]
    return [pack]


def too_large(packs: Sequence[Pack], settings: LauncherConfig) -> list[str]:
    """Notes about runs that do not fit into a GPU even alone, by the estimate."""
    from sae_lora.train.cost.estimate import estimate  # brings torch in
    from sae_lora.train.cost.runs import runs_on_gpu

    notes = {}
    for pack in packs:
        first = pack[0].config
        if len(pack) > 1 or not runs_on_gpu(first):
            continue
        needed = estimate([first], divides(pack, settings)).peak_bytes
        free = _free_bytes(pack, settings)
        if needed > free:
            notes[f"{needed / 1e9:.1f} GB, and a GPU has {free / 1e9:.1f} GB"] = pack[0].name
    return [
        f"{name} needs about {numbers}: launcher.gpus_per_node=2 launcher.shard=on divides the model, "
        "train.micro_batch_size=1 and train.activation_checkpointing=true take less"
        for numbers, name in notes.items()
    ]


def divides(pack: Sequence[Run], settings: LauncherConfig) -> bool:
    """True if the processes of this pack divide the model's weights among them (`launcher.shard`).

    Raises:
        ConfigError: If they must, and cannot.
    """
    if settings.shards is not None or settings.nodes * settings.node_processes == 1:
        return bool(settings.shards)
    from sae_lora.train.cost.estimate import estimate  # brings torch in

    first = pack[0]
    needed = estimate([first.config], divided=False).peak_bytes
    if needed <= _MAX_FILL * _free_bytes([first], settings):
        return False
    check_shard(first.config)
    return True


def _equal_parts(runs: Pack, number: int) -> list[Pack]:
    bounds = [len(runs) * part // number for part in range(number + 1)]
    return [runs[start:end] for start, end in pairwise(bounds)]


def _free_bytes(pack: Pack, settings: LauncherConfig) -> float:
    """Memory for each process of a pack, in bytes."""
    needs_gpu = pack[0].config.train.device.name != "cpu" and settings.gpus_per_node > 0
    if settings.kind is LauncherKind.slurm:
        if needs_gpu:
            return 1e9 * (settings.gpu_mem_gb or _GPU_GB)
        return 1e9 * (settings.mem_gb or _NODE_GB) / settings.node_processes
    import torch

    if needs_gpu and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        free = 1e9 * settings.gpu_mem_gb if settings.gpu_mem_gb else total
    else:
        free = psutil.virtual_memory().available / settings.node_processes
    # Packs that run at the same time share a GPU, or the main memory.
    sharing = Counter(slot.get("CUDA_VISIBLE_DEVICES") for slot in slots(pack, settings))
    return free / max(sharing.values())


def slots(runs: Sequence[Run], settings: LauncherConfig) -> list[dict[str, str]]:
    """The slots of this machine for packs that run at the same time: environment variables of each.

    Raises:
        ConfigError: If a pack asks for more GPUs than this machine has, or more processes than GPUs.
    """
    per_pack = settings.gpus_per_node
    on_cpu = per_pack == 0 or all(run.config.train.device.name == "cpu" for run in runs)
    gpus = [] if on_cpu else _gpus()
    if gpus:
        check_processes(settings)
    if gpus and per_pack > len(gpus):
        raise ConfigError(
            "launcher.gpus_per_node", per_pack, f"at most {len(gpus)}, with launcher=local", len(gpus)
        )
    starts = range(0, len(gpus) - per_pack + 1, per_pack or 1)
    groups = [",".join(gpus[start : start + per_pack]) for start in starts if gpus]
    number = settings.max_parallel or len(groups) or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    takes_all_cores = number * settings.node_processes == 1 and not settings.cpus_per_task
    threads = max(1, (settings.cpus_per_task or cores // number) // settings.node_processes)
    common = {} if takes_all_cores else {"OMP_NUM_THREADS": str(threads)}
    if per_pack == 0:
        common["CUDA_VISIBLE_DEVICES"] = ""
    return [
        common | ({"CUDA_VISIBLE_DEVICES": groups[slot % len(groups)]} if groups else {})
        for slot in range(number)
    ]


_IS_GPU = re.compile(r"\d+|(GPU|MIG)-.+")


def _gpus() -> list[str]:
    """GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them.

    Source: CUDA's programming guide: the list ends before the first name that is no GPU, such as -1.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return list(takewhile(_IS_GPU.fullmatch, (name.strip() for name in visible.split(","))))
    import torch  # already imported by the code that fetches the text

    return [str(number) for number in range(torch.cuda.device_count())]
