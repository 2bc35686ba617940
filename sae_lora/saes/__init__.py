"""Sparse autoencoders: `registry` chooses one that exists, `loading` loads it through sae-lens."""
