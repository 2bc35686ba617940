"""Sparse autoencoders: `resolve` chooses an existing SAE, `loading` loads it through sae-lens."""
