"""An SAE in a model, and what is computed with it."""
