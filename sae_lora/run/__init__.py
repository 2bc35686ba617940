"""One process that trains a pack of runs, from their folders to their summaries."""
