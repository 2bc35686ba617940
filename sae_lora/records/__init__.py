"""The run folder and its content. Imports no torch."""

from sae_lora.records.folder import RunFolder  # jobs pickled before version 0.2 import it from here

__all__ = ["RunFolder"]
