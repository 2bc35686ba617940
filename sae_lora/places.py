"""Where packs can be at the same time on this machine: a GPU each, or a share of the cores."""

import os
from collections.abc import Sequence

from sae_lora.common.errors import ConfigError
from sae_lora.config.schema import LauncherConfig
from sae_lora.config.validate import check_processes
from sae_lora.plan import Run


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
    whole = number * settings.crew_per_node == 1 and not settings.cpus_per_task
    of_a_place = settings.cpus_per_task or cores // number
    threads = max(1, of_a_place // settings.crew_per_node)
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
