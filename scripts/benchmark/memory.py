"""Estimated and measured peak memory of packs on a CPU, as a table.

python -m scripts.benchmark.memory                   the default, and a random Gemma-2 of 95M parameters
python -m scripts.benchmark.memory --model FOLDER …  models in folders, each with a random SAE
python -m scripts.benchmark.memory --process         a process before it loads a model

Each pack takes two steps and two evaluations in a process of its own. Linux only.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sae_lora.common.console import say

RANKS = (16, 1, 2, 4, 8, 32, 3, 6)
"""Ranks of the runs of a pack."""
_SHORT = (
    "train.train_tokens=2048",
    "train.eval_every_tokens=2048",
    "tracking=disabled",
    "train.device=cpu",
)
_LARGER = (
    "data.context_length=256",
    "data.validation_tokens=1024",
    "train.eval_batch_tokens=1024",
    "train.batch_size=4",
)
"""Overrides for models that are larger than the embedded one: few tokens, since a CPU is slow."""


def measured_bytes(overrides: Sequence[str], pack: int) -> tuple[float, float]:
    """Estimated and measured peak memory, in bytes, of the first `pack` ranks trained together."""
    from sae_lora.config.compose import points
    from sae_lora.launcher.plan import plan
    from sae_lora.train.cost.estimate import estimate

    ranks = ",".join(map(str, RANKS[:pack]))
    with tempfile.TemporaryDirectory() as home:
        arguments = ["-m", f"lora.rank={ranks}", f"output_dir={home}", *_SHORT, *overrides]
        runs = plan(points(arguments)).runs
        for run in runs:
            run.freeze()
        estimated = estimate([run.config for run in runs]).peak_bytes
        return estimated, _peak_of_child("--train", *(str(run.folder.path) for run in runs))


def _peak_of_child(*arguments: str) -> float:
    command = [sys.executable, "-m", "scripts.benchmark.memory", *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(printed.splitlines()[-1])


def _peak() -> int:
    """Peak resident memory of this process, in bytes: without that of the process that started it."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return 1024 * int(line.split()[1])


def _train(folders: Sequence[str]) -> None:
    from sae_lora.common.lazy_imports import import_quickly

    import_quickly()
    from sae_lora.records.folder import RunFolder
    from sae_lora.run import execute

    if code := execute.attempt([RunFolder(Path(folder)) for folder in folders]):
        sys.exit(code)


def _load_text() -> None:
    from sae_lora.common.lazy_imports import import_quickly

    import_quickly()
    from sae_lora.config.compose import default
    from sae_lora.config.identity import train_steps
    from sae_lora.data import corpus
    from sae_lora.models.loading import load_tokenizer
    from sae_lora.run import execute  # noqa: F401  with all that a run imports

    config = default()
    sequences = train_steps(config) * config.train.batch_size
    corpus.load(config.data, load_tokenizer(config.model), sequences, config.train.batch_size)


def _with_sae(model: Path, folder: Path) -> list[str]:
    """Overrides for a model in a folder, and a random SAE in the middle of it, which is written."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    block, width = config.num_hidden_layers // 2, config.hidden_size
    metadata = SAEMetadata(hook_name=f"blocks.{block}.hook_resid_post")
    TopKSAE(TopKSAEConfig(d_in=width, d_sae=4 * width, k=32, metadata=metadata)).save_model(folder)
    return [f"model.name={model}", "sae=disk", f"sae.path={folder}", f"layer.index={block}", *_LARGER]


def _random_gemma2(folder: Path) -> None:
    """Write a random Gemma-2 with the embedded tokenizer."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    from sae_lora.embedded import MODEL

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = Gemma2Config(
        vocab_size=16_384,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=64,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packs", type=int, nargs="+", default=[1, 4, 8], help="numbers of runs")
    parser.add_argument("--model", type=Path, nargs="+", help="folders of models, in place of the two")
    parser.add_argument("--process", action="store_true")
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train or arguments.process:
        _train(arguments.train) if arguments.train else _load_text()
        print(_peak())
        return
    say("| model | runs in the pack | estimated, GB | measured, GB | ratio |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        cases: dict[str, list[str]] = {}
        if arguments.model is None:
            _random_gemma2(home / "gemma2")
            cases = {
                "the default": [],
                "random Gemma-2, 95M": _with_sae(home / "gemma2", home / "gemma2_sae"),
            }
        for folder in arguments.model or ():
            cases[folder.name] = _with_sae(folder.resolve(), home / f"{folder.name}_sae")
        for name, overrides in cases.items():
            for pack in arguments.packs:
                estimated, measured = measured_bytes(overrides, pack)
                numbers = f"{estimated / 1e9:.2f} | {measured / 1e9:.2f} | {estimated / measured:.2f}"
                say(f"| {name} | {pack} | {numbers} |")


if __name__ == "__main__":
    main()
