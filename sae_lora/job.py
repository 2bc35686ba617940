"""The classes of jobs that were pickled before version 0.2, removed in the version after that.

A job that waits in SLURM's queue is a pickle, which names its classes by module.
"""

from sae_lora.launcher.job import Job, _Part

__all__ = ["Job", "_Part"]
