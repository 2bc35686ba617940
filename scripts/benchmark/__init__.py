"""Speed of training compared to the published code of the method, and a check that both agree."""
