"""Formats of SAE folders."""
