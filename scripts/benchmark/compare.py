"""`sae-lora benchmark`: training and evaluation here against the published loop.

Both take turns in one process, a fresh one for each comparison, on the same model, SAEs and tokens,
dropout on. Ratios are of the paired times, per run and step. Beside them stands that both find the same.
"""

import ctypes
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sae_lora.common.console import progress_bar, say
from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, check_writable, write_atomically
from sae_lora.common.isolation import Isolation
from sae_lora.common.provenance import environment
from sae_lora.config.enums import Attention, Initialisation, KLComputation, Schedule
from sae_lora.config.schema import LoRAConfig, TrainConfig
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import choose_attention, silence_transformers
from sae_lora.models.lora import Dropout
from sae_lora.saes.sparse import multiplied
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Splice
from sae_lora.splice.kl import Comparison, fused_kl, kl_of, whole_kl
from sae_lora.splice.student import LoRAStudent
from sae_lora.train.distill import DistillTrainer
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.optim import GradientState
from scripts.benchmark.measure import Ratio, ratio, taking_turns
from scripts.benchmark.memory import PeakMemory
from scripts.benchmark.profile import Work, peak_flops_per_second, work_of
from scripts.benchmark.reference import Reference, evaluate
from scripts.benchmark.shapes import SMALL, Shape, Style, random_model, random_splice

RANKS = (1, 4, 16, 64, 256)
"""Ranks of a pack of five; a pack of 25 has each of them around five SAEs."""
SINGLE = 16
"""The rank of a run alone."""
SIZES = (1, 5, 25)
"""Sizes of packs."""
CONTEXTS = (256, 1024)
"""Tokens per sequence."""
TRAIN = TrainConfig(
    train_tokens=2**40, batch_size=1, lr=5e-5, schedule=Schedule.constant, warmup_share=0.0
)
WIDE = dataclasses.replace(SMALL, d_model=2304, d_sae=65_536)
"""Shape of the row about the SAE: the widths of Gemma-2-2B and of a Gemma Scope SAE."""
Result = TypeVar("Result")
_STEPS = 4
"""After which adapters are compared."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    style: str
    context: int
    """Tokens per sequence."""
    times: Ratio
    """Speedup per run."""
    seconds: float
    """Median seconds per run of this package."""
    work: Work
    """The work of this package."""


@dataclass(frozen=True)
class Equality:
    """Distance between the adapters of this package and those of the published loop."""

    what: str
    style: str
    error: float
    """Norm of the difference between adapters, over the norm of what training changed of the
    reference's. AdamW turns rounding into whole steps where a gradient is as good as zero."""


def adapters(rank: int) -> LoRAConfig:
    """The paper's, at a rank."""
    return LoRAConfig(
        rank=rank, alpha=32.0, dropout=0.1, rank_stabilised=False, init=Initialisation.kaiming
    )


def training(model: LanguageModel, splice: Splice, rank: int) -> GradientState:
    """One run, as a pack trains it."""
    torch.manual_seed(rank)
    student = LoRAStudent(model, (splice,), adapters(rank))
    return GradientState(student, TRAIN, 2**30)


def reference(
    model: LanguageModel, splice: Splice, rank: int, dropout: Callable[[float], nn.Module] = nn.Dropout
) -> Reference:
    """The same run, as it was published."""
    torch.manual_seed(rank)
    return Reference(model, (splice,), adapters(rank), TRAIN, dropout=dropout)


def pack(model: LanguageModel, trainings: Sequence[GradientState], how: KLComputation) -> DistillTrainer:
    """Trainings together."""
    no_ids = torch.empty(0, dtype=torch.long, device=model.device)
    beside = Comparison(Head.of(model))
    nothing = Evaluator(model, torch.empty(0, 1, dtype=torch.long), no_ids, 1, beside)
    return DistillTrainer(model, Isolation(trainings), nothing, no_ids, kl_of(beside, how))


def compare_steps(
    style: Style,
    shape: Shape,
    context: int,
    size: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Row:
    """Training steps of one run, of five ranks, or of these around five SAEs."""
    model = random_model(style, shape, device, dtype)
    ranks = [SINGLE] if size == 1 else RANKS
    splices = [random_splice(shape, seed, device, dtype) for seed in range(size // len(ranks))]
    references = {f"reference {rank}": reference(model, splices[0], rank) for rank in ranks}
    choose_attention(model.model, Attention.auto, device)
    trainings = [training(model, splice, rank) for splice in splices for rank in ranks]
    together = pack(model, trainings, KLComputation.fused)
    tokens = _Tokens(shape, context, device)
    calls: dict[str, Callable[[], object]] = {
        name: lambda one=one: one.step(tokens.next()) for name, one in references.items()
    }
    calls["here"] = lambda: together._take_step(together.active, tokens.next())
    found = taking_turns(calls, rounds, device)
    naive = [
        len(splices) * sum(times) for times in zip(*(found[name] for name in references), strict=True)
    ]
    what = "a run alone" if size == 1 else f"a pack of {size} runs"
    times = ratio(naive, found["here"])
    seconds = statistics.median(found["here"]) / size
    return Row(what, style.name, context, times, seconds, work_of(calls["here"], device))


def compare_evaluations(
    style: Style, shape: Shape, context: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> Row:
    """Base, spliced and four students, again: what is kept from the first evaluation is there."""
    model = random_model(style, shape, device, dtype)
    splice = random_splice(shape, 0, device, dtype)
    ranks = RANKS[:4]
    references = [reference(model, splice, rank) for rank in ranks]
    choose_attention(model.model, Attention.auto, device)
    students = [training(model, splice, rank).student for rank in ranks]
    held_out = _Tokens(shape, context, device).next(4)
    no_ids = torch.empty(0, dtype=torch.long, device=device)
    batch = max(1, TRAIN.eval_batch_tokens // context)
    cache = 1e9 * TRAIN.eval_cache_gb
    evaluator = Evaluator(model, held_out, no_ids, batch, Comparison(Head.of(model)), cache)
    calls = {"reference": lambda: evaluate(references, held_out), "here": lambda: evaluator(students)}
    for ours, theirs in zip(evaluator(students), evaluate(references, held_out), strict=True):
        for name, value in theirs._asdict().items():
            assert abs(getattr(ours, name) - value) < 1e-3, name
    found = taking_turns(calls, rounds, device)
    times = ratio(found["reference"], found["here"])
    what = "an evaluation of base, spliced and 4 students"
    seconds = statistics.median(found["here"])
    return Row(what, style.name, context, times, seconds, work_of(calls["here"], device))


def compare_saes(shape: Shape, rounds: int, device: torch.device, dtype: torch.dtype) -> Row:
    """A wide SAE with the gradient passing through it: active latents alone, against whole products."""
    tokens = 1024
    whole, sparse = (cast(nn.Module, random_splice(shape, 0, device, dtype).sae) for _ in range(2))
    saes: dict[str, Any] = {"whole": whole, "sparse": multiplied(sparse, True)}
    torch.manual_seed(0)
    resid, direction = torch.randn(2, tokens, shape.d_model, dtype=dtype, device=device)

    def gradient(sae: Any) -> Tensor:
        read = resid.clone().requires_grad_()
        sae.decode(sae.encode(read)).backward(direction)
        assert read.grad is not None
        return read.grad

    expected, sparsely = (gradient(sae).double() for sae in saes.values())
    assert float((sparsely - expected).norm() / expected.norm()) < (
        1e-5 if dtype is torch.float32 else 0.1
    )
    calls = {name: lambda sae=sae: gradient(sae) for name, sae in saes.items()}
    found = taking_turns(calls, rounds, device)
    times = ratio(found["whole"], found["sparse"])
    what = f"an SAE of {shape.d_sae:,} latents and its gradient"
    seconds = statistics.median(found["sparse"])
    return Row(what, f"top {shape.k}", tokens, times, seconds, work_of(calls["sparse"], device))


def compare_results(style: Style, shape: Shape, device: torch.device) -> list[Equality]:
    """Adapters after a few steps, from the same seeds: with the same attention and whole logits, and as
    training is by default.
    """
    ranks = (1, SINGLE, 256)
    rows = []
    for how, attention in ((KLComputation.full, Attention.eager), (KLComputation.fused, Attention.auto)):
        model = random_model(style, shape, device, torch.float32)
        splice = random_splice(shape, 0, device, torch.float32)
        choose_attention(model.model, attention, device)
        trainings = [training(model, splice, rank) for rank in ranks]
        together = pack(model, trainings, how)
        batches = _Tokens(shape, 256, device)
        steps = [batches.next() for _ in range(_STEPS)]
        for tokens in steps:
            together._take_step(trainings, tokens)
        apart = moved = 0.0
        for one, rank in zip(trainings, ranks, strict=True):
            kind = Dropout if device.type == "cpu" else nn.Dropout
            other = reference(model, splice, rank, kind)
            before = {name: weight.detach().clone() for name, weight in other.weights.items()}
            for tokens in steps:
                other.step(tokens)
            for name, weight in other.weights.items():
                theirs, ours = weight.detach(), one.student.weights[name].detach()
                apart += float((ours - theirs).double().square().sum())
                moved += float((theirs - before[name]).double().square().sum())
        error = (apart / moved) ** 0.5
        what = f"train.kl={how.name} model.attention={attention.name}"
        rows.append(Equality(what, style.name, error))
    return rows


def head_memory(tokens: int = 1024, d_vocab: int = 65_536, d_model: int = 512) -> tuple[float, float]:
    """Bytes that the KL needs at most beside its inputs: with whole logits, and fused."""
    torch.manual_seed(0)
    head = Head.linear(torch.randn(d_vocab, d_model) / d_model**0.5)
    teacher, student = torch.randn(2, tokens, d_model)
    comparison = Comparison(head)
    peaks = []
    for kl in (
        lambda: whole_kl(teacher, [student], [1.0], head.logits),
        lambda: fused_kl(teacher, [student], [1.0], comparison),
    ):
        with PeakMemory() as memory:
            kl()
        peaks.append(memory.peak)
    return peaks[0], peaks[1]


class _Tokens:
    """Random tokens, always the same ones."""

    def __init__(self, shape: Shape, context: int, device: torch.device) -> None:
        self._shape, self._context, self._device = shape, context, device
        self._generator = torch.Generator().manual_seed(1)

    def next(self, sequences: int = 1) -> Tensor:
        """The next `[sequence, pos]`."""
        size = sequences, self._context
        return torch.randint(0, self._shape.d_vocab, size, generator=self._generator).to(self._device)


def raise_allocator_thresholds() -> bool:
    """Lets glibc keep memory that is freed, up to what it allows; returns whether there is a glibc."""
    try:
        glibc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    return bool(glibc.mallopt(m_mmap_threshold, 2**30) and glibc.mallopt(m_trim_threshold, 2**31 - 1))


def run(
    styles: Sequence[str] | None = None,
    contexts: Sequence[int] | None = None,
    packs: Sequence[int] | None = None,
    rounds: int = 5,
    *,
    tuned: bool = False,
    to: Path | None = None,
) -> None:
    """Measures what is asked for, prints each row as soon as it is measured, and writes the record.

    Args:
        styles: Names of `Style`; `None` for all.
        contexts: Tokens per sequence; `None` for `CONTEXTS`.
        packs: Sizes of packs; `None` for `SIZES`, and for the rows that are about no pack: evaluations
            and, where nothing at all is asked for, the SAE and the memory of the KL.
        rounds: Pairs of times for each row.
        tuned: Whether the C allocator's thresholds are raised, for both sides.
        to: File for the record; it is written after each row.

    Raises:
        UserError: Where the record cannot be written, or a comparison is killed.
    """
    if to is not None:  # what cannot be written is better known before all the measuring
        if to.is_dir():
            raise UserError(f"--to: {to} is a folder, not a file")
        check_writable(to.parent, "--to")
    silence_transformers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(device),
        "allocator_thresholds_raised": tuned,
        "peak_flops_per_second": peak_flops_per_second(device, dtype),
        "shape": dataclasses.asdict(SMALL),
        "rounds": rounds,
        "rows": [],
        "equalities": [],
        "kl_bytes": None,
    }
    wanted = [Style[name] for name in styles] if styles else list(Style)
    rows: list[tuple[Any, ...]] = []
    for style in wanted:
        for context in contexts or CONTEXTS:
            rows += [(compare_steps, style, SMALL, context, size) for size in packs or SIZES]
            if not packs:
                rows.append((compare_evaluations, style, SMALL, context))
    if not (styles or contexts or packs):
        rows.insert(0, (compare_saes, WIDE))
    whole = len(rows) + len(wanted) + (not packs)
    table = _Table(record["peak_flops_per_second"])
    with progress_bar("comparing", "rows") as count:

        def keep(lines: Sequence[Sequence[str]]) -> None:
            for line in lines:
                table.add(line)
            if to is not None:  # after each: the next may be too large for the machine
                write_atomically(to, as_json(record))
            count(count_done(record), whole)

        count(0, whole)
        for compare, *of in rows:
            row = _alone(tuned, compare, *of, rounds, device, dtype)
            record["rows"].append(dataclasses.asdict(row))
            keep([table.row(row)])
        for style in wanted:
            equalities = _alone(tuned, compare_results, style, SMALL, device)
            record["equalities"] += [dataclasses.asdict(one) for one in equalities]
            keep([table.equality(one) for one in equalities])
        if not packs:
            whole_bytes, fused_bytes = head_memory()
            record["kl_bytes"] = {"whole": whole_bytes, "fused": fused_bytes}
            keep([table.memory(whole_bytes, fused_bytes)])


def count_done(record: dict[str, Any]) -> int:
    """Number of parts that a record has so far; the equalities of a style are one part."""
    styles = {one["style"] for one in record["equalities"]}
    return len(record["rows"]) + len(styles) + (record["kl_bytes"] is not None)


def _alone(tuned: bool, compare: Callable[..., Result], *arguments: object) -> Result:
    """Compares in a process of its own: memory that another comparison has freed is memory that a
    naive loop need not ask the system for.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=silence_transformers) as process:
        if tuned and not process.submit(raise_allocator_thresholds).result():
            raise UserError("--tuned raises thresholds of glibc's allocator, and there is no glibc here")
        try:
            return process.submit(compare, *arguments).result()
        except BrokenProcessPool as error:
            what = f"{compare.__name__} of {', '.join(str(one) for one in arguments)}"
            raise UserError(f"killed, perhaps for want of memory: {what}") from error


class _Table:
    """Rows that are printed one by one, in columns of fixed width.

    Args:
        peak: Floating-point operations per second that products reach on this device.
    """

    COLUMNS = (
        *(("what", -46), ("style", -8), ("tokens", 6), ("times quicker per run", 22)),
        *(("least–most", 11), ("seconds here", 12), ("in products", 11), ("at", 11), ("memory", 8)),
    )
    """Headings and widths; a negative one stands for a column that is set to the left."""

    def __init__(self, peak: float) -> None:
        self._peak = peak
        self.add([name for name, _ in self.COLUMNS])

    def add(self, cells: Sequence[str]) -> None:
        """Prints a row."""
        padded = zip(cells, self.COLUMNS, strict=False)
        say(
            "  ".join(
                f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}" for cell, (_, width) in padded
            )
        )

    def row(self, row: Row) -> list[str]:
        """The cells of a comparison."""
        times, work = row.times, row.work
        return [
            *(row.what, row.style, f"{row.context:,}", f"{times.median:.2f}"),
            *(f"{times.least:.2f}–{times.most:.2f}", f"{row.seconds:.2f}", f"{work.in_products:.0%}"),
            *(f"{work.flops_per_second / self._peak:.0%} of peak", f"{work.peak_bytes / 1e9:.1f} GB"),
        ]

    def equality(self, one: Equality) -> list[str]:
        """The cells of what proves that both find the same."""
        return [f"adapters apart by {one.error:.1e} with {one.what}", one.style, "256"]

    def memory(self, whole: float, fused: float) -> list[str]:
        """The cells of what the KL needs."""
        what = f"memory of the KL, 65,536 words: {fused / 1e6:.0f} MB"
        return [what, "", "1,024", f"{whole / fused:.1f} times less"]
