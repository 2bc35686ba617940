"""The run folder, and what it says of a run. Imports no torch."""

from sae_lora.records.folder import RunFolder

__all__ = ["RunFolder"]
