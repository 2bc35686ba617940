"""Check that two versions of this package compute bit-identical results.

python scripts/same_results.py record CHECKOUT --to FOLDER   run everything with the code in CHECKOUT
python scripts/same_results.py compare FOLDER FOLDER         list the differences of two recordings

A recording takes about ten minutes on one core. It contains a default run, a pack of nine mixed runs, a
run of every other method, all evaluation suites, the report's tables, the comparisons, an export, and
the plan (names, hashes, SAEs, costs) of every experiment. It uses only the command line, so the internal
structure of the two versions may differ. To check a change:

    git worktree add /tmp/before main
    python scripts/same_results.py record /tmp/before --to /tmp/recording-before
    python scripts/same_results.py record . --to /tmp/recording-after
    python scripts/same_results.py compare /tmp/recording-before /tmp/recording-after

Results depend on the processor, on torch and on the number of threads: record both on the same machine.
Seconds, memory, hosts, commits and absolute paths are not compared.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SMALL = ("train.train_tokens=20480", "train.eval_every_tokens=10240", "data.validation_tokens=8192")
SWEEPS: dict[str, tuple[str, ...]] = {
    "default": (),
    "mixed": (
        *("-m", *SMALL, "launcher.pack=9", "lora.dropout=0.1"),
        *("lora.rank=1,16,64", "layer.index=1,3,[2,5]"),
    ),
    "e2e": ("method=e2e", *SMALL, "sae.width=256", "sae.l0=8"),
    "sae": ("-m", "method=sae", *SMALL, "sae.architecture=topk,jumprelu", "sae.width=256", "sae.l0=8"),
    "groups": ("method=sae", "layer=groups", *SMALL, "sae.width=256", "sae.l0=8"),
    "methods": (
        *("-m", *SMALL, "sae.l0=8"),
        "method=mezo,linear_adapter,mlp_adapter,sae_finetune",
    ),
    "dora": (*SMALL, "lora.dora=true", "lora.init=kaiming", "train.micro_batch_size=2"),
    "checkpointed": ("method=sae", *SMALL, "sae.width=256", "sae.l0=8", "method.checkpoints=[0.5]"),
}
AFTERWARDS = (
    "evaluate @default --suite all --set task_limit=20 sequences=64",
    "evaluate @mixed --suite core mechanism lora --set sequences=64 resamples=200",
    "report @default @mixed @methods --no-pictures --to report",
    "compare methods @methods --to budget",
    "compare saes @mixed --to saes",
    "compare groups @groups --to groups",
    "table @mixed",
    "status @mixed",
)
"""Commands of `python -m sae_lora` that follow the sweeps. `@name` is the folder of a sweep."""
_NOT_COMPARED = {
    *("train_seconds", "total_seconds", "seconds", "tokens_per_second", "peak_memory_gb", "environment"),
    *("tracked_at", "host", "git_commit", "closed_per_minute", "made", "gap_after_seconds"),
}
_NUMBERS_OF_TIME = re.compile(r"\d[\d,.]*( ?(s|min|h|tokens/s|GB))\b")


def main() -> int:
    """Parse the command line and run it; return 1 if two recordings differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("checkout", type=Path)
    recording.add_argument("--to", type=Path, required=True)
    comparing = commands.add_parser("compare")
    comparing.add_argument("folders", type=Path, nargs=2)
    chosen = parser.parse_args()
    if chosen.command == "record":
        record(chosen.checkout.resolve(), chosen.to.resolve())
        return 0
    first, second = (json.loads((folder / "recording.json").read_text()) for folder in chosen.folders)
    differences = list(differing(first, second))
    for line in differences:
        print(line)
    print(f"{len(first)} and {len(second)} recorded parts, {len(differences)} differences")
    return int(bool(differences))


def record(checkout: Path, to: Path) -> None:
    """Run everything with the code of a checkout and write `recording.json`.

    Finished runs in the folder are not run again, so an interrupted recording can be resumed.
    """
    outputs = to / "outputs"
    outputs.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(to / "export", ignore_errors=True)
    recorder = Recorder(checkout, to)
    parts: dict[str, Any] = {}
    for experiment in sorted((checkout / "conf/experiment").glob("*.yaml")):
        name = experiment.stem
        # Without pack=off, the size of packs would depend on the free memory.
        overrides = f"experiment={name}", "launcher.dry_run=true", "launcher.pack=off"
        plan = recorder.run("launch.py", *overrides)
        parts[f"plan of {name}"] = plan
    for sweep, overrides in SWEEPS.items():
        recorder.run("launch.py", *overrides, f"sweep={sweep}", must_succeed=True)
    (summary,) = (outputs / "default").glob("*/summary.json")
    export = ["export", str(summary.parent), "--to", str(to / "export")]
    recorder.run("-m", "sae_lora", *export, must_succeed=True)
    for line in AFTERWARDS:
        words = [str(outputs / word[1:]) if word[0] == "@" else word for word in line.split()]
        if "--to" in words:
            words[-1] = str(to / words[-1])
        recorder.run("-m", "sae_lora", *words, must_succeed=True)
    roots = to, checkout
    parts |= {str(path.relative_to(to)): content(path, roots) for path in files(to)}
    (to / "recording.json").write_text(json.dumps(parts, indent=1, sort_keys=True))
    print(f"{len(parts)} parts: {to / 'recording.json'}")


class Recorder:
    """Runner of commands with the code of one checkout.

    Args:
        checkout: The folder with launch.py.
        to: Folder for all files that the commands write.
    """

    def __init__(self, checkout: Path, to: Path) -> None:
        self._checkout, self._to = checkout, to
        write_hub_cache(to / "hub")
        self._variables = os.environ | {
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "HF_HUB_CACHE": str(to / "hub"),
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
        }

    def run(self, *arguments: str, must_succeed: bool = False) -> dict[str, Any]:
        """Run a command; return its output, without times, and its exit code."""
        settings: tuple[str, ...] = ()
        if arguments[0] == "launch.py":
            settings = ("tracking=disabled", f"output_dir={self._to / 'outputs'}")
        print("python", *arguments, flush=True)
        process = subprocess.run(
            [sys.executable, *arguments, *settings],
            cwd=self._checkout,
            env=self._variables,
            capture_output=True,
            text=True,
            check=False,
        )
        if must_succeed and process.returncode != 0:
            raise SystemExit(f"exit code {process.returncode}:\n{process.stdout}\n{process.stderr}")
        return {
            "exit code": process.returncode,
            "printed": [without_times(line, (self._to,)) for line in process.stdout.splitlines()],
            "complained": [without_times(line, (self._to,)) for line in process.stderr.splitlines()],
        }


def write_hub_cache(folder: Path) -> None:
    """Write the configs of the experiments' models in the layout of the Hugging Face cache."""
    from transformers import Gemma2Config, LlamaConfig

    gemma = {
        "google/gemma-2-2b": (2304, 9216, 26, 8, 4, 256),
        "google/gemma-2-9b": (3584, 14_336, 42, 16, 8, 256),
        "google/gemma-2-27b": (4608, 36_864, 46, 32, 16, 128),
    }
    llama = {
        "meta-llama/Llama-3.2-1B": (2048, 8192, 16, 32, 64),
        "meta-llama/Llama-3.1-8B": (4096, 14_336, 32, 32, 128),
    }
    configs: dict[str, Any] = {
        name: Gemma2Config(
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head,
            vocab_size=256_000,
        )
        for name, (width, hidden, blocks, heads, kv_heads, head) in gemma.items()
    }
    for name, (width, hidden, blocks, heads, head) in llama.items():
        configs[name] = LlamaConfig(
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=head,
            vocab_size=128_256,
            max_position_embeddings=131_072,
        )
    commit = "0" * 40
    for name, config in configs.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        config.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(commit)


def without_times(line: str, roots: Sequence[Path]) -> str:
    """A printed line without times and folders, which differ between runs of the same code."""
    return _NUMBERS_OF_TIME.sub("#", without_roots(line, roots)).rstrip()


def without_roots(text: str, roots: Sequence[Path]) -> str:
    """A text without the paths of the recording's folder and of its checkout."""
    for root in roots:
        text = text.replace(str(root), "")
    return text


def files(to: Path) -> Iterator[Path]:
    """The recorded files: results, and files that were made from results."""
    kinds = {".json", ".jsonl", ".yaml", ".csv", ".parquet", ".safetensors"}
    for path in sorted(to.rglob("*")):
        inside = path.relative_to(to).parts
        excluded = {"hub", ".lease", ".submitit", "recording.json"}
        if path.is_file() and path.suffix in kinds and not excluded & {*inside}:
            yield path


def content(path: Path, roots: Sequence[Path]) -> Any:
    """The content of a file that is compared."""
    match path.suffix:
        case ".safetensors":
            return hashlib.sha256(path.read_bytes()).hexdigest()
        case ".parquet" | ".csv":
            import pandas

            frame = (pandas.read_parquet if path.suffix == ".parquet" else pandas.read_csv)(path)
            return cleaned(json.loads(str(frame.to_json(orient="records", double_precision=15))), roots)
        case ".jsonl":
            return cleaned([json.loads(line) for line in path.read_text().splitlines()], roots)
        case ".json":
            return cleaned(json.loads(path.read_text()), roots)
        case _:
            return [without_times(line, roots) for line in path.read_text().splitlines()]


def cleaned(value: Any, roots: Sequence[Path]) -> Any:
    """Nested values without `_NOT_COMPARED` and paths."""
    match value:
        case {"target_modules": list(modules), **others}:  # peft writes a set, in any order
            return {"target_modules": sorted(modules)} | cleaned(others, roots)
        case dict():
            return {key: cleaned(item, roots) for key, item in value.items() if key not in _NOT_COMPARED}
        case list():
            return [cleaned(item, roots) for item in value]
        case str():
            return without_roots(value, roots)
        case _:
            return value


def differing(first: Any, second: Any, at: str = "") -> Iterator[str]:
    """A line for each difference between two nested values; `at` is their path."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted(first.keys() | second.keys()):
            if key not in second:
                yield f"{at}/{key}: only in the first"
            elif key not in first:
                yield f"{at}/{key}: only in the second"
            else:
                yield from differing(first[key], second[key], f"{at}/{key}")
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for number, items in enumerate(zip(first, second, strict=True)):
            yield from differing(*items, f"{at}[{number}]")
    elif first != second or type(first) is not type(second):
        yield f"{at}: {str(first)[:200]} != {str(second)[:200]}"


if __name__ == "__main__":
    sys.exit(main())
