"""The config of a run: names, types, checks, identity. Knows nothing of models or of run folders."""
