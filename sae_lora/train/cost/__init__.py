"""Cost of runs that train together, from shapes only: floating-point operations and peak memory."""
