"""How fast training is, against the loop that the method was published with, and that both agree."""
