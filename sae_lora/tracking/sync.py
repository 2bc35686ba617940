"""Upload of run folders to W&B, wherever and however the runs were tracked."""

import threading
from collections.abc import Sequence

from rich.table import Table

from sae_lora.common.console import complain
from sae_lora.common.errors import UserError
from sae_lora.common.locks import holder
from sae_lora.common.secrets import redacted
from sae_lora.config.identity import identity
from sae_lora.config.serialize import load
from sae_lora.records.folder import RunFolder
from sae_lora.tracking import wandb_run
from sae_lora.tracking.wandb_run import WandbRun
from sae_lora.tracking.wandb_view import WandbView
from sae_lora.train import checkpoint

_TIMEOUT_S = 120.0
"""The limit for one run, which has a few hundred rows at most."""


def upload(folders: Sequence[RunFolder]) -> Table:
    """Send the server what it does not have of the runs; return a table of it.

    A run that a process holds is left alone: that process shows it.

    Raises:
        UserError: Where nobody is logged in, or the server does not answer.
    """
    if (obstacle := wandb_run.obstacle(probe=True)) is not None:
        raise UserError(f"nothing can be uploaded: {obstacle}")
    table = Table("run", "rows before", "rows uploaded", "address")
    for folder in folders:
        if (at_work := holder(folder.path)) is not None:
            who = f"process {at_work.pid} on {at_work.host}"
            complain("left alone", f"{folder.path.name} is being run by {who}, which shows it itself")
            continue
        before, new, place = _within(_TIMEOUT_S, folder)
        table.add_row(folder.path.name, str(before), str(new), place)
    return table


def _upload(folder: RunFolder) -> tuple[int, int, str]:
    """Upload a run; return the rows that the server had, the new ones, and the run's address."""
    config = load(folder.config.read_text())
    goes_on, points = folder.is_unsettled, len(folder.read_curve())
    if goes_on:  # points are final once its checkpoint holds them
        points = checkpoint.points(folder.checkpoints, identity(config))
        if not points:
            return 0, 0, "nothing to show yet"
    summary = folder.read_summary() if folder.is_finished else None
    run = WandbRun(WandbView(folder, config, summary and summary["environment"]), online=True)
    rows = run.show(points)
    run.finish(summary, goes_on=goes_on)
    return points - rows, rows, run.place


def _within(most_s: float, folder: RunFolder) -> tuple[int, int, str]:
    """`_upload`, for at most so long; wandb itself would wait for a server for days."""
    outcome: list[tuple[int, int, str] | Exception] = []

    def work() -> None:
        try:
            outcome.append(_upload(folder))
        except Exception as error:  # whatever wandb raises; this run folder's own errors too
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(most_s)
    match outcome:
        case [tuple() as uploaded]:
            return uploaded
        case [Exception() as error]:
            raise UserError(f"{folder.path.name} cannot be uploaded: {redacted(str(error))}") from error
        case _:
            wandb_run.cut_off()
            raise UserError(
                f"{folder.path.name} was not uploaded within {most_s:g} s, because the W&B server does "
                "not answer; the same command again goes on"
            )
