"""Errors, files, locks, signals and the console, for all rooms."""
