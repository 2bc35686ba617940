"""Weights & Biases: a view of a run's curve that can be lost without losing the run.

A point is shown when it is final: after a kill, a run measures the points after its newest checkpoint
again. A thread makes all calls of wandb, and training never waits for it.
"""

import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from sae_lora.common.console import say
from sae_lora.common.secrets import redacted
from sae_lora.config.enums import TrackingMode
from sae_lora.config.schema import Config, TrackingConfig
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import Summary
from sae_lora.tracking import wandb_run
from sae_lora.tracking.wandb_run import WandbRun
from sae_lora.tracking.wandb_view import WandbView

log = logging.getLogger(__name__)

_PLACE_TIMEOUT_S = 10


class Tracker:
    """A run's curve in W&B while it trains, or nothing with `tracking.mode=disabled`.

    Whatever goes wrong with W&B, the run goes on.
    """

    def __init__(self, config: Config, folder: RunFolder, environment: dict[str, Any]) -> None:
        self._view = WandbView(folder, config, environment)
        self._mode = _asked_mode(config.tracking.mode)
        self._place: str | None = None
        self._is_cut_off = False
        self._orders: queue.SimpleQueue[Callable[[WandbRun], object] | None] = queue.SimpleQueue()
        self._began = threading.Event()
        self._place_is_due = time.monotonic() + _PLACE_TIMEOUT_S
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def place(self) -> str | None:
        """An address or a folder for people; `None` where the run is not tracked, or not in time."""
        self._began.wait(max(0.0, self._place_is_due - time.monotonic()))
        return self._place

    def show(self, points: int | None) -> None:
        """Show the first points of the curve, which are final; `None` for all."""
        self._orders.put(lambda run: run.show(points))

    def finish(self, summary: Summary | None, *, goes_on: bool) -> None:
        """End the W&B run.

        Args:
            summary: The results; `None` for a run that has failed, or that `goes_on` later.
            goes_on: Whether the run was only interrupted.
        """
        results = None if summary is None else dataclasses.asdict(summary)
        self._orders.put(lambda run: run.finish(results, goes_on=goes_on))
        self._orders.put(None)
        most_s = self._view.config.tracking.finish_timeout_s
        self._thread.join(most_s)
        if self._thread.is_alive():
            command = f"sae-lora sync {self._view.folder.path.parent}"
            log.warning("W&B has not ended after %g s; `%s` uploads the rest", most_s, command)
            self._is_cut_off = True
            wandb_run.cut_off()  # or it would hold up the end of this process

    def _work(self) -> None:
        run: WandbRun | None = None
        try:
            if self._mode is not TrackingMode.disabled:
                run = self._open()
                self._place = run.place
        except Exception as error:  # W&B must never stop a run, whatever it raises
            self._warn("W&B is off for this run: %s", error)
        self._began.set()
        while (order := self._orders.get()) is not None:
            if run is not None:
                try:
                    order(run)
                except Exception as error:  # as above
                    self._warn("W&B: %s", error)

    def _open(self) -> WandbRun:
        if _settled_mode(self._mode) == "online":
            try:
                run = WandbRun(self._view, online=True)
            except Exception as error:  # as above
                self._warn("W&B: %s; going on offline", error)
            else:
                say(f"W&B shows {self._view.name} at {run.place}")
                return run
        return WandbRun(self._view, online=False)

    def _warn(self, text: str, error: Exception) -> None:
        if not self._is_cut_off:
            log.warning(text, _beginning(error))


def _asked_mode(mode: TrackingMode) -> TrackingMode:
    """The config's mode; where that is `auto`, the one in W&B's own variable."""
    variable = os.environ.get("WANDB_MODE", "")
    if mode is TrackingMode.auto and variable in TrackingMode.__members__:
        return TrackingMode[variable]
    return mode


_said_offline = threading.Event()


def settled(config: TrackingConfig) -> dict[str, str]:
    """The mode of all runs that are started from here, as an environment variable for them.

    Says why tracking is offline where that was not asked for.
    """
    if _asked_mode(config.mode) is not TrackingMode.auto:
        return {}
    try:
        return {"WANDB_MODE": _settled_mode(TrackingMode.auto)}
    except Exception as error:  # W&B must never stop a run, whatever it raises
        log.warning("W&B: %s", _beginning(error))
        return {}
    finally:
        wandb_run.cut_off()  # each run has a service of its own


def _settled_mode(mode: TrackingMode) -> str:
    """`online` or `offline`. Says once a process why it is offline where that was not asked for."""
    if mode is TrackingMode.offline:
        return "offline"
    reason = wandb_run.obstacle(probe=mode is TrackingMode.auto)
    if reason is None:
        return "online"
    if not _said_offline.is_set():
        _said_offline.set()
        log.warning("%s: tracking offline", reason)
    return "offline"


def _beginning(error: Exception) -> str:
    lines = str(error).splitlines()[:3] or [type(error).__name__]
    return redacted(" ".join(line.strip() for line in lines))
