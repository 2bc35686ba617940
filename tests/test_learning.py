"""What a step of each method does: slopes, gradients and balances, and what is left as it was."""
