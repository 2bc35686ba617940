"""Runs that train together, built and connected: the only module that knows all the others."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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
from sae_lora.common.locks import HeldError, LostError, held
from sae_lora.common.provenance import environment
from sae_lora.common.secrets import redacted
from sae_lora.common.signals import Interrupted, Interruption
from sae_lora.config.identity import pack_key, train_steps
from sae_lora.config.schema import Config
from sae_lora.data import corpus
from sae_lora.models import language_model, loading
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.loading import device_of, quieten
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import Progress, Summary
from sae_lora.run.active_run import Claim, Member, concerns_all, write_failure
from sae_lora.run.build import assemble
from sae_lora.run.progress import Reporter, say_point
from sae_lora.run.worker import Beginning
from sae_lora.saes.loading import SAEs
from sae_lora.train.distributed import ONE_PROCESS, Crew, GoneError, Workers, leading
from sae_lora.train.methods import Sample
from sae_lora.train.train_state import Training
from sae_lora.train.trainer import Loop


class NotTogetherError(Exception):
    """Runs that cannot train together; each can alone."""


def execute(
    claims: Sequence[Claim], interruption: Interruption | None = None, crew: Crew = ONE_PROCESS
) -> list[Summary | Exception]:
    """Trains and evaluates together what the folders' configs describe, and writes it into them.

    Each goes on from its newest checkpoint, where it has one. What goes wrong with one alone is
    written into its folder, and the others go on.

    Args:
        claims: The folders, of runs that may train together.
        interruption: What may ask the runs to stop; by default nothing does.
        crew: How many processes share the batches.

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
    members = [Member(claim) for claim in claims]
    with Display() as show:
        _Execution(members, interruption or Interruption(), show, crew).run()
    return [member.outcome for member in members if member.outcome is not None]


class _Execution:
    """Runs that train together, from their folders to their summaries."""

    def __init__(
        self, members: Sequence[Member], interruption: Interruption, show: Display, crew: Crew
    ) -> None:
        self._members = members
        self._crew = crew
        self._interruption = interruption
        self._show = show
        self._started = time.perf_counter()
        self._pack: Loop[Any] | None = None

    @property
    def _left(self) -> list[Member]:
        return [member for member in self._members if member.is_left]

    @contextmanager
    def _own(self, member: Member) -> Iterator[None]:
        """What goes wrong in the block is this run's alone; the others go on without it."""
        try:
            yield
        except Exception as error:
            if concerns_all(error) and len(self._left) > 1:
                raise
            if self._pack is not None and member.training in self._pack.left:
                self._pack.drop(member.training)
            member.fail(error)

    def _each(self, action: Callable[[Member], object]) -> None:
        """Does it for each that is left."""
        for member in self._left:
            with self._own(member):
                action(member)

    def run(self) -> None:
        """Builds them, trains them, and writes what they find."""
        quieten()
        self._each(Member.read)
        self._each(Member.make_way)
        if not self._left:
            return
        config = self._left[0].config  # for what they have in common
        if len({pack_key(member.config) for member in self._left}) > 1:
            raise NotTogetherError("model, data or batches of these runs differ")
        device = device_of(config)
        steps = train_steps(config)

        # Text and SAEs first: whatever is wrong with them is known before the model is loaded.
        families = ", ".join(sorted({member.config.sae.family.name for member in self._left}))
        self._stage(f"loading text ({config.data.source.name}) and SAE ({families})")
        text = corpus.load(
            config.data,
            loading.load_tokenizer(config.model),
            steps * config.train.batch_size,
            config.train.batch_size,
            self._show.counter("tokenising", "sequences"),
        )
        self._show.end()
        saes = SAEs(read_dimensions(config.model), device)
        self._each(lambda member: saes.of(member.config.sae))
        if not self._left:
            return

        there = self._left
        paths = [str(member.folder.path) for member in there]
        on_gpus = device.type == "cuda"
        with leading(self._crew, paths, on_gpus, lambda: self._interruption.asked) as workers:
            others = f" with {self._crew.size - 1} other processes" if self._crew.size > 1 else ""
            self._stage(f"loading model ({config.model.name}) on {device}{others}")
            model = loading.load_model(config.model, config.train.dtype, device)
            sample = Sample(
                next(text.batches(config.train.batch_size, config.data.seed)), text.special_ids
            )
            self._each(lambda member: member.build(model, saes.of(member.config.sae), steps, sample))
            if self._left:
                trainings = {there.index(member): member.training for member in self._left}
                workers.tell(Beginning.of(trainings, text.special_ids, text.validation_tokens))
                self._train(config, model, text, steps, workers)

    def _train(
        self,
        config: Config,
        model: language_model.LanguageModel,
        text: corpus.Corpus,
        steps: int,
        workers: Workers,
    ) -> None:
        """Trains all that are left to the end, and writes what they have found."""
        members = {member.training: member for member in self._left}
        pack = self._pack = assemble(
            config,
            model,
            members,
            text.special_ids.to(model.device),
            text.validation_tokens,
            workers,
            lambda training: self._own(members[training]),
        )
        report = Reporter(self._show, members, steps, self._own)

        def after_step(trained: Sequence[Training]) -> None:
            report.step(trained)
            for training in trained:
                with self._own(members[training]):
                    members[training].keep_if_due()
            self._save(
                pack,
                [
                    member
                    for training in trained
                    if (member := members[training]).is_left
                    and training.step % member.config.train.checkpoint_every_steps == 0
                ],
            )

        with ExitStack() as begun:
            begun.callback(_end, list(members.values()))
            made_with = environment(model.device)
            self._each(lambda member: member.begin(made_with))
            report.begin()
            batches = text.batches(config.train.batch_size, config.data.seed, pack.first_batch)
            found = {
                "validation_tokens": text.validation.size,
                "model": _describe_model(config, model),
                "environment": made_with,
                "trained_together": len(self._members),
            }

            def finish(member: Member) -> None:
                several = len(member.config.sae.used) > 1 and member.config.train.eval_each_sae
                contributions = pack.contributions(member.training) if several else {}
                member.finish(self._total_seconds(member), contributions, text.description, **found)

            try:
                for training, point in pack.points(batches, after_step, self._interruption.held):
                    with self._own(members[training]):
                        members[training].take(point)
                        say_point(point, members[training].name if len(members) > 1 else None)
                with self._interruption.held():
                    self._each(finish)
            except Interrupted:
                workers.let_go()
                self._save(pack, self._left)
                raise
            except Exception as error:
                if is_out_of_memory(error) or isinstance(error, GoneError):
                    workers.let_go()
                    traceback.clear_frames(error.__traceback__)  # what filled it
                    whole = [member for member in self._left if member.training.is_between_steps]
                    self._save(pack, whole)  # here a request to stop is heard that came before
                raise

    def _save(self, pack: Loop[Any], members: Sequence[Member]) -> None:
        if not members:
            return
        with pack.paused(), self._interruption.held():
            for member in members:
                with self._own(member):
                    member.save(self._total_seconds(member))

    def _total_seconds(self, member: Member) -> float:
        """What the run has taken: of this process, its share."""
        share = (time.perf_counter() - self._started) / len(self._members)
        return member.seconds_before + share

    def _stage(self, text: str) -> None:
        """Says what is done next, to who watches this process and in the folders to who does not."""
        self._show.stage(text)
        self._each(lambda member: member.folder.write_progress(Progress(text)))


def _end(members: Sequence[Member]) -> None:
    """Ends their W&B runs side by side: where the server is slow, all wait at the same time."""
    with ThreadPoolExecutor(len(members)) as threads:
        list(threads.map(Member.end, members))


def _describe_model(config: Config, model: language_model.LanguageModel) -> dict[str, Any]:
    return {
        "name": config.model.name,
        "revision": config.model.revision,
        "commit": config.model.commit or hub.cached_commit(config.model.name, config.model.revision),
        "class": type(model.model).__name__,
        "blocks": len(model.blocks),
        "loaded_as": config.model.dtype.name,
        "computed_in": config.train.dtype.name,
    }


def attempt(folders: Sequence[RunFolder], crew: Crew = ONE_PROCESS) -> int:
    """One attempt at runs that train together, but for those that are finished or held elsewhere.

    What goes wrong is written into the folders and said.

    Args:
        folders: The runs.
        crew: How many processes share the batches.

    Returns:
        The exit code: 0 where all are finished, or one of `sae_lora.common.errors`.
    """
    interruption = Interruption()
    held_elsewhere = False
    claims: list[Claim] = []
    try:
        with interruption.watching(), ExitStack() as leases:
            for folder in folders:
                own = leases.enter_context(ExitStack())
                try:
                    lease = own.enter_context(held(folder.path))
                except HeldError as error:
                    complain("left alone", str(error))
                    held_elsewhere = True
                else:
                    if not folder.is_finished:
                        claims.append(Claim(folder, lease.check, own.close))
            outcomes = _outcomes(claims, interruption, crew)
    except Interrupted:
        return EXIT_INTERRUPTED
    if outcomes is None:
        return EXIT_NOT_TOGETHER
    if held_elsewhere or any(isinstance(outcome, LostError) for outcome in outcomes):
        return EXIT_HELD
    return EXIT_FAILED if any(isinstance(outcome, Exception) for outcome in outcomes) else 0


def _outcomes(
    claims: Sequence[Claim], interruption: Interruption, crew: Crew
) -> list[Summary | Exception] | None:
    """What becomes of each; `None` where nothing does together that may yet do alone."""
    try:
        return execute(claims, interruption, crew)
    except GoneError as error:
        complain("ended", str(error))
        return None
    except Exception as error:
        unsettled = [
            claim.folder
            for claim in claims
            if not claim.folder.is_finished and not claim.folder.has_failed
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
    code = attempt(folders, Crew(given.nodes, given.processes_per_node))
    if code == EXIT_INTERRUPTED:
        if all(folder.is_finished for folder in folders):
            return 0
        complain("stopped", "asked to; what is not finished goes on from its checkpoint")
    return code


if __name__ == "__main__":
    sys.exit(main())
