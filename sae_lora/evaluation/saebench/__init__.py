"""SAEBench, whose pins clash with this package's: `suite` here, `__main__` in its own environment."""
