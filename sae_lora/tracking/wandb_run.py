"""One W&B run, and the reasons against one: all calls of wandb itself.

These calls wait for whatever wandb waits for; `tracker.py` keeps training from waiting.
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
from sae_lora.tracking.wandb_view import AXES, CURVES, WandbView, without_secrets

INIT_TIMEOUT_S = 20
_PROBE_TIMEOUT_S = 3


def _library() -> Any:
    """wandb, with its service started. It takes a second, which a run without W&B need not pay."""
    # wandb's own telemetry would hold up the end of a process for ten seconds.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb


class WandbRun:
    """A W&B run that is open: a view of the first points of a curve.

    Args:
        shown: The run.
        online: Whether it is sent to the server, or written to files in the run folder.

    Raises:
        Exception: Whatever wandb raises.
    """

    def __init__(self, shown: WandbView, *, online: bool) -> None:
        wandb = _library()
        self._folder = shown.folder
        self._run = wandb.init(
            entity=shown.config.tracking.entity,
            project=shown.config.tracking.project,
            # wandb does not give an id out again that it failed to go online with.
            id=shown.id if online else f"{shown.id}-offline",
            name=shown.name,
            group=shown.config.sweep,
            job_type="lora",
            tags=shown.tags,
            config=shown.values,
            dir=str(shown.folder.path),
            mode="online" if online else "offline",
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                init_timeout=INIT_TIMEOUT_S,
                # The command line, code, git remotes and output may hold what is nobody's business.
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
            self._run.define_metric(name, step_metric=AXES[0], summary=f"{best}last")
        self._next_step: int = self._run.starting_step
        """The step from which on W&B has no rows yet."""

    @property
    def place(self) -> str:
        """The address, or the folder of an offline run."""
        return str(Path(self._run.dir).parent) if self._run.offline else self._run.url

    def show(self, points: int | None) -> int:
        """Show the points that W&B lacks, of the first `points` or of all; return their number."""
        new = [point for point in self._folder.read_curve()[:points] if point.step >= self._next_step]
        for point in new:
            values = {key: value for key, value in vars(point).items() if value is not None}
            self._run.log(values, step=point.step, commit=True)
            self._next_step = point.step + 1
        return len(new)

    def finish(self, summary: dict[str, Any] | None, *, goes_on: bool) -> None:
        """End it when all is uploaded; the arguments are those of `Tracker.finish`."""
        if summary is not None:
            # Under a key of its own: `student_ce` and others are curves, with a summary of theirs.
            results = {"result": without_secrets(summary)}
            if measured := headlines(self._folder):
                results["evaluation"] = measured
            self._run.summary.update(results)
        elif goes_on:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if summary is not None else 1)


def obstacle(*, probe: bool) -> str | None:
    """The reason why no run can be online, in words; `None` where there is none.

    With `probe` it asks whether the server answers, for at most a few seconds.
    """
    settings = _library().setup().settings
    if not is_logged_in(settings):
        return "not logged in to W&B (`wandb login`)"
    if probe and not _answers(settings.base_url):
        return "the W&B server does not answer"
    return None


def is_logged_in(settings: Any) -> bool:
    """True where W&B finds a key: in the environment, its settings, or where `wandb login` puts it."""
    if settings.api_key or settings.identity_token_file:
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(path).authenticators(urlsplit(settings.base_url).hostname or "") is not None
    return False


def _answers(url: str) -> bool:
    """True where a server that works answers at the address."""
    import requests  # wandb brings it

    query = {"query": "query Viewer { viewer { id } }"}
    try:
        answer = requests.post(f"{url.rstrip('/')}/graphql", json=query, timeout=_PROBE_TIMEOUT_S)
        return answer.status_code < 500
    except requests.exceptions.SSLError:
        return True  # there is a server; wandb has certificates of its own, and will check it itself
    except requests.RequestException:
        return False


def cut_off() -> None:
    """End wandb in this process at once, whatever it waits for; it can be used again."""
    import wandb

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == "wandb-core":
                child.kill()
    # wandb reports that its service is gone, by an error or by `sys.exit`.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
