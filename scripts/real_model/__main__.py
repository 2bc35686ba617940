"""The runs of docs/results/real_model.md, one stage after the other.

    python -m scripts.real_model real_model            # every stage, on this machine
    python -m scripts.real_model real_model saes ranks # some stages
    python -m scripts.real_model --hub outputs         # the model and the Pile from Hugging Face's hub

Finished runs are not run again and interrupted runs go on, so the same command goes on where it stopped.
Without `--hub`, the folder is one that `scripts.real_model.prepare` has written. Runs are in `outputs/`
of the folder. Prints the minutes of each stage.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import sae_lora
from sae_lora.common.errors import UserError
from sae_lora.report.sweep import Sweep
from scripts import addup

SPARSITIES = (16, 64)
"""L0 of the SAEs. All stages but `ranks` use the first."""
SUITES = ("core", "mechanism", "lora")
PROMPT = "Paris is the capital of France. The capital of Italy is"


class Runs:
    """Launches experiments on one model and text."""

    def __init__(self, folder: Path, *, from_hub: bool) -> None:
        self.outputs = folder / "outputs"
        self._common = [f"output_dir={self.outputs}", "tracking=disabled"]
        self._saes: dict[int, str] = {}
        if not from_hub:
            model, texts = folder / "SmolLM2-135M", folder / "texts.jsonl"
            self._common += [f"model.name={model}", "data=text_files", f"data.files='{texts}'"]

    def __call__(self, experiment: str, *overrides: str) -> Sweep:
        """Run an experiment to its end; a failed run raises its cause."""
        runs = sae_lora.launch([f"experiment=smollm2_{experiment}", *self._common, *overrides])
        for run in runs:
            _ = run.summary
        return runs

    def sae(self, l0: int = SPARSITIES[0]) -> str:
        """The override with the path of a trained SAE."""
        if l0 not in self._saes:
            (run,) = self("saes", f"sae.l0={l0}")
            self._saes[l0] = f"sae.path={run.folder}/sae/blocks.15.hook_resid_post"
        return self._saes[l0]


def saes(runs: Runs) -> None:
    """Rates for the SAEs in a short training, then both SAEs, which share the model's passes."""
    short = ("train.train_tokens=131_072", "train.eval_every_tokens=131_072")
    runs("saes", "sweep=smollm2_sae_rates", *short, "train.lr=1e-3,2.5e-3,5e-3,1e-2")
    runs("saes")


def precision(runs: Runs) -> None:
    """bfloat16 and float32, for the model and for the SAE."""
    runs("precision", runs.sae())


def rates(runs: Runs) -> None:
    """Rate × rank × schedule for LoRA, then rates of the other methods."""
    runs("recipe", runs.sae())
    runs("methods", runs.sae())
    both = ("method=lora_sae", "method.lora_lr=4.5e-3")
    runs("methods", runs.sae(), *both, "sweep=smollm2_both")


def ranks(runs: Runs) -> None:
    """Ranks around each SAE."""
    for l0 in SPARSITIES:
        runs("ranks", runs.sae(l0))


def rivals(runs: Runs) -> None:
    """The published recipe and the other methods, after the same tokens."""
    runs("ranks", runs.sae(), "train=paper", "lora=paper", "lora.rank=16,64")
    for method in ("linear_adapter", "sae_finetune"):
        runs("ranks", runs.sae(), f"variant=methods/{method}", "lora.rank=16")


def seeds(runs: Runs) -> None:
    """Other text in another order; without dropout, `train.seed` alone changes nothing."""
    for seed in addup.SEEDS[1:]:
        runs("ranks", runs.sae(), "lora.rank=16", f"train.seed={seed}", f"data.seed={seed}")


def add_up(runs: Runs) -> None:
    """LoRA, finetuning, both at once, and one after the other, after the same tokens and FLOPs."""

    def launch(*overrides: str) -> Sweep:
        return runs("addup", runs.sae(), *overrides)

    results = list(addup.rows(launch, tokens=49_152, step=1024, budgets=("tokens", "FLOPs")))
    (runs.outputs / "addup.json").write_text(json.dumps(results, indent=1) + "\n")
    print(addup.table(results))


def recipe(runs: Runs) -> None:
    """Batch sizes at each rank; alpha and LoRA+ at rank 16."""

    def launch(*overrides: str) -> None:
        runs("recipe", runs.sae(), "train.schedule=linear", *overrides)

    for batch in (1, 16):
        launch("lora.rank=16", f"train.batch_size={batch}")
        launch("lora.rank=1,64", "train.lr=1.5e-3,2.6e-3,4.5e-3,7.8e-3", f"train.batch_size={batch}")
    launch("lora.rank=16", "train.lr=4.5e-3", "lora.alpha=3,6,12", "train.loraplus_ratio=1,4")


def budget(runs: Runs) -> None:
    """Ten times the tokens, of LoRA and of the finetuned SAE."""
    runs("budget", runs.sae())
    runs("budget", runs.sae(), "method=sae_finetune", "lora.rank=16", "train.lr=3e-4,1e-3")


def suites(runs: Runs) -> None:
    """Suites of evaluation on LoRA and on the finetuned SAE."""
    variants = "variant=addup/lora,addup/finetune"
    for run in runs("addup", runs.sae(), "train.seed=0", variants):
        _python("-m", "sae_lora", "evaluate", str(run.folder), "--suite", *SUITES)


def prompt(runs: Runs) -> None:
    """The continuation of a prompt by each of the four models of a run."""
    (run,) = runs("ranks", runs.sae(), "lora.rank=16")
    adapted = run.adapted()
    texts = {
        name: adapted.generate(PROMPT, 24, sae=sae, adapters=adapters)
        for name, sae, adapters in (
            ("plain model", False, False),
            ("with the SAE", True, False),
            ("with SAE and adapters", True, True),
            ("with adapters only", False, True),
        )
    }
    (runs.outputs / "prompt.json").write_text(json.dumps(texts, indent=1) + "\n")
    print("\n".join(texts.values()))


def checks(runs: Runs) -> None:
    """The independent script on a float32 run."""
    (run,) = runs("precision", runs.sae(), "model.dtype=float32", "sae.dtype=float32")
    script = Path(__file__).with_name("check.py")
    _python(str(script), str(run.folder), "--to", str(runs.outputs / "check.json"))


def _python(*arguments: str) -> None:
    subprocess.run((sys.executable, *arguments), check=True)


STAGES: dict[str, Callable[[Runs], None]] = {
    stage.__name__: stage
    for stage in (
        saes,
        precision,
        rates,
        ranks,
        rivals,
        seeds,
        add_up,
        recipe,
        budget,
        suites,
        prompt,
        checks,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--hub", action="store_true", help="model and text from Hugging Face's hub")
    given = parser.parse_args(arguments)
    if unknown := set(given.stages) - set(STAGES):
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}")
    runs = Runs(given.folder.absolute(), from_hub=given.hub)
    try:
        for name in given.stages or STAGES:
            start = time.monotonic()
            STAGES[name](runs)
            print(f"{name}: {(time.monotonic() - start) / 60:.1f} min", flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")


if __name__ == "__main__":
    main()
