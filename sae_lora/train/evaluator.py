"""Evaluation on held-out tokens: the loss that SAEs add, and the part of it that training removes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_lora.common.console import Report, no_report
from sae_lora.models.language_model import LanguageModel
from sae_lora.records.schema import rounding_error
from sae_lora.splice.hooks import Coder, Reading, Splice
from sae_lora.splice.kl import Comparison, most_likely
from sae_lora.splice.student import Student, cuts
from sae_lora.splice.trunk import Splices, Trunk, prefixes
from sae_lora.train.distributed import ProcessGroup

EVALUATING = "evaluating"
"""The stage of an evaluation."""


class Evaluation(NamedTuple):
    """Results of one pass over the held-out tokens. Cross-entropies and KL in nats per token."""

    base_ce: float
    """Cross-entropy of the teacher: without SAE and adapters."""
    spliced_ce: float
    """Cross-entropy with the SAE, without adapters."""
    student_ce: float
    """Cross-entropy with the SAE and adapters."""
    kl: float
    """KL(teacher ‖ student)."""
    top1_agreement: float
    """Share of positions at which teacher and student have the same most likely token."""
    per_sae: dict[str, dict[str, float]]
    """By hookpoint: the `metrics` of `Reconstruction`, on the SAE's input in the student."""
    rounding: float
    """Difference between two of these cross-entropies that rounding explains."""


class Contribution(NamedTuple):
    """Effect of one SAE of a student that has several. Cross-entropies in nats per token."""

    alone_ce: float
    """Cross-entropy of the plain model with only this SAE."""
    alone_fvu: float
    """FVU of the SAE on the residuals of the plain model, which nothing else changes."""
    left_out_ce: float
    """Cross-entropy of the student without this SAE."""
    spliced_left_out_ce: float
    """Cross-entropy of the plain model with the other SAEs as they were before training."""


class Reconstruction:
    """Sums over tokens that give FVU, L0 and dead latents of one SAE, exactly for any batching.

    Special positions are not measured.

    Source: FVU = Σ‖x − x̂‖² / Σ‖x − x̄‖², with x̄ the mean over all measured tokens.
    """

    def __init__(self, sae: Coder, d_model: int, device: torch.device) -> None:
        with torch.no_grad():
            d_sae = sae.encode(torch.zeros(1, d_model, device=device)).shape[-1]
        self.sums = torch.zeros(3 + d_model, dtype=torch.float64, device=device)
        """Number of tokens, and the sums of ‖x − x̂‖², ‖x‖² and x, `[3 + d_model]`."""
        self.outliers = torch.zeros_like(self.sums)
        """The part of `sums` at outliers in the norm (`Reading.outlier`), `[3 + d_model]`."""
        self.active = torch.zeros(d_sae, dtype=torch.float64, device=device)
        """Number of tokens at which each latent was active, `[d_sae]`."""

    @property
    def totals(self) -> list[Tensor]:
        """All sums."""
        return [self.sums, self.outliers, self.active]

    def add(self, reading: Reading) -> None:
        """Add one batch of tokens."""
        resid, recon = reading.resid.double(), reading.recon.double()
        _add_to(self.sums, resid, recon)
        if reading.outlier.any():
            _add_to(self.outliers, resid[reading.outlier], recon[reading.outlier])
        self.active += (reading.latents != 0).sum(0)

    @property
    def metrics(self) -> dict[str, float]:
        """FVU with and without outliers, L0 and the share of dead latents, by name."""
        return {
            "fvu": self.fvu,
            "fvu_without_outliers": _fvu(self.sums - self.outliers),
            "l0": self.l0,
            "dead": self.dead,
        }

    @property
    def fvu(self) -> float:
        """Residual variance / total variance."""
        return _fvu(self.sums)

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return float(self.active.sum()) / float(self.sums[0])

    @property
    def dead(self) -> float:
        """Share of the latents that were never active."""
        return float((self.active == 0).double().mean())


def _add_to(sums: Tensor, resid: Tensor, recon: Tensor) -> None:
    """Add tokens `[token, d_model]` to the sums of a `Reconstruction`."""
    sums[0] += len(resid)
    sums[1] += (resid - recon).square().sum()
    sums[2] += resid.square().sum()
    sums[3:] += resid.sum(0)


def _fvu(sums: Tensor) -> float:
    """FVU from the sums of a `Reconstruction`; 0 for tokens without variance."""
    tokens, squared_error, squared_norm = sums[:3].tolist()
    variance = squared_norm - float(sums[3:].square().sum()) / tokens if tokens else 0.0
    return squared_error / variance if variance > 0 else 0.0


class Evaluator:
    """Evaluation of students of one model on fixed tokens. Each call is one pass for all students.

    Values that training cannot change are computed once: spliced CE, the reconstruction by SAEs before
    the first adapted block and, if they fit into `cache_bytes`, the hidden states that enter this block.

    Args:
        model: The plain language model.
        tokens: Held-out tokens `[sequence, pos]`.
        batch_size: Sequences per forward pass.
        comparison: Compares the logits of students with those of the model.
        cache_bytes: Memory for hidden states that are kept between evaluations.
        processes: The processes that share the batches.
        report: Called with the batches of an evaluation that are measured.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        batch_size: int,
        comparison: Comparison,
        cache_bytes: float = 0,
        processes: ProcessGroup | None = None,
        report: Report = no_report,
    ) -> None:
        self._model = model
        self.processes = processes or ProcessGroup()
        self.report = report
        batches = tokens.split(batch_size)
        self._batches = self.processes.shard(batches)
        fewer = len(self._batches) < -(-len(batches) // self.processes.size)
        self._uncounted = batches[:1] if model.shards and fewer else ()
        """Batches that are computed for nothing: if each process has a part of the model, all of them
        must run the same number of passes."""
        self._positions = tokens.numel()
        self._predictions = tokens.numel() - len(tokens)
        self._comparison = comparison
        self._cache_bytes = cache_bytes
        self._trunks: dict[int, Trunk] = {}
        """Hidden states by number of the batch, for the batches that fit into the cache."""
        self._spliced_ce: dict[Splices, float] = {}
        self._alone: dict[Splice, tuple[float, float]] = {}
        """CE and FVU of frozen SAEs alone in the plain model, which all students share."""
        self._frozen: dict[Splices, Reconstruction] = {}
        self._new_frozen: dict[Splices, Reconstruction] = {}
        """The frozen SAEs that the present evaluation measures for the first time."""

    def __call__(self, students: Sequence[Student]) -> list[Evaluation]:
        """Evaluate the students with their present weights. Training modes are restored afterwards."""
        total = len(self._batches)
        return self._measure(students, lambda batch: self.report(EVALUATING, batch, total))

    @torch.no_grad()
    def _measure(
        self, students: Sequence[Student], on_batch: Callable[[int], object]
    ) -> list[Evaluation]:
        """Evaluate the students; `on_batch` is called before each batch with its index."""
        needed = cuts(students)
        trunks: dict[int, Trunk] = {}
        base = _Sums(self._model)
        unknown = [student.before for student in students if student.before not in self._spliced_ce]
        spliced = {splices: _Sums(self._model) for splices in unknown}

        with ExitStack() as modes:
            for student in students:
                modes.enter_context(evaluating(student.model.model, *student.modules.values()))
            # In evaluation mode, because `Reconstruction` encodes zeros: in training mode this would
            # change the state of an SAE in training.
            sums = [_Sums(self._model, student.live) for student in students]
            self._new_frozen = {
                splices: _reconstruction(splices[-1], self._model)
                for student in students
                for splices in prefixes(student.frozen)
                if splices not in self._frozen
            }
            for number, batch in enumerate(self._batches):
                on_batch(number)
                trunk = self._trunks.get(number)
                if trunk is None or not trunk.cuts >= needed:
                    tokens = batch.to(self._model.device)
                    trunk = Trunk(self._model, tokens, needed, self._observe)
                read_by_head = [
                    student.hidden(trunk, of_student.observe)
                    for student, of_student in zip(students, sums, strict=True)
                ]
                read_by_head += [trunk.hidden(splices) for splices in spliced]
                self._compare(trunk, base, [*sums, *spliced.values()], read_by_head)
                trunk.forget_all_but((student.frozen, student.first) for student in students)
                if trunk.bytes_held * len(self._batches) <= self._cache_bytes:
                    trunks[number] = trunk
            for batch in self._uncounted:
                trunk = Trunk(self._model, batch.to(self._model.device), needed)
                for student in students:
                    student.hidden(trunk)
                for splices in (*spliced, ()):
                    trunk.hidden(splices)
        self._trunks = trunks
        summed = base, *spliced.values(), *sums, *self._new_frozen.values()
        self.processes.all_reduce([total for each in summed for total in each.totals])
        for splices, of_spliced in spliced.items():
            self._spliced_ce[splices] = float(of_spliced.ce) / self._predictions
        self._frozen |= self._new_frozen
        return [
            self._evaluation(student, of_student, float(base.ce) / self._predictions)
            for student, of_student in zip(students, sums, strict=True)
        ]

    def contributions(self, student: Student) -> dict[str, Contribution]:
        """The contribution of each SAE by hookpoint; empty for a student with a single SAE."""
        if len(student.splices) < 2:
            return {}
        contributions = {}
        total = len(student.splices) * len(self._batches)
        for number, splice in enumerate(student.splices):
            name, before = splice.hookpoint, number * len(self._batches)

            def on_batch(batch: int, before: int = before) -> None:
                self.report("evaluating each SAE", before + batch, total)

            students = [student.without(name)]
            if splice not in self._alone:
                students.append(student.alone(name, self._model))
            left_out, *measured = self._measure(students, on_batch)
            alone = self._alone.get(splice) or (measured[0].student_ce, measured[0].per_sae[name]["fvu"])
            if splice in student.before:  # it is frozen
                self._alone[splice] = alone
            contributions[name] = Contribution(*alone, left_out.student_ce, left_out.spliced_ce)
        return contributions

    def _compare(
        self, trunk: Trunk, base: "_Sums", sums: Sequence["_Sums"], read_by_head: Sequence[Tensor]
    ) -> None:
        """Add one batch to the sums of each model.

        Args:
            trunk: The batch.
            base: Sums of the teacher.
            sums: Sums of the other models.
            read_by_head: Their inputs to the head, `[batch, pos, d_model]`.
        """
        labels = next_tokens(trunk.tokens).flatten()
        unit = self._comparison.head.unit
        columns = [states.flatten(0, 1) for states in read_by_head]
        for rows in self._comparison.chunks(trunk.hidden().flatten(0, 1)):
            scores, log_sums = self._comparison.teacher
            top = most_likely(scores)
            base.ce += cross_entropies(scores, log_sums, labels[rows], unit).sum()
            for states, totals in zip(columns, sums, strict=True):
                for part in self._comparison.parts(states[rows]):
                    part_labels = labels[rows][part.rows]
                    totals.ce += cross_entropies(part.scores, part.log_sums, part_labels, unit).sum()
                    totals.kl += part.kl.sum()
                    totals.agreements += part.puts_first(top[part.rows]).sum()

    def _observe(self, splices: Splices, reading: Reading) -> None:
        """Add a batch to the sums of a frozen SAE that is measured for the first time."""
        if splices in self._new_frozen:
            self._new_frozen[splices].add(reading)

    def _evaluation(self, student: Student, sums: "_Sums", base_ce: float) -> Evaluation:
        saes = {
            splice.hookpoint: sums.live.get(splice.hookpoint) or self._frozen[splices]
            for splice, splices in zip(student.splices, prefixes(student.splices), strict=True)
        }
        return Evaluation(
            base_ce=base_ce,
            spliced_ce=self._spliced_ce[student.before],
            student_ce=float(sums.ce) / self._predictions,
            kl=float(sums.kl) / self._positions,
            top1_agreement=float(sums.agreements) / self._positions,
            per_sae={hookpoint: sae.metrics for hookpoint, sae in saes.items()},
            rounding=rounding_error(relative_rounding(self._model), self._positions),
        )


def _reconstruction(splice: Splice, model: LanguageModel) -> Reconstruction:
    return Reconstruction(splice.sae, model.config.hidden_size, model.device)


class _Sums:
    """Sums over tokens for one student. They stay on the device until the end: reading them waits."""

    def __init__(self, model: LanguageModel, live: Splices = ()) -> None:
        self.ce, self.kl, self.agreements = torch.zeros(3, dtype=torch.float64, device=model.device)
        self.live = {splice.hookpoint: _reconstruction(splice, model) for splice in live}
        """The SAEs that are trained or whose input training changes, by hookpoint."""

    @property
    def totals(self) -> list[Tensor]:
        """All sums."""
        saes = [total for sae in self.live.values() for total in sae.totals]
        return [self.ce, self.kl, self.agreements, *saes]

    def observe(self, reading: Reading) -> None:
        self.live[reading.hookpoint].add(reading)


NO_LABEL = -100
"""Label of a sequence's last position, whose next token is not known."""


def next_tokens(tokens: Tensor) -> Tensor:
    """The label of each position, `[batch, pos]`: the next token, `NO_LABEL` at the end."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], NO_LABEL)], dim=1)


def cross_entropies(scores: Tensor, log_sums: Tensor, labels: Tensor, unit: float) -> Tensor:
    """Next-token cross-entropy at each position, `[token, 1]` in float64, in nats; 0 without a label.

    Args:
        scores: Logits `[token, d_vocab]`, divided by `unit`.
        log_sums: ln Σ e^logit, `[token, 1]` in float64.
        labels: `[token]`, with `NO_LABEL` where the next token is not known.
        unit: `Head.unit`.
    """
    of_labels = scores.gather(-1, labels.clamp(min=0)[:, None]).double()
    return torch.where((labels != NO_LABEL)[:, None], log_sums - of_labels * unit, 0)


_SUM_ROUNDING = 2.0**-19
"""Relative error of a float32 sum of a thousand products, such as a logit: √1000 roundings of 2⁻²⁴."""
_TF32_ROUNDING = 2.0**-11


def relative_rounding(model: LanguageModel) -> float:
    """Relative error of the model's activations and logits from rounding, in the precision it has."""
    rounding = torch.finfo(model.model.dtype).eps / 2 + _SUM_ROUNDING
    is_tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return max(rounding, _TF32_ROUNDING) if is_tf32 else rounding


@contextmanager
def evaluating(*parts: nn.Module) -> Iterator[None]:
    """Put the parts in evaluation mode inside the block; then restore the mode of every module."""
    was_training = [module for part in parts for module in part.modules() if module.training]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
