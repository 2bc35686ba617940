"""Where packs can be at the same time on this machine: a GPU each, or a share of the cores."""

import os
from collections.abc import Sequence

from sae_lora.config import LauncherConfig
from sae_lora.plan import Run


def places(runs: Sequence[Run], settings: LauncherConfig) -> list[dict[str, str]]:
    """Where packs can be at the same time: for each place, the variables that keep a pack to it."""
    gpus = [] if all(run.config.train.device.name == "cpu" for run in runs) else _gpus()
    number = settings.max_parallel or len(gpus) or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = settings.cpus_per_task or (max(1, cores // number) if number > 1 else None)
    shared = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return [
        shared | ({"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {})
        for place in range(number)
    ]


def _gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch  # there already, since something was fetched

    return [str(number) for number in range(torch.cuda.device_count())]
