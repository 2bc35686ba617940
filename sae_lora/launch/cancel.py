"""Cancelling runs that SLURM has."""

from collections.abc import Sequence

from sae_lora.common.console import complain, say
from sae_lora.records import slurm
from sae_lora.records.folder import RunFolder, runs_of
from sae_lora.records.status import State, read_statuses


def cancel(folders: Sequence[RunFolder]) -> None:
    """Cancel the jobs of unfinished runs. Their checkpoints stay, and the runs can resume.

    Raises:
        UserError: Where SLURM does not answer, or refuses.
    """
    queue = slurm.queue() if any(folder.job for folder in folders) else {}
    under_way = [folder for folder in folders if not folder.is_finished]
    jobs = {job for folder in under_way if (job := folder.job) is not None and job in queue}
    if jobs:
        slurm.cancel(sorted(jobs))
    say(f"{len(jobs)} jobs cancelled")
    named = {folder.path for folder in folders}
    for other in runs_of(folders[0].path.parent):
        if other.path not in named and not other.is_finished and other.job in jobs:
            say(f"{other.path.name} trains there too, and stops")
    for folder, status in zip(folders, read_statuses(folders), strict=True):
        if status.state is State.running and folder.job not in jobs:
            complain("left alone", f"{folder.path.name} is running {status.note}; Ctrl-C there stops it")
