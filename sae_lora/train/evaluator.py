"""Evaluation: what the SAE costs, what the adapters give back, on the held-out tokens."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.head import Comparison
from sae_lora.splice.hooks import Coder, Reading, Splice
from sae_lora.splice.student import Student, cuts
from sae_lora.splice.trunk import Splices, Trunk, prefixes
from sae_lora.train.distributed import ProcessGroup, SingleProcess


class Evaluation(NamedTuple):
    """What one pass over the held-out tokens found. Cross-entropies and KL in nats per token."""

    base_ce: float
    """Cross-entropy of the teacher: no SAE, adapters off."""
    spliced_ce: float
    """Cross-entropy with the SAE, adapters off."""
    student_ce: float
    """Cross-entropy with the SAE, adapters on."""
    kl: float
    """KL(teacher ‖ student)."""
    top1_agreement: float
    """Share of positions where teacher and student put the same token first."""
    fvu: dict[str, float]
    """Per hookpoint: residual variance / total variance, on what the student's SAE reads."""
    l0: dict[str, float]
    """Per hookpoint: mean number of active latents per token, likewise."""
    dead: dict[str, float]
    """Per hookpoint: share of the latents that no token made active, likewise."""


class Contribution(NamedTuple):
    """What one of several SAEs costs. Cross-entropies in nats per token."""

    alone_ce: float
    """Cross-entropy of the plain model with this SAE alone."""
    alone_fvu: float
    """Residual variance / total variance there: on residuals that nothing else has changed."""
    left_out_ce: float
    """Cross-entropy of the student, all else as it is, without this SAE."""


class Reconstruction:
    """Sums over tokens from which FVU, L0 and dead latents of one SAE follow, exact for any batching.

    Source: FVU = Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean over all tokens measured.

    Args:
        sae: The SAE.
        d_model: Width of what it reads.
        device: Where that is.
    """

    def __init__(self, sae: Coder, d_model: int, device: torch.device) -> None:
        with torch.no_grad():
            d_sae = sae.encode(torch.zeros(1, d_model, device=device)).shape[-1]
        self.sums = torch.zeros(3 + d_model, dtype=torch.float64, device=device)
        """Tokens, ‖x − x̂‖², ‖x‖² and x, each summed."""
        self.active = torch.zeros(d_sae, dtype=torch.float64, device=device)
        """Tokens that each latent was active on."""

    @property
    def totals(self) -> list[Tensor]:
        """All sums."""
        return [self.sums, self.active]

    def add(self, reading: Reading) -> None:
        """Takes in one batch of tokens."""
        resid, recon = reading.resid.double(), reading.recon.double()
        self.sums[0] += len(resid)
        self.sums[1] += (resid - recon).square().sum()
        self.sums[2] += resid.square().sum()
        self.sums[3:] += resid.sum(0)
        self.active += (reading.latents != 0).sum(0)

    @property
    def fvu(self) -> float:
        """Share of the variance that the reconstruction misses."""
        tokens, squared_error, squared_norm = self.sums[:3].tolist()
        variance = squared_norm - float(self.sums[3:].square().sum()) / tokens
        return squared_error / variance if variance > 0 else 0.0

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return float(self.active.sum()) / float(self.sums[0])

    @property
    def dead(self) -> float:
        """Share of the latents that were never active."""
        return float((self.active == 0).double().mean())


class Evaluator:
    """Evaluates students of one model on fixed tokens, as often as asked, in one pass for all.

    What does not change while adapters train is found once: spliced CE, the reconstruction of SAEs
    before the first adapted block and, where there is room, the hidden states that enter it.

    Args:
        model: The plain language model.
        tokens: Held-out tokens `[sequence, pos]`.
        special_ids: Ids `[n]` whose positions some SAEs leave as they are.
        batch_size: Sequences per forward pass.
        comparison: Sets students beside the model.
        cache_bytes: Room for hidden states that are kept from one evaluation to the next.
        processes: The processes that share the batches.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        special_ids: Tensor,
        batch_size: int,
        comparison: Comparison,
        cache_bytes: float = 0,
        processes: ProcessGroup | None = None,
    ) -> None:
        self._model = model
        self._processes = processes or SingleProcess()
        self._batches = self._processes.shard(tokens.split(batch_size))
        self._positions = tokens.numel()
        self._predictions = tokens.numel() - len(tokens)
        self._special_ids = special_ids
        self._comparison = comparison
        self._cache_bytes = cache_bytes
        self._trunks: dict[int, Trunk] = {}
        """By number of the batch, where there is room."""
        self._spliced_ce: dict[Splices, float] = {}
        self._frozen: dict[Splices, Reconstruction] = {}
        self._new_frozen: dict[Splices, Reconstruction] = {}
        """Those that the evaluation under way is the first to need."""

    @torch.no_grad()
    def __call__(self, students: Sequence[Student]) -> list[Evaluation]:
        """Evaluates the adapters as they are now. Leaves the models' modes as they were."""
        wanted = cuts(students)
        trunks: dict[int, Trunk] = {}
        base = self._nothing()
        spliced = {one.before: self._nothing() for one in students if one.before not in self._spliced_ce}

        with ExitStack() as modes:
            for student in students:
                modes.enter_context(evaluating(student.model.model, *student.modules.values()))
            # In these modes: an SAE in training learns from what it reads, were it zeros.
            sums = [self._nothing(one.live) for one in students]
            self._new_frozen = {
                row: _reconstruction(row[-1], self._model)
                for one in students
                for row in prefixes(one.frozen)
                if row not in self._frozen
            }
            for number, batch in enumerate(self._batches):
                trunk = self._trunks.get(number)
                if trunk is None or not trunk.cuts >= wanted:
                    tokens = batch.to(self._model.device)
                    trunk = Trunk(self._model, tokens, self._special_ids, wanted, self._observe)
                read_by_head = [
                    student.hidden(trunk, own.observe)
                    for student, own in zip(students, sums, strict=True)
                ]
                read_by_head += [trunk.hidden(splices) for splices in spliced]
                self._compare(trunk, base, [*sums, *spliced.values()], read_by_head)
                trunk.forget_all_but((one.frozen, one.first) for one in students)
                if trunk.bytes_held * len(self._batches) <= self._cache_bytes:
                    trunks[number] = trunk
        self._trunks = trunks
        self._processes.all_reduce(
            [
                *(total for own in (base, *spliced.values(), *sums) for total in own.totals),
                *(total for found in self._new_frozen.values() for total in found.totals),
            ]
        )
        self._spliced_ce |= {row: float(found.ce) / self._predictions for row, found in spliced.items()}
        self._frozen |= self._new_frozen
        return [
            self._evaluation(student, own, float(base.ce) / self._predictions)
            for student, own in zip(students, sums, strict=True)
        ]

    def contributions(self, student: Student) -> dict[str, Contribution]:
        """What each SAE of a student contributes, by hookpoint; of one that is all alone, nothing."""
        if len(student.splices) < 2:
            return {}
        found = {}
        for splice in student.splices:
            name = splice.hookpoint
            alone, left_out = self([student.alone(name, self._model), student.without(name)])
            found[name] = Contribution(alone.student_ce, alone.fvu[name], left_out.student_ce)
        return found

    def _nothing(self, live: Splices = ()) -> "_Sums":
        return _Sums(live, self._model)

    def _compare(
        self, trunk: Trunk, base: "_Sums", sums: Sequence["_Sums"], read_by_head: Sequence[Tensor]
    ) -> None:
        """Adds up what one batch says of those whose states `[batch, pos, d_model]` these are."""
        labels = next_tokens(trunk.tokens).flatten()
        columns = [states.flatten(0, 1) for states in read_by_head]
        for rows in self._comparison.chunks(trunk.hidden().flatten(0, 1)):
            scores, log_sums = self._comparison.teacher
            top = scores.argmax(-1)
            base.ce += self._cross_entropy(scores, log_sums, labels[rows])
            for states, own in zip(columns, sums, strict=True):
                for few in self._comparison.students(states[rows]):
                    of_these = labels[rows][few.rows]
                    own.ce += self._cross_entropy(few.scores, few.log_sums, of_these)
                    own.kl += few.kl.sum()
                    own.agreements += few.puts_first(top[few.rows]).sum()

    def _cross_entropy(self, scores: Tensor, log_sums: Tensor, labels: Tensor) -> Tensor:
        """Next-token cross-entropy in nats, summed over labelled tokens; of scores as `Few` has them."""
        labelled = labels != NO_LABEL
        of_labels = scores.gather(-1, labels.clamp(min=0)[:, None]).double()
        losses = log_sums - of_labels * self._comparison.head.unit
        return torch.where(labelled[:, None], losses, 0).sum()

    def _observe(self, splices: Splices, reading: Reading) -> None:
        """Takes in what an SAE has done whose work no adapter changes, the first time."""
        if splices in self._new_frozen:
            self._new_frozen[splices].add(reading)

    def _evaluation(self, student: Student, own: "_Sums", base_ce: float) -> Evaluation:
        saes = {
            splice.hookpoint: own.live.get(splice.hookpoint) or self._frozen[row]
            for splice, row in zip(student.splices, prefixes(student.splices), strict=True)
        }
        return Evaluation(
            base_ce=base_ce,
            spliced_ce=self._spliced_ce[student.before],
            student_ce=float(own.ce) / self._predictions,
            kl=float(own.kl) / self._positions,
            top1_agreement=float(own.agreements) / self._positions,
            fvu={hookpoint: one.fvu for hookpoint, one in saes.items()},
            l0={hookpoint: one.l0 for hookpoint, one in saes.items()},
            dead={hookpoint: one.dead for hookpoint, one in saes.items()},
        )


def _reconstruction(splice: Splice, model: LanguageModel) -> Reconstruction:
    return Reconstruction(splice.sae, model.config.hidden_size, model.device)


class _Sums:
    """What is summed up over tokens for one student. Read when all is done, a GPU is not waited for."""

    def __init__(self, live: Splices, model: LanguageModel) -> None:
        self.ce, self.kl, self.agreements = torch.zeros(3, dtype=torch.float64, device=model.device)
        self.live = {one.hookpoint: _reconstruction(one, model) for one in live}
        """Of the SAEs that read what its adapters have changed, by hookpoint."""

    @property
    def totals(self) -> list[Tensor]:
        """All of them."""
        saes = [total for one in self.live.values() for total in one.totals]
        return [self.ce, self.kl, self.agreements, *saes]

    def observe(self, reading: Reading) -> None:
        self.live[reading.hookpoint].add(reading)


NO_LABEL = -100
"""Label of a sequence's last position, whose next token is not known."""


def next_tokens(tokens: Tensor) -> Tensor:
    """The label of each position, `[batch, pos]`: the next token, `NO_LABEL` at the end."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], NO_LABEL)], dim=1)


@contextmanager
def evaluating(*parts: nn.Module) -> Iterator[None]:
    """The parts in evaluation mode; afterwards the mode of every module in them is what it was."""
    was_training = [module for part in parts for module in part.modules() if module.training]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
