"""From the points of a sweep to jobs: plan, packs, execution here or on SLURM."""
