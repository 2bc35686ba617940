"""Whether latents keep their meaning: the suite `latents`, its pages, its export."""

PAGE = "latents/index.html"
"""The page about the latents of a run, in its `evaluation/`."""
