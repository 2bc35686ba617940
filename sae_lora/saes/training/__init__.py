"""SAEs in training, built on sae-lens's classes."""
