"""The suite `steering`: text that a latent makes likelier."""
