"""The training loop, its steps and its optimisers. Nothing here depends on run folders."""
