"""`sae-lora benchmark`: speed of training and evaluation, compared to the published loop.

Each comparison has a new process, in which both take turns on the same model, SAEs and tokens, with
dropout. Ratios are of paired times, per run and step. The benchmark also checks that results are equal.
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
from sae_lora.config.enums import Attention, DType, Initialisation, KLComputation, Schedule
from sae_lora.config.schema import LoRAConfig, TrainConfig
from sae_lora.models.attention.choice import choose_attention
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import silence_transformers
from sae_lora.models.lora import Dropout
from sae_lora.saes.sparse import multiplied
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Splice
from sae_lora.splice.kl import Comparison, fused_kl, kl_of, whole_kl
from sae_lora.splice.student import LoRAStudent
from sae_lora.train.cost.memory import PeakMemory
from sae_lora.train.distill import DistillTrainer
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.optim import GradientState
from sae_lora.train.passes import Passing
from scripts.benchmark.measure import Ratio, ratio, taking_turns
from scripts.benchmark.profile import Work, peak_flops_per_second, work_of
from scripts.benchmark.reference import Reference, evaluate
from scripts.benchmark.shapes import SMALL, Shape, Style, random_model, random_splice

RANKS = (1, 4, 16, 64, 256)
"""Ranks of a pack of five; a pack of 25 has these ranks around each of five SAEs."""
SINGLE = 16
"""Rank of a run that is trained alone."""
SIZES = (1, 5, 25)
"""Sizes of packs."""
CONTEXTS = (256, 1024)
"""Tokens per sequence."""
TRAIN = TrainConfig(
    train_tokens=2**40, batch_size=1, lr=5e-5, schedule=Schedule.constant, warmup_share=0.0
)
WIDE = dataclasses.replace(SMALL, d_model=2304, d_sae=65_536)
"""Shape of the comparison of SAEs: the widths of Gemma-2-2B and of a Gemma Scope SAE."""
Result = TypeVar("Result")
_STEPS = 4
"""Number of steps after which adapters are compared."""


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
    """Distance between the trained adapters of this package and of the published loop."""

    what: str
    style: str
    error: float
    """Norm of the difference between both adapters, divided by the norm of the change of the published
    loop's adapters by training. If a gradient is nearly zero, AdamW turns rounding into full steps."""


def adapters(rank: int) -> LoRAConfig:
    """The paper's config of adapters, with a rank."""
    return LoRAConfig(
        rank=rank, alpha=32.0, dropout=0.1, rank_stabilised=False, init=Initialisation.kaiming
    )


def training(model: LanguageModel, splice: Splice, rank: int) -> GradientState:
    """A run of this package, for a pack."""
    torch.manual_seed(rank)
    student = LoRAStudent(model, (splice,), adapters(rank))
    return GradientState(student, TRAIN, 2**30)


def reference(
    model: LanguageModel, splice: Splice, rank: int, dropout: Callable[[float], nn.Module] = nn.Dropout
) -> Reference:
    """The same run, trained by the published loop."""
    torch.manual_seed(rank)
    return Reference(model, (splice,), adapters(rank), TRAIN, dropout=dropout)


def usual_way(model: LanguageModel) -> Passing:
    """The way of a pack through this model if the config says nothing of it."""
    dtype = DType[str(model.model.dtype).removeprefix("torch.")]
    return Passing.of(dataclasses.replace(TRAIN, dtype=dtype), model.device)


def pack(
    model: LanguageModel,
    trainings: Sequence[GradientState],
    how: KLComputation,
    *,
    passing: Passing | None = None,
) -> DistillTrainer:
    """A pack of runs, without evaluations; `None` for the way of the default on this device."""
    comparison = Comparison(Head.of(model))
    evaluator = Evaluator(model, torch.empty(0, 1, dtype=torch.long), 1, comparison)
    kl = kl_of(comparison, how)
    way = usual_way(model) if passing is None else passing
    return DistillTrainer(model, Isolation(trainings), evaluator, kl, passing=way)


def compare_steps(
    style: Style,
    shape: Shape,
    context: int,
    size: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Row:
    """Compare training steps of one run, of five ranks, or of five ranks around each of five SAEs."""
    model = random_model(style, shape, device, dtype)
    ranks = [SINGLE] if size == 1 else RANKS
    splices = [random_splice(shape, seed, device, dtype) for seed in range(size // len(ranks))]
    references = {f"reference {rank}": reference(model, splices[0], rank) for rank in ranks}
    choose_attention(model.model, Attention.auto, device)
    trainings = [training(model, splice, rank) for splice in splices for rank in ranks]
    together = pack(model, trainings, KLComputation.fused)
    tokens = Tokens(shape, context, device)
    calls: dict[str, Callable[[], object]] = {
        name: lambda run=run: run.step(tokens.next()) for name, run in references.items()
    }
    calls["here"] = lambda: together._take_step(together.active, tokens.next())
    measured = taking_turns(calls, rounds, device)
    of_ranks = (measured[name] for name in references)
    naive = [len(splices) * sum(times) for times in zip(*of_ranks, strict=True)]
    what = "a run alone" if size == 1 else f"a pack of {size} runs"
    times = ratio(naive, measured["here"])
    seconds = statistics.median(measured["here"]) / size
    return Row(what, style.name, context, times, seconds, work_of(calls["here"], device))


def compare_evaluations(
    style: Style, shape: Shape, context: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> Row:
    """Compare evaluations of base, spliced and four students, with a filled cache."""
    model = random_model(style, shape, device, dtype)
    splice = random_splice(shape, 0, device, dtype)
    ranks = RANKS[:4]
    references = [reference(model, splice, rank) for rank in ranks]
    choose_attention(model.model, Attention.auto, device)
    students = [training(model, splice, rank).student for rank in ranks]
    held_out = Tokens(shape, context, device).next(4)
    batch = max(1, TRAIN.eval_batch_tokens // context)
    cache = 1e9 * TRAIN.eval_cache_gb
    evaluator = Evaluator(model, held_out, batch, Comparison(Head.of(model)), cache)
    calls = {"reference": lambda: evaluate(references, held_out), "here": lambda: evaluator(students)}
    for ours, theirs in zip(evaluator(students), evaluate(references, held_out), strict=True):
        for name, value in theirs._asdict().items():
            assert abs(getattr(ours, name) - value) < 1e-3, name
    measured = taking_turns(calls, rounds, device)
    times = ratio(measured["reference"], measured["here"])
    what = "an evaluation of base, spliced and 4 students"
    seconds = statistics.median(measured["here"])
    return Row(what, style.name, context, times, seconds, work_of(calls["here"], device))


def compare_saes(shape: Shape, rounds: int, device: torch.device, dtype: torch.dtype) -> Row:
    """Compare a wide SAE and its gradient, computed from active latents only and from all latents."""
    tokens = 1024
    whole, sparse = (cast(nn.Module, random_splice(shape, 0, device, dtype).sae) for _ in range(2))
    saes: dict[str, Any] = {"whole": whole, "sparse": multiplied(sparse, True)}
    torch.manual_seed(0)
    resid, direction = torch.randn(2, tokens, shape.d_model, dtype=dtype, device=device)

    def gradient(sae: Any) -> Tensor:
        leaf = resid.clone().requires_grad_()
        sae.decode(sae.encode(leaf)).backward(direction)
        assert leaf.grad is not None
        return leaf.grad

    expected, result = (gradient(sae).double() for sae in saes.values())
    assert float((result - expected).norm() / expected.norm()) < (
        1e-5 if dtype is torch.float32 else 0.1
    )
    calls = {name: lambda sae=sae: gradient(sae) for name, sae in saes.items()}
    measured = taking_turns(calls, rounds, device)
    times = ratio(measured["whole"], measured["sparse"])
    what = f"an SAE of {shape.d_sae:,} latents and its gradient"
    seconds = statistics.median(measured["sparse"])
    return Row(what, f"top {shape.k}", tokens, times, seconds, work_of(calls["sparse"], device))


def compare_results(style: Style, shape: Shape, device: torch.device) -> list[Equality]:
    """Compare adapters after a few steps from the same seeds.

    The first comparison has the published loop's attention and full logits, the second the defaults.
    """
    ranks = (1, SINGLE, 256)
    rows = []
    for how, attention in ((KLComputation.full, Attention.eager), (KLComputation.fused, Attention.auto)):
        model = random_model(style, shape, device, torch.float32)
        splice = random_splice(shape, 0, device, torch.float32)
        choose_attention(model.model, attention, device)
        trainings = [training(model, splice, rank) for rank in ranks]
        together = pack(model, trainings, how)
        batches = Tokens(shape, 256, device)
        steps = [batches.next() for _ in range(_STEPS)]
        for tokens in steps:
            together._take_step(trainings, tokens)
        difference = change = 0.0  # sums of squares
        for state, rank in zip(trainings, ranks, strict=True):
            kind = Dropout if device.type == "cpu" else nn.Dropout
            published = reference(model, splice, rank, kind)
            initial = {name: weight.detach().clone() for name, weight in published.weights.items()}
            for tokens in steps:
                published.step(tokens)
            for name, weight in published.weights.items():
                theirs, ours = weight.detach(), state.student.weights[name].detach()
                difference += float((ours - theirs).double().square().sum())
                change += float((theirs - initial[name]).double().square().sum())
        error = (difference / change) ** 0.5
        what = f"train.kl={how.name} model.attention={attention.name}"
        rows.append(Equality(what, style.name, error))
    return rows


def head_memory(tokens: int = 1024, d_vocab: int = 65_536, d_model: int = 512) -> tuple[float, float]:
    """Peak bytes of the KL without its inputs: with full logits, and fused."""
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


class Tokens:
    """Random tokens from a fixed seed."""

    def __init__(self, shape: Shape, context: int, device: torch.device) -> None:
        self._shape, self._context, self._device = shape, context, device
        self._generator = torch.Generator().manual_seed(1)

    def next(self, sequences: int = 1) -> Tensor:
        """The next tokens, `[sequence, pos]`."""
        size = sequences, self._context
        return torch.randint(0, self._shape.d_vocab, size, generator=self._generator).to(self._device)


def raise_allocator_thresholds() -> bool:
    """Let glibc keep freed memory, up to its limits; return true if glibc accepts this.

    Returns false if there is no glibc.
    """
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
    """Run comparisons, print each row as soon as it is measured, and write the record.

    Args:
        styles: Names of `Style`; `None` for all.
        contexts: Tokens per sequence; `None` for `CONTEXTS`.
        packs: Sizes of packs; `None` for `SIZES`. Only with `None`, evaluations and the memory of the KL
            are measured too, and also SAEs if `styles` and `contexts` are `None`.
        rounds: Number of paired times for each row.
        tuned: True to raise the thresholds of the C allocator for both sides.
        to: File for the record. It is written after each row.

    Raises:
        UserError: If the record cannot be written, or a comparison is killed.
    """
    if to is not None:  # a path that cannot be written is refused before the long measurements
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
    chosen = [Style[name] for name in styles] if styles else list(Style)
    rows: list[tuple[Any, ...]] = []
    for style in chosen:
        for context in contexts or CONTEXTS:
            rows += [(compare_steps, style, SMALL, context, size) for size in packs or SIZES]
            if not packs:
                rows.append((compare_evaluations, style, SMALL, context))
    if not (styles or contexts or packs):
        rows.insert(0, (compare_saes, WIDE))
    whole = len(rows) + len(chosen) + (not packs)
    table = _Table(record["peak_flops_per_second"])
    with progress_bar("comparing", "rows") as count:

        def keep(lines: Sequence[Sequence[str]]) -> None:
            for line in lines:
                table.add(line)
            if to is not None:  # after each row, because the next one may be too large for the machine
                write_atomically(to, as_json(record))
            count(count_done(record), whole)

        count(0, whole)
        for compare, *arguments in rows:
            row = _in_own_process(tuned, compare, *arguments, rounds, device, dtype)
            record["rows"].append(dataclasses.asdict(row))
            keep([table.row(row)])
        for style in chosen:
            equalities = _in_own_process(tuned, compare_results, style, SMALL, device)
            record["equalities"] += [dataclasses.asdict(equality) for equality in equalities]
            keep([table.equality(equality) for equality in equalities])
        if not packs:
            whole_bytes, fused_bytes = head_memory()
            record["kl_bytes"] = {"whole": whole_bytes, "fused": fused_bytes}
            keep([table.memory(whole_bytes, fused_bytes)])


def count_done(record: dict[str, Any]) -> int:
    """Number of finished parts of a record. The equalities of a style are one part."""
    styles = {equality["style"] for equality in record["equalities"]}
    return len(record["rows"]) + len(styles) + (record["kl_bytes"] is not None)


def _in_own_process(tuned: bool, compare: Callable[..., Result], *arguments: object) -> Result:
    """Run a comparison in its own process.

    In a shared process, the published loop would reuse memory that an earlier comparison has freed,
    instead of requesting it from the system.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=silence_transformers) as process:
        if tuned and not process.submit(raise_allocator_thresholds).result():
            raise UserError("--tuned needs glibc, whose allocator it tunes; this machine has none")
        try:
            return process.submit(compare, *arguments).result()
        except BrokenProcessPool as error:
            what = f"{compare.__name__}({', '.join(map(str, arguments))})"
            raise UserError(f"a comparison was killed, perhaps out of memory: {what}") from error


class _Table:
    """Table that prints its rows one by one, in columns of fixed width.

    Args:
        peak: FLOPs per second of matrix products on this device.
    """

    COLUMNS = (
        *(("comparison", -46), ("style", -8), ("tokens", 6), ("speedup per run", 22)),
        *(("range", 11), ("seconds here", 12), ("in products", 11), ("rate", 11), ("memory", 8)),
    )
    """Headings and widths. Columns with a negative width are aligned to the left."""

    def __init__(self, peak: float) -> None:
        self._peak = peak
        self.add([name for name, _ in self.COLUMNS])

    def add(self, cells: Sequence[str]) -> None:
        """Print a row."""
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

    def equality(self, equality: Equality) -> list[str]:
        """The cells of a check that adapters are equal."""
        what = f"adapters differ by {equality.error:.1e} with {equality.what}"
        return [what, equality.style, "256"]

    def memory(self, whole: float, fused: float) -> list[str]:
        """The cells of the KL's memory."""
        what = f"memory of the KL, vocabulary of 65,536: {fused / 1e6:.0f} MB"
        return [what, "", "1,024", f"{whole / fused:.1f} times less"]
