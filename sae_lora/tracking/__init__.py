"""Weights & Biases: a view of run folders."""
