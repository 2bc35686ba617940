"""From a sweep's points to jobs: plan, packs, dispatch here or to SLURM."""
