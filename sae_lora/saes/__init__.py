"""Sparse autoencoders: `resolve` chooses one that exists, `loading` loads it through sae-lens."""
