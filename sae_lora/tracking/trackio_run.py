"""A run in Trackio: tracking on this machine, with a page in the browser and no account.

All calls of trackio; like those of wandb, `tracker.py` makes them in a thread of its own.
"""

from typing import Any

from sae_lora.config.compose import PROJECT
from sae_lora.tracking.wandb_view import WandbView


class TrackioRun:
    """An open run of Trackio: a view of the first points of a curve, with the rows that W&B would have.

    Args:
        view: The run as W&B shows it.
    """

    def __init__(self, view: WandbView) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self._view = view
        self._project = view.config.tracking.project or PROJECT
        # Trackio finds a run again by its name. Ours ends with the id, and begins with what varies in a
        # command, which another command may write in another way.
        known = [name for name in SQLiteStorage.get_runs(self._project) if name.endswith(view.id)]
        name = known[0] if known else f"{view.name} {view.id}"
        last = SQLiteStorage.get_max_step_for_run(self._project, name) if known else None
        self._next_step = 0 if last is None else last + 1
        """The first step that Trackio has no row for."""
        self._run = trackio.init(
            project=self._project,
            name=name,
            group=view.group,
            config=view.values,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    @property
    def place(self) -> str:
        """The command that shows the run in a browser."""
        return f"trackio show --project {self._project}"

    def show(self, points: int | None) -> int:
        """Write the missing rows among the first `points` (`None`: all); return their number."""
        new = self._view.rows(points, self._next_step)
        for row in new:
            step = row.pop("step")
            self._run.log(row, step=step)
            self._next_step = step + 1
        return len(new)

    def finish(self, summary: dict[str, Any] | None, *, will_resume: bool) -> None:
        """End the run after all rows are written. Its results are those of its last row."""
        self._run.finish()
