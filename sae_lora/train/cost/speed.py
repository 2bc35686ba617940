"""Minutes of a training, from a speed measured on this kind of machine, or stated for a known GPU.

Every training that began at its first step, and in which all runs came to their ends, writes its speed
into `speeds.json` of `data.cache_dir`; the newest one of a kind counts. A speed is floating-point
operations per second of training and evaluations together, as `estimate.py` counts them.
"""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from sae_lora.common.console import count
from sae_lora.common.files import write_atomically
from sae_lora.config.enums import Device, DType, LauncherKind
from sae_lora.config.schema import Config
from sae_lora.train.cost.estimate import estimate

_MOST = 100
"""Largest number of kinds of training in the file; the oldest ones are dropped."""
_SHARE = 0.2
"""Share of a stated speed that a training is assumed to reach."""
_STARTUP_S = 20.0
"""Seconds until the first step, if none were measured."""
_STATED = {
    "H200": (989, 67),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
    "L4": (121, 30.3),
    "A10": (125, 31.2),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
}
"""TFLOP/s of dense products in 16 bits and in float32, from the makers' data sheets."""


@dataclass(frozen=True)
class _Measured:
    """The speed of a training, in the file."""

    machine: str
    """The GPU, or the processor."""
    threads: int
    partition: str | None
    """SLURM's partition; `None` on a machine without SLURM."""
    model: str
    dtype: str
    method: str
    flops_per_s: float
    startup_s: float
    """Seconds from the start of the process to the first step."""
    at: float
    """When it was measured, in seconds since 1970."""


@dataclass(frozen=True)
class Time:
    """The expected time of a pack."""

    seconds: float
    source: str
    """Where the speed is from, as text."""


def expected(configs: Sequence[Config]) -> Time | None:
    """The expected time of runs that train together; `None` if no speed is known for their machine.

    Args:
        configs: Configs of the runs, with their SAEs resolved.
    """
    common = configs[0]
    cost = estimate(configs)
    flops = cost.flops + cost.evaluation_flops
    if (measured := _nearest(common)) is not None:
        day = time.strftime("%Y-%m-%d", time.localtime(measured.at))
        threads = f", {count(measured.threads, 'thread')}" if measured.threads else ""
        machine = f"{measured.machine}{threads}"
        source = f"measured with {Path(measured.model).name} on {machine}, {day}"
        return Time(measured.startup_s + flops / measured.flops_per_s, source)
    if (stated := _stated_tflops(common)) is not None:
        name, tflops = stated
        source = f"assumed: {_SHARE:.0%} of the {tflops:g} TFLOP/s stated for {name}"
        return Time(_STARTUP_S + flops / (_SHARE * 1e12 * tflops), source)
    return None


def record(configs: Sequence[Config], seconds: float) -> None:
    """Write the speed of runs that have trained together in this process, from their first step on.

    Args:
        configs: Configs of the runs.
        seconds: Time since the first step. What lies before it is the time to start.
    """
    common = configs[0]
    cost = estimate(configs)
    startup_s = time.time() - psutil.Process().create_time() - seconds
    new = _Measured(
        machine=_this_machine(common)[0],
        threads=_this_machine(common)[1],
        partition=os.environ.get("SLURM_JOB_PARTITION"),
        model=common.model.name,
        dtype=common.train.dtype.name,
        method=common.method.kind.name,
        flops_per_s=(cost.flops + cost.evaluation_flops) / seconds,
        startup_s=max(0.0, startup_s),
        at=time.time(),
    )
    others = [entry for entry in _read(common) if _kind(entry) != _kind(new)]
    path = _file(common)
    path.parent.mkdir(parents=True, exist_ok=True)
    newest = sorted([*others, new], key=lambda entry: entry.at)[-_MOST:]
    write_atomically(path, json.dumps(list(map(asdict, newest)), indent=1) + "\n")


def _kind(entry: _Measured) -> tuple[object, ...]:
    place = entry.machine, entry.threads, entry.partition
    return *place, entry.model, entry.dtype, entry.method


def _file(config: Config) -> Path:
    return Path(config.data.cache_dir).expanduser() / "speeds.json"


def _read(config: Config) -> list[_Measured]:
    try:
        return [_Measured(**entry) for entry in json.loads(_file(config).read_text())]
    except (OSError, ValueError, TypeError):  # none yet, or of another version
        return []


def _nearest(config: Config) -> _Measured | None:
    """The newest speed on the machine of a run, preferably of its model, its method and its threads."""
    on_slurm = config.launcher.kind is LauncherKind.slurm
    machine, threads = _this_machine(config)

    def fits(entry: _Measured) -> bool:
        if entry.dtype != config.train.dtype.name:
            return False
        if on_slurm:
            return entry.partition is not None and entry.partition == config.launcher.partition
        return entry.machine == machine

    def preference(entry: _Measured) -> tuple[bool, bool, bool, float]:
        is_alike = entry.model == config.model.name, entry.method == config.method.kind.name
        return *is_alike, entry.threads == threads, entry.at

    return max(filter(fits, _read(config)), key=preference, default=None)


def _this_machine(config: Config) -> tuple[str, int]:
    """The GPU that a run uses on this machine, and 0; else the processor and the number of threads."""
    if config.train.device is not Device.cpu and torch.cuda.is_available():
        return torch.cuda.get_device_name(), 0
    return _processor(), torch.get_num_threads()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _stated_tflops(config: Config) -> tuple[str, float] | None:
    """A known GPU and its stated speed: this machine's, or one that the SLURM options name."""
    launcher = config.launcher
    if launcher.kind is LauncherKind.slurm:
        options = (launcher.partition, launcher.constraint, launcher.sbatch)
        text = " ".join(str(option) for option in options if option)
    elif config.train.device is not Device.cpu and torch.cuda.is_available():
        text = torch.cuda.get_device_name()
    else:
        return None
    for name, (in_16_bits, in_float32) in _STATED.items():
        if name.replace(" ", "").lower() in text.replace(" ", "").lower():
            return name, in_float32 if config.train.dtype is DType.float32 else in_16_bits
    return None
