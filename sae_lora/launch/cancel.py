"""Runs taken out of SLURM's queue."""

from collections.abc import Sequence

from sae_lora.common.console import complain, say
from sae_lora.records import slurm
from sae_lora.records.folder import RunFolder, runs_of
from sae_lora.records.status import State, standings


def cancel(folders: Sequence[RunFolder]) -> None:
    """Cancels the jobs of runs that have not ended. What they have saved stays, and can go on.

    Raises:
        UserError: Where SLURM cannot be asked, or refuses.
    """
    queue = slurm.queue() if any(folder.job for folder in folders) else {}
    under_way = [folder for folder in folders if not folder.is_finished]
    jobs = {job for folder in under_way if (job := folder.job) is not None and job in queue}
    if jobs:
        slurm.cancel(sorted(jobs))
    say(f"{len(jobs)} jobs cancelled")
    asked_for = {folder.path for folder in folders}
    for other in runs_of(folders[0].path.parent):
        if other.path not in asked_for and not other.is_finished and other.job in jobs:
            say(f"{other.path.name} trains there too, and stops")
    for folder, standing in zip(folders, standings(folders), strict=True):
        if standing.state is State.running and folder.job not in jobs:
            complain(
                "left alone", f"{folder.path.name} is running {standing.note}; Ctrl-C there stops it"
            )
