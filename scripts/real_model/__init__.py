"""Results on a real language model, SmolLM2-135M."""
