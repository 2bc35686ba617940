"""Text as training sequences: `documents` reads and splits, `packing` tokenises, `corpus` caches."""
