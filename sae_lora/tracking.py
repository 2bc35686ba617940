"""Weights & Biases: a view of the run folder that can be lost without losing the run."""

import contextlib
import dataclasses
import logging
import netrc
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from sae_lora.config import Config, TrackingConfig, TrackingMode
from sae_lora.conversion import as_dict
from sae_lora.records import CurvePoint, Summary

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 10
_PROBE_TIMEOUT_S = 3


class Tracker(Protocol):
    """Where a run's curve is shown while it trains."""

    @property
    def place(self) -> str | None:
        """Where a person finds the run there; `None` where it is not tracked."""
        ...

    def log(self, point: CurvePoint) -> None:
        """Shows one more point."""
        ...

    def finish(self, summary: Summary | None) -> None:
        """Ends the run there; without a summary it has failed."""
        ...


class Untracked:
    """Shows nothing."""

    place = None

    def log(self, point: CurvePoint) -> None:
        """Does nothing."""

    def finish(self, summary: Summary | None) -> None:
        """Does nothing."""


def start(config: Config, name: str, run_hash: str, folder: Path) -> Tracker:
    """The tracker that the config asks for. Whatever goes wrong with W&B, the run goes on.

    Args:
        config: The run's config; all of it becomes the W&B run's config.
        name: The run's readable name.
        run_hash: The run's identity, which the W&B run id is made of.
        folder: The run folder; W&B's own files lie in it.
    """
    mode = _asked_mode(config.tracking.mode)
    if mode is TrackingMode.disabled:
        return Untracked()
    try:
        return _WandB(config, mode, name, run_hash, folder)
    except Exception as error:  # W&B must never stop a run, whatever it raises
        log.warning("W&B is off for this run: %s", _first_line(error))
        return Untracked()


class _WandB:
    def __init__(
        self, config: Config, asked: TrackingMode, name: str, run_hash: str, folder: Path
    ) -> None:
        import wandb  # takes a second to import, which a run with tracking=disabled need not pay

        self._finish_timeout_s = config.tracking.finish_timeout_s
        mode = _settled_mode(asked, wandb.setup().settings)

        def init(mode: str) -> Any:
            return wandb.init(
                entity=config.tracking.entity,
                project=config.tracking.project,
                id=_run_id(config.sweep, run_hash, folder),
                name=name,
                group=config.sweep,
                job_type="lora",
                config=as_dict(config),
                dir=str(folder),
                mode=mode,  # pyright: ignore[reportArgumentType]
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(
                    console="off", silent=True, init_timeout=_START_TIMEOUT_S, disable_git=True
                ),
            )

        try:
            self._run = init(mode)
        except Exception as error:  # W&B must never stop a run, whatever it raises
            if mode == "offline":
                raise
            log.warning("W&B: %s; going on offline", _first_line(error))
            self._run = init("offline")
        self._run.define_metric("tokens")
        self._run.define_metric("train_seconds")
        self._run.define_metric("*", step_metric="tokens")
        self.place = str(Path(self._run.dir).parent) if self._run.offline else self._run.url

    def log(self, point: CurvePoint) -> None:
        values = {key: value for key, value in dataclasses.asdict(point).items() if value is not None}
        self._guarded("log", lambda: self._run.log(values, step=point.step))

    def finish(self, summary: Summary | None) -> None:
        def end() -> None:
            if summary is not None:
                self._run.summary.update(dataclasses.asdict(summary))
            self._run.finish(exit_code=0 if summary is not None else 1)

        # An upload may hang for as long as the network does; the run does not wait for it.
        thread = threading.Thread(target=lambda: self._guarded("finish", end), daemon=True)
        thread.start()
        thread.join(self._finish_timeout_s)
        if thread.is_alive():
            log.warning(
                "W&B has not ended after %g s; its files stay in the run folder", self._finish_timeout_s
            )

    def _guarded(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # W&B must never stop a run, whatever it raises
            log.warning("W&B %s: %s", what, _first_line(error))


def _run_id(sweep: str, run_hash: str, folder: Path) -> str:
    """The W&B run's id: the run's own, and one of its own for each attempt that begins anew."""
    attempts = sum(1 for _ in folder.glob("unfinished-*"))
    return f"{sweep}-{run_hash}" + (f"-{attempts + 1}" if attempts else "")


def _asked_mode(mode: TrackingMode) -> TrackingMode:
    """The config's mode; where it leaves the choice open, W&B's own variable says."""
    variable = os.environ.get("WANDB_MODE", "")
    return (
        TrackingMode[variable]
        if mode is TrackingMode.auto and variable in TrackingMode.__members__
        else mode
    )


_said_offline = threading.Event()


def settled(config: TrackingConfig) -> dict[str, str]:
    """What is found out once for all runs that are started from here, as variables for them.

    Says why tracking is offline where that was not asked for.
    """
    if _asked_mode(config.mode) is not TrackingMode.auto:
        return {}
    import wandb  # takes a second to import, which a run with tracking=disabled need not pay

    try:
        return {"WANDB_MODE": _settled_mode(TrackingMode.auto, wandb.setup().settings)}
    except Exception as error:  # W&B must never stop a run, whatever it raises
        log.warning("W&B: %s", _first_line(error))
        return {}
    finally:
        wandb.teardown()  # the service that `setup` starts; each run has its own


def _settled_mode(mode: TrackingMode, settings: Any) -> str:
    """online or offline. Says once a process why it is offline when that was not asked for."""
    if mode is not TrackingMode.auto:
        return mode.name
    if not _is_logged_in(settings):
        reason = "not logged in to W&B (`wandb login`)"
    elif not _answers(settings.base_url):
        reason = "the W&B server does not answer"
    else:
        return "online"
    if not _said_offline.is_set():
        _said_offline.set()
        log.warning("%s: tracking offline", reason)
    return "offline"


def _is_logged_in(settings: Any) -> bool:
    """Whether W&B would find a key: in the environment, its settings, or where `wandb login` puts it."""
    if settings.api_key or settings.identity_token_file:
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(path).authenticators(urlsplit(settings.base_url).hostname or "") is not None
    return False


def _answers(url: str) -> bool:
    """Whether something listens at the server's address."""
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    with (
        contextlib.suppress(OSError),
        socket.create_connection((parts.hostname or "", port), timeout=_PROBE_TIMEOUT_S),
    ):
        return True
    return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
