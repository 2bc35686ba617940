"""Comparisons between the runs of an experiment: methods, recipes, several SAEs. Imports no torch."""
