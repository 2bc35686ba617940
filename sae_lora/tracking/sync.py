"""Upload of run folders to W&B. It does not matter if or where the runs were tracked."""

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
"""Time limit for one run, which has at most a few hundred rows."""


def upload(folders: Sequence[RunFolder]) -> Table:
    """Upload the rows and results that W&B does not have yet; return a table of the uploads.

    A run that a process holds is skipped, because that process uploads it.

    Raises:
        UserError: If nobody is logged in, or the server does not answer.
    """
    if (obstacle := wandb_run.obstacle(probe=True)) is not None:
        raise UserError(f"cannot upload: {obstacle}")
    table = Table("run", "rows before", "rows uploaded", "address")
    for folder in folders:
        if (process := holder(folder.path)) is not None:
            owner = f"process {process.pid} on {process.host}"
            complain("skipped", f"{folder.path.name} is being run by {owner}, which uploads it")
            continue
        old, new, address = _upload_within(_TIMEOUT_S, folder)
        table.add_row(folder.path.name, str(old), str(new), address)
    return table


def _upload(folder: RunFolder) -> tuple[int, int, str]:
    """Upload a run; return the number of old rows, the number of new rows, and the address."""
    config = load(folder.config.read_text())
    will_resume, points = folder.is_unsettled, len(folder.read_curve())
    if will_resume:  # a point is final when a checkpoint contains it
        points = checkpoint.points(folder.checkpoints, identity(config))
        if not points:
            return 0, 0, "no rows yet"
    summary = folder.read_summary() if folder.is_finished else None
    run = WandbRun(WandbView(folder, config, summary and summary["environment"]), online=True)
    rows = run.show(points)
    run.finish(summary, will_resume=will_resume)
    return points - rows, rows, run.place


def _upload_within(timeout_s: float, folder: RunFolder) -> tuple[int, int, str]:
    """Call `_upload` with a time limit; wandb would wait for a server for days."""
    outcome: list[tuple[int, int, str] | Exception] = []

    def work() -> None:
        try:
            outcome.append(_upload(folder))
        except Exception as error:  # errors of wandb, of many types, and of the run folder
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    match outcome:
        case [tuple() as uploaded]:
            return uploaded
        case [Exception() as error]:
            raise UserError(f"cannot upload {folder.path.name}: {redacted(str(error))}") from error
        case _:
            wandb_run.cut_off()
            raise UserError(
                f"{folder.path.name} was not uploaded within {timeout_s:g} s: the W&B server does not "
                "answer; repeat the command to continue"
            )
