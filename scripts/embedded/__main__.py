"""Make the embedded model and SAEs: `python -m scripts.embedded`, an hour and a half on two cores."""

import argparse
from pathlib import Path

import torch

from sae_lora.embedded import ARTEFACTS
from scripts.embedded import recipe
from scripts.embedded.language_model import Budget


def main() -> None:
    """Parse the command line and make the model and the SAEs."""
    parser = argparse.ArgumentParser(prog="python -m scripts.embedded", description=__doc__)
    parser.add_argument("--to", type=Path, default=ARTEFACTS, help="folder to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="changes the last bits of results")
    parser.add_argument("--model-tokens", type=int, default=Budget().tokens)
    parser.add_argument("--sae-tokens", type=int, default=recipe.SAEBudget().tokens)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe.make(
        arguments.to,
        Budget(tokens=arguments.model_tokens),
        recipe.SAEBudget(tokens=arguments.sae_tokens),
        arguments.seed,
    )


if __name__ == "__main__":
    main()
