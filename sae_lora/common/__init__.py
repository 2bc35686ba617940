"""Errors, files, locks, signals and the console, which every room uses."""
