"""A finished run's model: loaded once more, and as a folder for others."""
