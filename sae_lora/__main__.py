"""`python -m sae_lora`: the command line."""

import sys

from sae_lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
