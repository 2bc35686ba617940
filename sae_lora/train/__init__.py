"""The training loop, its steps and its optimisers; knows nothing of run folders."""
