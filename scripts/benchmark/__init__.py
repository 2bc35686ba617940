"""Speed of training against the loop that the method was published with, and proof that both agree."""
