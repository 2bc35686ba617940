"""Text as training sequences: `documents` reads and splits it, `packing` cuts it, `corpus` caches it."""
