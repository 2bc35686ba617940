"""The runs of docs/results/real_model.md, one stage after the other.

    python -m scripts.real_model real_model            # every stage, on this machine
    python -m scripts.real_model real_model saes rates # some stages
    python -m scripts.real_model --hub outputs         # the model and the Pile from Hugging Face's hub

Finished runs are not run again and interrupted runs go on, so the same command goes on where it stopped.
Without `--hub`, the folder is one that `scripts.real_model.prepare` has written. Runs are in `outputs/`
of the folder. Prints the minutes of each stage.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import sae_lora
from sae_lora.report.sweep import Sweep

SPARSITIES = (16, 64)
"""L0 of the SAEs; the rates are swept around the first."""


class Runs:
    """Launches experiments on one model and text."""

    def __init__(self, folder: Path, *, from_hub: bool) -> None:
        self._common = [f"output_dir={folder}/outputs", "tracking=disabled"]
        if not from_hub:
            model, texts = folder / "model", folder / "texts"
            self._common += [f"model.name={model}", "data=text_files", f"data.files='{texts}/*.md'"]

    def __call__(self, experiment: str, *overrides: str) -> Sweep:
        """Run an experiment to its end; a failed run raises its cause."""
        runs = sae_lora.launch([f"experiment=smollm2_{experiment}", *self._common, *overrides])
        for run in runs:
            _ = run.summary
        return runs

    def sae(self, l0: int) -> str:
        """The override with the path of a trained SAE."""
        (run,) = self("saes", f"sae.l0={l0}")
        return f"sae.path={run.folder}/sae/blocks.15.hook_resid_post"


def saes(runs: Runs) -> None:
    """Both SAEs, which share the model's passes."""
    runs("saes")


def rates(runs: Runs) -> None:
    """The rates of each rank."""
    runs("rates", runs.sae(SPARSITIES[0]))


def ranks(runs: Runs) -> None:
    """Ranks around each SAE."""
    for l0 in SPARSITIES:
        runs("ranks", runs.sae(l0))


STAGES: dict[str, Callable[[Runs], None]] = {stage.__name__: stage for stage in (saes, rates, ranks)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], default=list(STAGES))
    parser.add_argument("--hub", action="store_true", help="model and text from Hugging Face's hub")
    given = parser.parse_args(arguments)
    runs = Runs(given.folder.absolute(), from_hub=given.hub)
    for name in given.stages:
        start = time.monotonic()
        STAGES[name](runs)
        print(f"{name}: {(time.monotonic() - start) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
