"""One run, built and connected: the only module that knows all the others."""

import math
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import logging as transformers_logging
from transformers import set_seed

from sae_lora import checkpoint, distill, hub, lease, lora, models, tracking
from sae_lora.config import (
    Config,
    Device,
    LoRAConfig,
    TrainConfig,
    identity,
    load,
    readable_name,
    train_steps,
)
from sae_lora.data import corpus
from sae_lora.dimensions import read_dimensions, source
from sae_lora.errors import EXIT_FAILED, EXIT_HELD, EXIT_INTERRUPTED, ConfigError, UserError
from sae_lora.interruption import Interrupted, Interruption
from sae_lora.metrics import Evaluator
from sae_lora.records import CurvePoint, CurveWriter, Progress, RunFolder, Summary, new_folder
from sae_lora.saes import loading
from sae_lora.terminal import Display, complain


def execute(
    folder: RunFolder,
    interruption: Interruption | None = None,
    make_sure: Callable[[], None] = lambda: None,
) -> Summary:
    """Trains and evaluates what the folder's `config.yaml` describes, and writes it into the folder.

    Goes on from the newest checkpoint, where there is one.

    Args:
        folder: The run folder. Its config is checked, with its SAEs resolved; nothing else is read.
        interruption: What may ask the run to stop; by default nothing does.
        make_sure: Called before anything that counts is written; raises where it must not be.

    Raises:
        UserError: For what the user can mend: files that cannot be fetched, text that is too short;
            and what `make_sure` raises.
        Interrupted: When asked to stop; where training stands is saved.
    """
    interruption = interruption or Interruption()
    started = time.perf_counter()
    config = load(folder.config.read_text())
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    device = _device(config.train.device)
    steps = train_steps(config)
    run_hash = identity(config)
    saved = checkpoint.newest(folder.checkpoints, run_hash, lambda text: complain("damaged", text))
    seconds_before = saved.values["total_seconds"] if saved else 0.0
    folder.set_aside(curve=saved is None)

    with Display() as show:
        # Text and SAE first: whatever is wrong with them is known before the model is loaded.
        report = _Reporter(show, folder, config.train, steps)
        report.stage(f"loading text ({config.data.source.name}) and SAE ({config.sae.family.name})")
        tokenizer = models.load_tokenizer(config.model)
        text = corpus.load(
            config.data,
            tokenizer,
            steps * config.train.batch_size,
            config.train.batch_size,
            show.counter("tokenising", "sequences"),
        )
        show.end()
        dimensions = read_dimensions(config.model)
        loaded = [loading.load(config.sae, choice, dimensions, device) for choice in config.sae.used]
        saes = {one.hookpoint: one.sae for one in loaded}

        report.stage(f"loading model ({config.model.name}) on {device}")
        model = models.load_model(config.model, config.train.dtype, device)
        set_seed(config.train.seed)
        adapters = lora.attach(model, config.lora, min(choice.block for choice in config.sae.used))
        trainable = sum(weight.numel() for weight in lora.trainable_weights(model).values())
        keeps = loading.keeps_special_tokens(config.sae, loaded)
        evaluate = Evaluator(
            model,
            saes,
            text.validation_tokens,
            text.special_ids.to(device) if keeps else None,
            max(1, config.train.eval_batch_tokens // config.data.context_length),
            config.train.kl_chunk_tokens,
        )

        training = distill.Training(model, saes, evaluate, config.train, steps)
        if saved is not None:
            training.restore(saved)
            report.stage(f"going on from step {training.step:,} of {steps:,}")
            report.checkpoint_step = training.step
        report.stage(f"training {trainable:,} LoRA weights on {config.train.train_tokens:,} tokens")
        batches = text.batches(config.train.batch_size, config.data.seed, training.step)
        summary: Summary | None = None
        tracker = tracking.start(config, readable_name(config), run_hash, folder.path)

        def save() -> None:
            with training.paused(), interruption.held():
                make_sure()
                state = training.state()
                state.values["total_seconds"] = seconds_before + time.perf_counter() - started
                checkpoint.save(folder.checkpoints, run_hash, state)
                report.checkpoint_step = training.step

        def after_step(progress: distill.StepDone) -> None:
            report.step(progress)
            if progress.step % config.train.checkpoint_every_steps == 0:
                save()

        try:
            with CurveWriter(folder.curve, saved.values["points"] if saved else 0) as curve:
                try:
                    for point in training.points(batches, after_step, interruption.held):
                        curve.append(point)
                        tracker.log(point)
                        show.point(point)
                except Interrupted:
                    save()
                    raise
            with interruption.held():
                make_sure()
                with new_folder(folder.adapter) as beside:
                    lora.save(adapters, beside, source(config.model))
                points = folder.read_curve()
                summary = Summary(
                    name=readable_name(config),
                    hash=run_hash,
                    **_outcome(points),
                    trainable_parameters=trainable,
                    total_seconds=seconds_before + time.perf_counter() - started,
                    validation_tokens=text.validation.size,
                    model=_describe_model(config, model),
                    sae=[one.description | points[-1].per_sae[one.hookpoint] for one in loaded],
                    lora=_describe_lora(config.lora),
                    seed=config.train.seed,
                    data=text.description | {"special_tokens_kept": keeps},
                    environment=_describe_environment(device),
                    tracked_at=tracker.place,
                )
                folder.write_summary(summary)
                # Nothing is left to go on with.
                shutil.rmtree(folder.checkpoints, ignore_errors=True)
                folder.progress.unlink(missing_ok=True)
            return summary
        finally:
            tracker.finish(summary)


def _device(wanted: Device) -> torch.device:
    if wanted is Device.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("train.device", "cuda", "auto or cpu: torch finds no GPU here", nearest="auto")
    return torch.device(wanted.name)


class _Reporter:
    """Shows where the run stands: to who watches this process, and in its folder to who does not."""

    def __init__(self, show: Display, folder: RunFolder, config: TrainConfig, steps: int) -> None:
        self.checkpoint_step: int | None = None
        self._show = show
        self._folder = folder
        self._config = config
        self._steps = steps
        self._count = show.counter("training", "tokens")
        self._last_time, self._last_tokens = time.monotonic(), None

    def stage(self, text: str) -> None:
        """What is done next."""
        self._show.stage(text)
        self._folder.write_progress(Progress(text, steps=self._steps))

    def step(self, done: distill.StepDone) -> None:
        """One more step; shown about once a second, since reading a loss from a GPU is not free."""
        now = time.monotonic()
        if now - self._last_time < _SHOW_EVERY_S and done.step < self._steps:
            return
        rate = None
        if self._last_tokens is not None and now > self._last_time:
            rate = (done.tokens - self._last_tokens) / (now - self._last_time)
        self._last_time, self._last_tokens = now, done.tokens
        loss = done.loss
        self._count(done.tokens, self._config.train_tokens, f"loss {loss:.3f}")
        self._folder.write_progress(
            Progress(
                stage="training",
                step=done.step,
                steps=self._steps,
                tokens=done.tokens,
                train_tokens=self._config.train_tokens,
                loss=loss if math.isfinite(loss) else None,
                tokens_per_second=rate,
                checkpoint_step=self.checkpoint_step,
            )
        )


def _outcome(points: list[CurvePoint]) -> dict[str, Any]:
    first, last = points[0], points[-1]
    closed = [point.gap_closed for point in points if point.gap_closed is not None]
    same = ("base_ce", "spliced_ce", "student_ce", "ce_gap", "gap_closed", "kl", "top1_agreement")
    return {name: getattr(last, name) for name in (*same, "fvu", "l0", "train_seconds")} | {
        "initial_gap": last.spliced_ce - last.base_ce,
        "initial_kl": first.kl,
        "best_gap_closed": max(closed, default=None),
        "train_tokens": last.tokens,
        "train_steps": last.step,
    }


def _describe_model(config: Config, model: models.LanguageModel) -> dict[str, Any]:
    return {
        "name": config.model.name,
        "revision": config.model.revision,
        "commit": config.model.commit or hub.cached_commit(config.model.name, config.model.revision),
        "class": type(model.model).__name__,
        "blocks": len(model.blocks),
        "loaded_as": config.model.dtype.name,
        "computed_in": config.train.dtype.name,
    }


def _describe_lora(config: LoRAConfig) -> dict[str, Any]:
    scale = config.alpha / (math.sqrt(config.rank) if config.rank_stabilised else config.rank)
    return {
        "rank": config.rank,
        "alpha": config.alpha,
        "scale": scale,
        "dropout": config.dropout,
        "targets": config.targets,
        "blocks": config.blocks,
    }


_SHOW_EVERY_S = 1.0
_PACKAGES = ("transformers", "peft", "sae-lens", "datasets", "wandb", "hydra-core")


def _describe_environment(device: torch.device) -> dict[str, Any]:
    return {
        "sae_lora": metadata.version("sae_lora"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        # torch's own word on its version also names its CUDA build.
        "packages": {"torch": torch.__version__} | {name: metadata.version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
    }


def _git_commit() -> str | None:
    """The commit that this code is at, marked where files differ from it; `None` outside git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # or it is some other project's commit
        commit = git("rev-parse", "HEAD").strip()
        return commit + ("-dirty" if git("status", "--porcelain", "--", ".").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def attempt(folder: RunFolder) -> int:
    """One attempt at a run, unless it is finished or another process is at it.

    What goes wrong is written into the folder and said; returns the exit code, 0 or one of
    `EXIT_FAILED`, `EXIT_HELD`, `EXIT_INTERRUPTED`.
    """
    interruption = Interruption()
    try:
        with interruption.watching(), lease.held(folder.path) as held:
            if not folder.is_finished:
                execute(folder, interruption, held.check)
    except (lease.HeldError, lease.LostError) as error:
        complain("left alone", str(error))
        return EXIT_HELD
    except Interrupted:
        return EXIT_INTERRUPTED
    except Exception as error:  # whatever it is, its cause is kept
        folder.write_failure(_cause(error), traceback.format_exc())
        return EXIT_FAILED
    return 0


def _cause(error: Exception) -> str:
    """Why the run failed, for people."""
    if isinstance(error, UserError):
        return str(error)
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if out_of_memory or "can't allocate memory" in str(error):  # torch's words on a CPU
        return (
            f"out of memory: {error}\n  smaller: train.batch_size, train.kl_chunk_tokens (logits) or "
            "train.eval_batch_tokens (the last two change no result)"
        )
    return f"{type(error).__name__}: {error}"


def main() -> int:
    """One attempt in a process of its own: `python -m sae_lora.run outputs/<sweep>/<run>`."""
    folder = RunFolder(Path(sys.argv[1]))
    code = attempt(folder)
    if code == EXIT_INTERRUPTED and not folder.is_finished:
        complain("stopped", "asked to; the run goes on from its checkpoint")
    return 0 if folder.is_finished and code == EXIT_INTERRUPTED else code


if __name__ == "__main__":
    sys.exit(main())
