"""Mistakes on a command line and in YAML files, each as one message: what is wrong, and what works."""
