"""SAEs spliced into a model: the student, the shared frozen part (trunk), and KL."""
