"""Runs that train together, built and connected: the only module that knows all the others."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sae_lora.common import hub
from sae_lora.common.console import Display, complain
from sae_lora.common.errors import (
    EXIT_FAILED,
    EXIT_HELD,
    EXIT_INTERRUPTED,
    EXIT_NOT_TOGETHER,
    UserError,
    is_out_of_memory,
)
from sae_lora.common.isolation import Isolation
from sae_lora.common.locks import HeldError, LostError, held
from sae_lora.common.provenance import environment
from sae_lora.common.secrets import redacted
from sae_lora.common.signals import Interrupted, Interruption
from sae_lora.config.identity import pack_key, train_steps
from sae_lora.config.schema import Config
from sae_lora.data import corpus
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import load_tokenizer, quieten
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import Progress, Summary
from sae_lora.run.active_run import ActiveRun, write_failure
from sae_lora.run.build import Builder
from sae_lora.run.progress import Reporter, say_point
from sae_lora.run.worker import Beginning
from sae_lora.train.distributed import ONE_PROCESS, GoneError, ProcessGroup, ProcessLayout, leading
from sae_lora.train.methods import Sample
from sae_lora.train.train_state import TrainState
from sae_lora.train.trainer import Trainer


class NotTogetherError(Exception):
    """Runs that cannot train together; each can alone."""


def execute(
    runs: Sequence[ActiveRun],
    interruption: Interruption | None = None,
    layout: ProcessLayout = ONE_PROCESS,
) -> list[Summary | Exception]:
    """Trains and evaluates together what the folders' configs describe, and writes it into them.

    Each goes on from its newest checkpoint, where it has one. What goes wrong with one alone is
    written into its folder, and the others go on.

    Args:
        runs: Runs that may train together, new objects.
        interruption: What may ask the runs to stop; by default nothing does.
        layout: How many processes share the batches.

    Returns:
        What each has found, or why it has found nothing.

    Raises:
        UserError: For what concerns all of them and the user can mend: files that cannot be
            fetched, text that is too short.
        NotTogetherError: Where the runs differ in what they must have in common.
        MemoryError: And torch's own: where together they need more than there is. Each can go on
            from its checkpoint.
        Interrupted: When asked to stop; where training stands is saved.
    """
    with Display() as display:
        _Execution(runs, interruption or Interruption(), display, layout).run()
    return [run.outcome for run in runs if run.outcome is not None]


class _Execution:
    """Runs that train together, from their folders to their summaries."""

    def __init__(
        self,
        runs: Sequence[ActiveRun],
        interruption: Interruption,
        display: Display,
        layout: ProcessLayout,
    ) -> None:
        self._runs = Isolation(runs, ActiveRun.fail)
        self._layout = layout
        self._interruption = interruption
        self._display = display
        self._started = time.perf_counter()

    def run(self) -> None:
        """Builds them, trains them, and writes what they find."""
        quieten()
        runs = self._runs
        runs.each(ActiveRun.read)
        runs.each(ActiveRun.make_way)
        if not runs.left:
            return
        config = runs.left[0].config  # for what they have in common
        if len({pack_key(run.config) for run in runs.left}) > 1:
            raise NotTogetherError("model, data or batches of these runs differ")
        builder = Builder(config)

        # Text and SAEs first: whatever is wrong with them is known before the model is loaded.
        families = ", ".join(sorted({run.config.sae.family.name for run in runs.left}))
        self._stage(f"loading text ({config.data.source.name}) and SAE ({families})")
        text = corpus.load(
            config.data,
            load_tokenizer(config.model),
            train_steps(config) * config.train.batch_size,
            config.train.batch_size,
            self._display.counter("tokenising", "sequences"),
        )
        self._display.end()
        runs.each(lambda run: builder.load_saes(run.config.sae))
        if not runs.left:
            return

        sent = runs.left.copy()
        paths = [str(run.folder.path) for run in sent]
        on_gpus = builder.device.type == "cuda"
        with leading(self._layout, paths, on_gpus, lambda: self._interruption.asked) as processes:
            others = f" with {self._layout.size - 1} other processes" if self._layout.size > 1 else ""
            self._stage(f"loading model ({config.model.name}) on {builder.device}{others}")
            first = next(text.batches(config.train.batch_size, config.data.seed))
            sample = Sample(first, text.special_ids)
            _ = builder.model  # what is wrong with it concerns all
            runs.each(lambda run: builder.build(run, sample))
            if runs.left:
                trainings = {sent.index(run): run.training for run in runs.left}
                processes.broadcast(Beginning.of(trainings, text.special_ids, text.validation_tokens))
                self._train(builder, config, text, processes)

    def _train(
        self, builder: Builder, config: Config, text: corpus.Corpus, processes: ProcessGroup
    ) -> None:
        """Trains all that are left to the end, and writes what they have found."""
        model, steps = builder.model, train_steps(config)
        runs = {run.training: run for run in self._runs.left}

        def fail(training: TrainState, error: Exception) -> None:
            training.reset()
            runs[training].fail(error)

        trainings = Isolation(runs, fail)
        special_ids = text.special_ids.to(model.device)
        trainer = builder.trainer(trainings, special_ids, text.validation_tokens, processes)
        report = Reporter(self._display, runs, steps, trainings)
        save = _Saver(trainer, trainings, runs, self._interruption, self._total_seconds)

        def after_step(trained: Sequence[TrainState]) -> None:
            report.step(trained)
            for training in trained:
                with trainings.only(training):
                    runs[training].keep_if_due()
            save(
                [
                    training
                    for training in trained
                    if training in trainings.left
                    and training.step % runs[training].config.train.checkpoint_every_steps == 0
                ]
            )

        with ExitStack() as begun:
            begun.callback(_end, list(runs.values()))
            made_with = environment(model.device)
            trainings.each(lambda training: runs[training].begin(made_with))
            report.begin()
            batches = text.batches(config.train.batch_size, config.data.seed, trainer.first_batch)
            common = {
                "validation_tokens": text.validation.size,
                "model": _describe_model(config, model),
                "environment": made_with,
                "trained_together": len(self._runs.runs),
            }

            def finish(training: TrainState) -> None:
                run = runs[training]
                several = len(run.config.sae.used) > 1 and run.config.train.eval_each_sae
                contributions = trainer.contributions(training) if several else {}
                run.finish(self._total_seconds(run), contributions, text.description, **common)

            try:
                for training, point in trainer.points(batches, after_step, self._interruption.held):
                    with trainings.only(training):
                        runs[training].take(point)
                        say_point(point, runs[training].name if len(runs) > 1 else None)
                with self._interruption.held():
                    trainings.each(finish)
            except Interrupted:
                processes.release()
                save(trainings.left.copy())
                raise
            except Exception as error:
                if is_out_of_memory(error) or isinstance(error, GoneError):
                    processes.release()
                    traceback.clear_frames(error.__traceback__)  # what filled it
                    # Here a request to stop is heard that came before.
                    save([training for training in trainings.left if training.is_between_steps])
                raise

    def _total_seconds(self, run: ActiveRun) -> float:
        """What the run has taken: of this process, its share."""
        share = (time.perf_counter() - self._started) / len(self._runs.runs)
        return run.seconds_before + share

    def _stage(self, text: str) -> None:
        """Says what is done next, to who watches this process and in the folders to who does not."""
        self._display.stage(text)
        self._runs.each(lambda run: run.folder.write_progress(Progress(text)))


class _Saver:
    """Writes checkpoints of some runs, while training stands still and cannot be interrupted."""

    def __init__(
        self,
        trainer: Trainer,
        trainings: Isolation[TrainState],
        runs: dict[TrainState, ActiveRun],
        interruption: Interruption,
        total_seconds: Callable[[ActiveRun], float],
    ) -> None:
        self._trainer = trainer
        self._trainings = trainings
        self._runs = runs
        self._interruption = interruption
        self._total_seconds = total_seconds

    def __call__(self, wanted: Sequence[TrainState]) -> None:
        if not wanted:
            return
        with self._trainer.paused(), self._interruption.held():
            for training in wanted:
                with self._trainings.only(training):
                    run = self._runs[training]
                    run.save(self._total_seconds(run))


def _end(runs: Sequence[ActiveRun]) -> None:
    """Ends their W&B runs side by side: where the server is slow, all wait at the same time."""
    with ThreadPoolExecutor(len(runs)) as threads:
        list(threads.map(ActiveRun.end, runs))


def _describe_model(config: Config, model: LanguageModel) -> dict[str, Any]:
    return {
        "name": config.model.name,
        "revision": config.model.revision,
        "commit": config.model.commit or hub.cached_commit(config.model.name, config.model.revision),
        "class": type(model.model).__name__,
        "blocks": len(model.blocks),
        "loaded_as": config.model.dtype.name,
        "computed_in": config.train.dtype.name,
    }


def attempt(folders: Sequence[RunFolder], layout: ProcessLayout = ONE_PROCESS) -> int:
    """One attempt at runs that train together, but for those that are finished or held elsewhere.

    What goes wrong is written into the folders and said.

    Args:
        folders: The runs.
        layout: How many processes share the batches.

    Returns:
        The exit code: 0 where all are finished, or one of `sae_lora.common.errors`.
    """
    interruption = Interruption()
    held_elsewhere = False
    runs: list[ActiveRun] = []
    try:
        with interruption.watching(), ExitStack() as leases:
            for folder in folders:
                lock = leases.enter_context(ExitStack())
                try:
                    lease = lock.enter_context(held(folder.path))
                except HeldError as error:
                    complain("left alone", str(error))
                    held_elsewhere = True
                else:
                    if not folder.is_finished:
                        runs.append(ActiveRun(folder, lease.check, lock.close))
            outcomes = _outcomes(runs, interruption, layout)
    except Interrupted:
        return EXIT_INTERRUPTED
    if outcomes is None:
        return EXIT_NOT_TOGETHER
    if held_elsewhere or any(isinstance(outcome, LostError) for outcome in outcomes):
        return EXIT_HELD
    return EXIT_FAILED if any(isinstance(outcome, Exception) for outcome in outcomes) else 0


def _outcomes(
    runs: Sequence[ActiveRun], interruption: Interruption, layout: ProcessLayout
) -> list[Summary | Exception] | None:
    """What becomes of each; `None` where nothing does together that may yet do alone."""
    try:
        return execute(runs, interruption, layout)
    except GoneError as error:
        complain("ended", str(error))
        return None
    except Exception as error:
        unsettled = [
            run.folder for run in runs if not run.folder.is_finished and not run.folder.has_failed
        ]
        if len(unsettled) > 1 and not isinstance(error, UserError):
            sys.stderr.write(redacted("".join(traceback.format_exception(error))))
            return None
        for folder in unsettled:
            write_failure(folder, error)
        return [error]


def main() -> int:
    """One attempt in a process of its own: `python -m sae_lora.run.execute outputs/<sweep>/<run> …`."""
    parser = argparse.ArgumentParser(prog="python -m sae_lora.run.execute", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--nodes", type=int, default=1, help="of the SLURM job that this is in")
    parser.add_argument("--processes-per-node", type=int, default=1, help="that share the batches")
    given = parser.parse_args()
    folders = [RunFolder(path) for path in given.folders]
    code = attempt(folders, ProcessLayout(given.nodes, given.processes_per_node))
    if code == EXIT_INTERRUPTED:
        if all(folder.is_finished for folder in folders):
            return 0
        complain("stopped", "asked to; what is not finished goes on from its checkpoint")
    return code


if __name__ == "__main__":
    sys.exit(main())
