"""The meaning of latents before and after training: the suite `latents`, its pages, its export."""

PAGE = "latents/index.html"
"""The page about the latents of a run, in its `evaluation/`."""
