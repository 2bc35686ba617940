"""A finished run: loaded as a model, and exported into a folder."""
