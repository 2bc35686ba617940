"""Closes the cross-entropy gap of SAEs spliced into language models, with LoRA adapters."""
