"""Suites that measure finished runs; each writes a file into a run's `evaluation/`."""
