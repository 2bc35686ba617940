"""Training of a pack, from run folders to summaries: the module that connects all others."""

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

from torch import Tensor

from sae_lora.common import hub
from sae_lora.common.console import complain, say, stage_display
from sae_lora.common.errors import (
    EXIT_FAILED,
    EXIT_HELD,
    EXIT_INTERRUPTED,
    EXIT_NOT_TOGETHER,
    GoneError,
    UserError,
    is_gone,
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
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import load_tokenizer, silence_transformers
from sae_lora.records import halving
from sae_lora.records.folder import RunFolder
from sae_lora.records.status import what_is_saved
from sae_lora.run.active_run import ActiveRun, write_failure
from sae_lora.run.build import Builder
from sae_lora.run.progress import Reporter
from sae_lora.run.sinks import dominant_positions
from sae_lora.run.worker import follow
from sae_lora.saes.loading import LOADING
from sae_lora.train import checkpoint
from sae_lora.train.cost import speed
from sae_lora.train.cost.runs import notes
from sae_lora.train.distributed import Member, ProcessGroup, ProcessLayout, member
from sae_lora.train.evaluator import Contribution
from sae_lora.train.train_state import TrainState
from sae_lora.train.trainer import TRAINING

_BUILDING = "building runs"


class _Execution:
    """A pack of runs, in the process that writes their folders.

    Each run resumes from its newest checkpoint. An error that concerns only one run is written into its
    folder, and the other runs continue.
    """

    def __init__(
        self, runs: Sequence[ActiveRun], interruption: Interruption, leader: Member | None
    ) -> None:
        self._runs = Isolation(runs, self._fail)
        self._leader = leader
        self._interruption = interruption
        self._working = list(runs)
        """The runs among which the time of this process is divided now."""
        self._seconds = dict.fromkeys(runs, 0.0)
        self._divided_at = time.perf_counter()

    def run(self) -> None:
        """Build the runs, train them, and write their results; show each stage.

        Errors are those of `_run`.
        """
        with stage_display(announced=[LOADING, _BUILDING, TRAINING]) as show:
            self._run(Reporter(self._runs, show))

    def _run(self, report: Reporter) -> None:
        """Build the runs, train them, and write their results.

        Raises:
            UserError: If an error concerns all runs, such as files that cannot be fetched, or a text
                that is too short.
            RuntimeError: If model, data or batches of the runs differ.
            MemoryError: If the runs together need too much memory; torch raises its own error for this.
                Each run can resume from its checkpoint.
            Interrupted: After a request to stop, when checkpoints are saved.
        """
        silence_transformers()
        runs = self._runs
        runs.each(ActiveRun.read)
        runs.each(ActiveRun.move_aside)
        if not runs.active:
            return
        config = runs.active[0].config  # model, data and batches are the same for all
        if len({pack_key(run.config) for run in runs.active}) > 1:
            raise RuntimeError("model, data or batches of these runs differ")
        builder = Builder(config, self._leader)

        # Text and SAEs come first, so that their errors show before the model is loaded.
        families = ", ".join(sorted({run.config.sae.family.name for run in runs.active}))
        report.announce(f"loading text ({config.data.source.name}) and SAE ({families})")
        batch_size = config.train.batch_size
        sequences = train_steps(config) * batch_size
        text = corpus.load(
            config.data,
            load_tokenizer(config.model),
            sequences,
            batch_size,
            partial(report.stage, "tokenising"),
            vocabulary=read_dimensions(config.model).d_vocab,
        )
        runs.each(lambda run: builder.saes.of(run.config.sae, report.stage))
        if not runs.active:
            return

        leader = self._leader
        on_gpus = builder.device.type == "cuda"
        with nullcontext(ProcessGroup()) if leader is None else leader.leading(on_gpus) as processes:
            processes_note = "" if leader is None else f" in {leader.size} processes"
            paths = [str(run.folder.path) for run in runs.active]
            processes.broadcast((paths, text.special_ids, text.validation_tokens))
            report.announce(f"loading model ({config.model.name}) on {builder.device}{processes_note}")
            first = next(text.batches(batch_size, config.data.seed))
            _ = builder.model  # loaded here, because an error of loading concerns all runs
            building = runs.active.copy()
            for number, run in enumerate(building):
                report.stage(_BUILDING, number, len(building))
                with runs.only(run):
                    saes = builder.saes.of(run.config.sae)
                    run.build(builder.model, saes, text.special_ids, first)
            for note in dict.fromkeys(note for run in runs.active for note in notes(run.config)):
                say(note)
            if runs.active:
                states = {str(run.folder.path): _state(run.training) for run in runs.active}
                processes.broadcast(states)
                self._note(builder.model, first, text.notes)
                self._train(builder, config, text, processes, report)

    def _note(self, model: LanguageModel, tokens: Tensor, of_text: Sequence[str]) -> None:
        """Note what loading noticed, and positions that hold most of the variance of SAEs' input."""
        by_run = {run: run.training.student.splices for run in self._runs.active}
        notes = dominant_positions(model, itertools.chain(*by_run.values()), tokens)
        of_all = [*of_text, *model.notes]
        for note in [*of_all, *sorted(set(notes.values()))]:
            complain("note", note)
        for run, splices in by_run.items():
            run.noticed += of_all
            run.noticed += sorted({notes[splice] for splice in splices if splice in notes})

    def _train(
        self,
        builder: Builder,
        config: Config,
        text: corpus.Corpus,
        processes: ProcessGroup,
        report: Reporter,
    ) -> None:
        """Train all active runs to their last step, and write their results."""
        model = builder.model
        runs = {run.training: run for run in self._runs.active}

        def fail(training: TrainState, error: Exception) -> None:
            training.reset()
            self._fail(runs[training], error)

        trainings = Isolation(runs, fail)
        trainer = builder.trainer(trainings, text.validation_tokens, processes, report.stage)
        timer = checkpoint.Timer()

        def save(due: Sequence[TrainState]) -> None:
            """Write checkpoints while training is paused and cannot be interrupted."""
            if due:
                with trainer.paused(), self._interruption.held(), timer.saving():
                    for training in due:
                        with trainings.only(training):
                            runs[training].save(self._total_seconds(runs[training]))

        def after_step(trained: Sequence[TrainState]) -> None:
            report.step(trained)
            for training in trained:
                with trainings.only(training):
                    runs[training].keep_if_due()
            save(
                [
                    training
                    for training in trained
                    if training in trainings.active
                    and timer.is_due(training.step, runs[training].config.train)
                ]
            )

        def stop_outranked(evaluated: Sequence[TrainState]) -> None:
            """Save and end the runs that `launcher.halving` stops at a rung."""
            competing = {
                runs[training].folder: training
                for training in evaluated
                if runs[training].config.launcher.halving is not None and not training.has_ended
            }
            try:
                places = halving.outranked(list(competing))
            except UserError as error:  # the folder of the sweep cannot be read now
                complain("note", f"halving: {error}; no run is compared")
                return
            behind = {competing[folder]: standing for folder, standing in places.items()}
            with self._interruption.held():
                save(list(behind))
                for training, standing in behind.items():
                    if training in trainings.active:
                        with trainings.only(training):
                            self._end_work(runs[training])
                            runs[training].leave(standing)
                            trainings.leave(training)

        with ExitStack() as stack:
            stack.callback(_end, list(runs.values()))
            provenance = environment(model.device)
            trainings.each(lambda training: runs[training].begin(provenance))
            report.begin(runs, trainings, trainer.pace)
            batches = text.batches(config.train.batch_size, config.data.seed, trainer.first_batch)
            common = {
                "validation_tokens": text.validation.size,
                "model": {
                    "name": config.model.name,
                    "revision": config.model.revision,
                    "commit": hub.cached_commit(config.model.name, config.model.pinned_revision),
                    "class": type(model.model).__name__,
                    "blocks": len(model.blocks),
                    "loaded_as": config.model.dtype.name,
                    "computed_in": config.train.dtype.name,
                },
                "environment": provenance,
                "trained_together": len(self._runs.runs),
            }

            contributions: dict[TrainState, dict[str, Contribution]] = {}

            def evaluate_each_sae(training: TrainState) -> None:
                config = runs[training].config
                if len(config.sae.used) > 1 and config.train.eval_each_sae:
                    contributions[training] = trainer.contributions(training)

            def finish(training: TrainState) -> None:
                run = runs[training]
                run.finish(
                    self._total_seconds(run),
                    contributions.get(training, {}),
                    text.description,
                    **common,
                )

            is_whole = trainer.first_batch == 0
            began = time.perf_counter()
            try:
                points = trainer.points(batches, after_step, self._interruption.held, stop_outranked)
                for training, point in points:
                    with trainings.only(training):
                        runs[training].take(point)
                        report.point(training, point)
                if is_whole and all(training.has_ended for training in runs):
                    _record_speed([run.config for run in runs.values()], time.perf_counter() - began)
                trainings.each(evaluate_each_sae)
                with self._interruption.held():
                    trainings.each(finish)
            except Interrupted:
                save([training for training in trainings.active if training.step > 0])
                raise
            except Exception as error:
                if is_out_of_memory(error) or is_gone(error):
                    traceback.clear_frames(error.__traceback__)  # otherwise they keep tensors in memory
                    # If a stop was requested meanwhile, this raises `Interrupted` in place of the error.
                    save([training for training in trainings.active if training.is_between_steps])
                raise

    def _total_seconds(self, run: ActiveRun) -> float:
        """Seconds of all attempts at a run; runs at work share the seconds of this process equally."""
        self._divide_seconds()
        return run.seconds_before + self._seconds[run]

    def _divide_seconds(self) -> None:
        """Divide the seconds since the last call among the runs at work."""
        began, self._divided_at = self._divided_at, time.perf_counter()
        for run in self._working:
            self._seconds[run] += (self._divided_at - began) / len(self._working)

    def _end_work(self, run: ActiveRun) -> None:
        """Leave a run out of the time of this process from now on."""
        self._divide_seconds()
        if run in self._working:
            self._working.remove(run)

    def _fail(self, run: ActiveRun, error: Exception) -> None:
        self._end_work(run)
        run.fail(error)


def _state(training: TrainState) -> tuple[int, dict[str, Tensor]]:
    """Step and trained weights, for workers: initial weights from a seed may differ in the last bits."""
    weights = training.student.weights
    return training.step, {name: weight.detach().cpu() for name, weight in weights.items()}


def _record_speed(configs: Sequence[Config], seconds: float) -> None:
    """Record the speed of a whole training, for later plans."""
    try:
        speed.record(configs, seconds)
    except OSError as error:  # a full or read-only disk; the training does not depend on it
        complain("note", f"the speed of this training was not recorded: {error.strerror}")


def _end(runs: Sequence[ActiveRun]) -> None:
    """End all W&B runs at the same time, so that their waits for a slow server overlap."""
    with ThreadPoolExecutor(len(runs)) as threads:
        list(threads.map(ActiveRun.end, runs))


def attempt(folders: Sequence[RunFolder], leader: Member | None = None) -> int:
    """Train the runs together.

    Finished and outranked runs, and runs that another process holds, are left out.

    Errors are printed and written into the folders.

    Args:
        folders: The run folders.
        leader: This process, if it leads others that share the batches.

    Returns:
        The exit code: 0 if all runs are finished or outranked, otherwise a code of
        `sae_lora.common.errors`.
    """
    interruption = Interruption()
    held_elsewhere = False
    runs: list[ActiveRun] = []
    try:
        with interruption.watching(), ExitStack() as leases:
            if leader is not None and not leader.register():
                return EXIT_INTERRUPTED
            for folder in folders:
                # One stack per run: a finished run gives up its lease at once, the others at the end.
                lock = leases.enter_context(ExitStack())
                try:
                    lease = lock.enter_context(held(folder.path))
                except HeldError as error:
                    complain("skipped", str(error))
                    held_elsewhere = True
                else:
                    if not (folder.is_finished or folder.is_outranked):
                        runs.append(ActiveRun(folder, lease.check, lock.close))
            code = _execute(runs, interruption, leader)
    except Interrupted:
        if leader is not None and not leader.is_asked_to_stop():
            complain("ended", "another process that shares the batches has ended")
            return EXIT_NOT_TOGETHER
        unfinished = [run.folder for run in runs if run.outcome is None]
        if stopped := [folder for folder in unfinished if folder.is_unsettled]:
            complain("stopped on request", what_is_saved(stopped))
            for folder in stopped:
                folder.write_stop(f"on request, {what_is_saved([folder])}")
        return EXIT_INTERRUPTED
    return EXIT_HELD if held_elsewhere and code != EXIT_NOT_TOGETHER else code


def _execute(runs: Sequence[ActiveRun], interruption: Interruption, leader: Member | None) -> int:
    """Train the runs together and return the exit code."""
    try:
        _Execution(runs, interruption, leader).run()
        outcomes = [run.outcome for run in runs]
    except Exception as error:
        if is_gone(error):
            complain("ended", "another process that shares the batches has ended")
            return EXIT_NOT_TOGETHER
        unsettled = [run.folder for run in runs if run.outcome is None and run.folder.is_unsettled]
        if len(unsettled) > 1 and not isinstance(error, UserError):
            # Training together may be the cause (memory, for example), so no run is marked as failed:
            # the launcher tries smaller packs.
            sys.stderr.write(redacted("".join(traceback.format_exception(error))))
            return EXIT_NOT_TOGETHER
        for folder in unsettled:
            write_failure(folder, error)
        outcomes = [error]
    if any(isinstance(outcome, LostError) for outcome in outcomes):
        return EXIT_HELD
    return EXIT_FAILED if any(isinstance(outcome, Exception) for outcome in outcomes) else 0


def main() -> int:
    """Train runs together: `python -m sae_lora.run.execute outputs/<sweep>/<run> …`.

    With several processes, this one starts them and waits; each of them then calls this function again.
    """
    parser = argparse.ArgumentParser(prog="python -m sae_lora.run.execute", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--nodes", type=int, default=1, help="nodes of this SLURM job")
    parser.add_argument(
        "--processes-per-node",
        type=int,
        default=1,
        help="processes on each node, which share the batches",
    )
    parser.add_argument("--shard", action="store_true", help="these divide the model's weights")
    arguments = parser.parse_args()
    folders = [RunFolder(path) for path in arguments.folders]
    layout = ProcessLayout(arguments.nodes, arguments.processes_per_node, arguments.shard)
    try:
        this = member()
        if layout.size > 1:
            from sae_lora.run import together  # torch's elastic agent takes a while to import

            code = together.start(layout, [str(path) for path in arguments.folders])
        elif this is not None and not this.leads:
            return follow(this, folders)
        else:
            code = attempt(folders, this)
        ended = [folder.is_finished or folder.is_outranked for folder in folders]
        if code == EXIT_INTERRUPTED and all(ended):
            code = 0
        if this is not None:
            this.report(code)
    except GoneError as error:
        complain("ended", str(error))
        return EXIT_NOT_TOGETHER
    return code


if __name__ == "__main__":
    sys.exit(main())
