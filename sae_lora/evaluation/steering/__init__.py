"""The suite `steering`: effect of adding a latent on the log-probability of text."""
