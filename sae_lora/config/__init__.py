"""What a run is: names, types, checks, identity. Knows nothing of models or of files of runs."""
