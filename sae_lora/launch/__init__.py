"""Plans a sweep, packs its runs, and dispatches them, here or to SLURM."""
