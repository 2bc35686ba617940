"""`python -m sae_lora`: what can be done with runs that are there."""

import sys

from sae_lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
