"""The expected time of packs, and the comparison with the time that they took."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sae_lora.common.console import duration, say
from sae_lora.config.enums import LauncherKind
from sae_lora.config.execution import LauncherConfig
from sae_lora.config.identity import train_steps
from sae_lora.launcher.packs import slots
from sae_lora.launcher.plan import Pack
from sae_lora.launcher.submit import run_here


def run_timed(packs: Sequence[Pack], settings: LauncherConfig, folder: Path) -> None:
    """Run the packs here; print the expected time before, and the time that they took after."""
    line, seconds = expected_time(packs, settings)
    say(line)
    began = time.monotonic()
    run_here(packs, settings, folder)
    expected = f"; expected {at_most(settings)}{duration(seconds)}" if seconds is not None else ""
    say(f"took {duration(time.monotonic() - began)}{expected}")


def expected_time(packs: Sequence[Pack], settings: LauncherConfig) -> tuple[str, float | None]:
    """The expected time of the packs as a line, and in seconds if this machine runs them."""
    from sae_lora.train.cost import speed  # brings torch in

    times = [speed.expected([run.config for run in pack]) for pack in packs]
    known = [
        replace(each, seconds=each.seconds * _share_left(pack))
        for pack, each in zip(packs, times, strict=True)
        if each is not None
    ]
    if len(known) < len(times):
        return "expected time: unknown until a run has trained on this kind of machine", None
    longest, total = max(each.seconds for each in known), sum(each.seconds for each in known)
    if settings.kind is LauncherKind.slurm:
        each = f"at most {duration(longest)} for each job, {duration(total)} together"
        return f"expected time: {each} ({known[0].source})", None
    at_once = len(slots([run for pack in packs for run in pack], settings))
    seconds = max(longest, total / at_once)
    return f"expected time: {at_most(settings)}{duration(seconds)} ({known[0].source})", seconds


def at_most(settings: LauncherConfig) -> str:
    """Words before a time or a number of FLOPs that halving may make smaller; empty without it."""
    return "" if settings.halving is None else "at most "


def _share_left(pack: Pack) -> float:
    """The share of its steps that a pack has still to take."""
    taken = min(run.folder.checkpoint_step or 0 for run in pack)
    return 1 - taken / train_steps(pack[0].config)
