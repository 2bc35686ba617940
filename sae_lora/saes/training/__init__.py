"""SAEs in training, by sae-lens's own classes."""
