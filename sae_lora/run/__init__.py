"""One process: runs that train together, from their folders to their summaries."""
