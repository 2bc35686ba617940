"""Weights & Biases during training: a view of the curve, whose loss does not harm the run.

A point is shown when it is final. A run that is killed measures the points after its newest checkpoint
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
from sae_lora.config.execution import TrackingConfig
from sae_lora.config.schema import Config
from sae_lora.config.value_checks import WANDB_MODES
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import Summary
from sae_lora.tracking import wandb_run
from sae_lora.tracking.trackio_run import TrackioRun
from sae_lora.tracking.wandb_run import WandbRun
from sae_lora.tracking.wandb_view import WandbView

log = logging.getLogger(__name__)

_PLACE_TIMEOUT_S = 10
_Run = WandbRun | TrackioRun


class Tracker:
    """The curve of a run in W&B while it trains; with `tracking.mode=disabled`, nothing.

    Errors of W&B never stop the run.
    """

    def __init__(self, config: Config, folder: RunFolder, environment: dict[str, Any]) -> None:
        self._view = WandbView(folder, config, environment)
        self._mode = _configured_mode(config.tracking.mode)
        self._place: str | None = None
        self._is_cut_off = False
        self._calls: queue.SimpleQueue[Callable[[_Run], object] | None] = queue.SimpleQueue()
        self._opened = threading.Event()
        self._place_deadline = time.monotonic() + _PLACE_TIMEOUT_S
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def place(self) -> str | None:
        """The address or folder of the W&B run; `None` without tracking, or if wandb is too slow."""
        self._opened.wait(max(0.0, self._place_deadline - time.monotonic()))
        return self._place

    def show(self, points: int | None) -> None:
        """Show the first `points` of the curve, which are final; `None`: all points."""
        self._calls.put(lambda run: run.show(points))

    def finish(self, summary: Summary | None, *, will_resume: bool) -> None:
        """End the W&B run.

        Args:
            summary: The results; `None` if the run has failed, or was interrupted.
            will_resume: True if the run was interrupted and can resume.
        """
        results = None if summary is None else dataclasses.asdict(summary)
        self._calls.put(lambda run: run.finish(results, will_resume=will_resume))
        self._calls.put(None)
        timeout_s = self._view.config.tracking.finish_timeout_s
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            command = f"sae-lora sync {self._view.folder.path.parent}"
            self._is_cut_off = True
            if self._mode is TrackingMode.trackio:
                log.warning("Trackio did not finish in %g s", timeout_s)
                return
            log.warning("W&B did not finish in %g s; `%s` uploads the missing rows", timeout_s, command)
            wandb_run.cut_off()  # otherwise it would delay the exit of this process

    def _work(self) -> None:
        run: _Run | None = None
        try:
            if self._mode is TrackingMode.trackio:
                run = TrackioRun(self._view)
            elif self._mode is not TrackingMode.disabled:
                run = self._open()
            self._place = run and run.place
        except Exception as error:  # no error of W&B may stop a run
            self._warn(f"{self._name} is off for this run: %s", error)
        self._opened.set()
        while (call := self._calls.get()) is not None:
            if run is not None:
                try:
                    call(run)
                except Exception as error:  # as above
                    self._warn(f"{self._name}: %s", error)

    @property
    def _name(self) -> str:
        return "Trackio" if self._mode is TrackingMode.trackio else "W&B"

    def _open(self) -> WandbRun:
        if _settled_mode(self._mode) == "online":
            try:
                run = WandbRun(self._view, online=True)
            except Exception as error:  # as above
                self._warn("W&B: %s; tracking offline", error)
            else:
                say(f"W&B shows {self._view.name} at {run.place}")
                return run
        return WandbRun(self._view, online=False)

    def _warn(self, text: str, error: Exception) -> None:
        if not self._is_cut_off:
            log.warning(text, _first_lines(error))


def _configured_mode(mode: TrackingMode) -> TrackingMode:
    """The mode of the config; if it is `auto`, the mode in W&B's variable `WANDB_MODE`, if any."""
    variable = WANDB_MODES.get(os.environ.get("WANDB_MODE", ""))
    return TrackingMode[variable] if mode is TrackingMode.auto and variable else mode


_said_offline = threading.Event()


def settled(config: TrackingConfig) -> dict[str, str]:
    """The W&B mode of all runs that this process starts, as an environment variable.

    Log why tracking is offline, unless offline was configured.
    """
    if _configured_mode(config.mode) is not TrackingMode.auto:
        return {}
    try:
        return {"WANDB_MODE": _settled_mode(TrackingMode.auto)}
    except Exception as error:  # no error of W&B may stop a run
        log.warning("W&B: %s", _first_lines(error))
        return {}
    finally:
        wandb_run.cut_off()  # each run starts its own service


def _settled_mode(mode: TrackingMode) -> str:
    """Return `online` or `offline`. Log the reason once, unless offline was configured."""
    if mode is TrackingMode.offline:
        return "offline"
    reason = wandb_run.obstacle(probe=mode is TrackingMode.auto)
    if reason is None:
        return "online"
    if not _said_offline.is_set():
        _said_offline.set()
        log.warning("%s: tracking offline", reason)
    return "offline"


def _first_lines(error: Exception) -> str:
    lines = str(error).splitlines()[:3] or [type(error).__name__]
    return redacted(" ".join(line.strip() for line in lines))
