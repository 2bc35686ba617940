"""One W&B run, and reasons why W&B cannot be online: all calls of wandb.

These calls may wait for the server; `tracker.py` calls them in a thread, so that training does not wait.
"""

import contextlib
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from sae_lora.evaluation.headlines import headlines
from sae_lora.records.metrics import METRICS
from sae_lora.tracking.wandb_view import AXES, CURVES, WandbView, trial_id, without_secrets

INIT_TIMEOUT_S = 20
_PROBE_TIMEOUT_S = 3
_OUTRANKED = "outranked"
"""The key of a summary that says where `launcher.halving` stopped the run."""


def _library() -> Any:
    """Import wandb and start its service. This takes a second, so runs without W&B do not do it."""
    # wandb's telemetry would delay the exit of a process by ten seconds.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb


class WandbRun:
    """An open W&B run: a view of the first points of a curve.

    Args:
        view: The run as W&B shows it.
        online: True: send it to the server; False: write files into the run folder.

    Raises:
        Exception: If wandb raises one; its types are many.
    """

    def __init__(self, view: WandbView, *, online: bool) -> None:
        wandb = _library()
        self._view = view
        self._run = wandb.init(
            entity=view.config.tracking.entity,
            project=view.config.tracking.project,
            # If going online fails, wandb does not accept the same id again.
            id=view.id if online else f"{view.id}-offline",
            name=view.name,
            notes=view.config.tracking.notes,
            group=view.group,
            job_type="lora",
            tags=view.tags,
            config=view.values,
            dir=view.config.tracking.dir or str(view.folder.path),
            mode="online" if online else "offline",
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                init_timeout=INIT_TIMEOUT_S,
                # The command line, code, git remotes and output may contain private data.
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )
        for axis in AXES:
            self._run.define_metric(axis)
        for name in CURVES:
            best = {"lower": "min,", "higher": "max,", "": ""}[METRICS[name].better]
            # A sweep of W&B needs its metric as one number, not as one of several in a summary.
            summary = None if trial_id() else f"{best}last"
            self._run.define_metric(name, step_metric=AXES[0], summary=summary)
        self._next_step: int = self._run.starting_step
        """The first step that W&B has no row for."""

    @property
    def place(self) -> str:
        """The address, or the folder of an offline run."""
        return str(Path(self._run.dir).parent) if self._run.offline else self._run.url

    def show(self, points: int | None) -> int:
        """Send the missing rows among the first `points` (`None`: all); return their number."""
        new = self._view.rows(points, self._next_step)
        for row in new:
            self._run.log(row, step=row["step"], commit=True)
            self._next_step = row["step"] + 1
        return len(new)

    def finish(self, summary: dict[str, Any] | None, *, will_resume: bool) -> None:
        """End the W&B run after all uploads; the arguments are those of `Tracker.finish`."""
        outranked = self._view.folder.is_outranked
        if summary is not None:
            # Under a separate key, because curves such as `student_ce` have their own summary.
            results = {"result": without_secrets(summary)}
            if measured := headlines(self._view.folder):
                results["evaluation"] = measured
            if self._run.summary.get(_OUTRANKED) is not None:  # it was taken up again
                results[_OUTRANKED] = None
            self._run.summary.update(results)
        elif outranked:
            self._run.summary[_OUTRANKED] = self._view.folder.stop_message
        elif will_resume:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if summary is not None or outranked else 1)


def obstacle(*, probe: bool) -> str | None:
    """The reason why runs cannot be online; `None` if they can.

    With `probe`, also ask the server, which takes at most a few seconds.
    """
    try:
        settings = _library().setup().settings
    except ValueError as error:  # its message has a line for each refused setting, and then a link
        return f"W&B refuses its settings: {_refused(error)}"
    if not is_logged_in(settings):
        return "not logged in to W&B (`wandb login`)"
    if probe and not _answers(settings.base_url):
        return "the W&B server does not answer"
    return None


def _refused(error: ValueError) -> str:
    """The settings that wandb refuses, each with the variable that may have set it."""
    faults = getattr(error, "errors", list)()  # of pydantic
    parts = [
        f"{name} ({fault['msg']}); the variable WANDB_{str(name).upper()} sets it"
        for fault in faults
        for name in fault["loc"][:1]
    ]
    return "; ".join(parts) or str(error)


def is_logged_in(settings: Any) -> bool:
    """True if W&B has a key: in the environment, its settings, or the file that `wandb login` writes."""
    if settings.api_key or settings.identity_token_file:
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(path).authenticators(urlsplit(settings.base_url).hostname or "") is not None
    return False


def _answers(url: str) -> bool:
    """True if a working server answers at the address."""
    import requests  # a dependency of wandb

    query = {"query": "query Viewer { viewer { id } }"}
    try:
        answer = requests.post(f"{url.rstrip('/')}/graphql", json=query, timeout=_PROBE_TIMEOUT_S)
        return answer.status_code < 500
    except requests.exceptions.SSLError:
        return True  # a server exists; wandb checks it with its own certificates
    except requests.RequestException:
        return False


def cut_off() -> None:
    """End wandb in this process at once, even if it waits for a server; it can be used again."""
    import wandb

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == "wandb-core":
                child.kill()
    # wandb notices that its service is gone: it raises an error or calls `sys.exit`.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
