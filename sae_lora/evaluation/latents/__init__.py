"""Latents of an SAE before and after adaptation: when they are active, and what they do."""
