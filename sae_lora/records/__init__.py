"""The run folder, and what it says of a run. Imports no torch."""

from sae_lora.records.folder import RunFolder  # jobs pickled before version 0.2 find it here

__all__ = ["RunFolder"]
