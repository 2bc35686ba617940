"""One training step, by this package in each of its ways, and by other loops.

    python -m scripts.benchmark.rivals docs/results/rivals/gemma2.json --page docs/results/rivals.md
    python -m scripts.benchmark.rivals rivals.json --model FOLDER --packs 1 4 --context 256

All take turns in one process, on the same frozen model, SAE and tokens; adapters have rank 16, with
dropout. Times are per run and step; the shares are those of the largest rate of a product of large
matrices in this process. The adapters after four steps without dropout are compared with those of the
published loop. The first step of a compiled loop takes a minute; `--uncompiled` leaves them out.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from sae_lora.common.console import say
from sae_lora.common.files import as_json, write_atomically
from sae_lora.common.provenance import environment
from sae_lora.config.enums import Attention, KLComputation
from sae_lora.models.attention.choice import choose_attention
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.loading import silence_transformers
from sae_lora.splice.hooks import Splice, spliced
from sae_lora.splice.student import LoRAStudent
from sae_lora.train.optim import GradientState
from sae_lora.train.passes import Passing
from scripts import pages
from scripts.benchmark.compare import SINGLE, TRAIN, Tokens, adapters, pack, usual_way
from scripts.benchmark.measure import taking_turns
from scripts.benchmark.profile import peak_flops_per_second, products_of, work_of
from scripts.benchmark.reference import Reference
from scripts.benchmark.shapes import SMALL, Shape, Style, random_model, random_splice

_STEPS = 4
"""Number of steps after which adapters are compared."""
_SHORT = 128
"""Tokens per sequence in these steps, at most."""
_PROFILED = "pack of 5"
_LISTED = 12
"""Number of sizes of products in the record."""
_SAES = 5
"""A pack of more runs has this number of SAEs, and a pack of fewer has one."""
Weights = Mapping[str, nn.Parameter]


class PlainLoop(Reference):
    """The loop as a good engineer writes it with torch and peft.

    Logits are computed once for each of the two models, attention and AdamW are torch's fused ones, and
    nothing waits for the device.
    """

    def __init__(self, model: LanguageModel, *arguments: Any, **named: Any) -> None:
        super().__init__(model, *arguments, **named)
        has_softcap = model.config_value("attn_logit_softcapping") is not None
        fused = "flex_attention" if model.device.type == "cuda" else "eager"
        self._model.model.set_attn_implementation(fused if has_softcap else "sdpa")
        self._optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=self._config.lr,
            weight_decay=self._config.weight_decay,
            fused=True,
        )
        self._kl = _kl_to

    def _step(self, tokens: Tensor) -> Tensor:
        with torch.no_grad(), self._adapters.disable_adapter():
            teacher = self._logits(tokens).float().log_softmax(-1)
        with spliced(self._model, self._splices, tokens):
            student = self._logits(tokens)
        kl = self._kl(teacher, student)
        (kl / tokens.numel()).backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self._config.grad_clip or 0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return kl.detach()


def _kl_to(teacher: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) summed over tokens, from log-probabilities of the teacher."""
    log_q = student_logits.float().log_softmax(-1)
    return functional.kl_div(log_q, teacher, log_target=True, reduction="sum")


class Contender(NamedTuple):
    """A way to train."""

    runs: int
    compiled: bool
    step: Callable[[Tensor], object]
    weights: Weights
    """The adapters of its first run."""


class Contest:
    """A frozen model with SAEs, and the ways to train around them.

    Args:
        model: The model.
        shape: Its sizes, and those of the SAEs.
        packs: Numbers of runs.
        compiled: True to compile, too.
    """

    def __init__(
        self, model: LanguageModel, shape: Shape, packs: Sequence[int], *, compiled: bool
    ) -> None:
        self._compiled = compiled
        self._model, self._shape, self._packs = model, shape, packs
        dtype = model.model.dtype
        self._splices = [random_splice(shape, seed, model.device, dtype) for seed in range(_SAES)]
        self._products = usual_way(model).products

    def contenders(self, dropout: float) -> dict[str, Callable[[], Contender]]:
        """The ways by name, in the order of the table. Each is made when it is called."""
        made: dict[str, Callable[[], Contender]] = {}
        for name, kind in (("published loop", Reference), ("peft and torch", PlainLoop)):
            made[name] = partial(self._other, kind, dropout, compiled=False)
            made[f"{name}, compiled"] = partial(self._other, kind, dropout, compiled=True)
        for runs in self._packs:
            where = "alone" if runs == 1 else f"pack of {runs}"
            ways = {"": Passing(), ", compiled": Passing(compiled=True, products=self._products)}
            if runs > 1:
                ways = {
                    "": Passing(),
                    ", stacked": Passing(stacked=True, products=self._products),
                    ", stacked, compiled": Passing(True, True, self._products),
                }
            for how, passing in ways.items():
                made[where + how] = partial(self._ours, runs, passing, dropout)
        return {name: make for name, make in made.items() if self._compiled or "compiled" not in name}

    def _other(self, kind: type[Reference], dropout: float, *, compiled: bool) -> Contender:
        torch.manual_seed(0)
        config = dataclasses.replace(adapters(SINGLE), dropout=dropout)
        loop = kind(self._model, tuple(self._splices[:1]), config, TRAIN)
        if compiled:
            loop.compile()
        return Contender(1, compiled, loop.step, loop.weights)

    def _ours(self, runs: int, passing: Passing, dropout: float) -> Contender:
        splices = self._splices if runs > _SAES else self._splices[:1]
        trainings = [
            self._training(splice, seed, dropout)
            for splice in splices
            for seed in range(runs // len(splices))
        ]
        together = pack(self._model, trainings, KLComputation.fused, passing=passing)

        def step(tokens: Tensor) -> None:
            together._take_step(together.active, together._on_device(tokens))

        return Contender(runs, passing.compiled, step, trainings[0].student.weights)

    def _training(self, splice: Splice, seed: int, dropout: float) -> GradientState:
        torch.manual_seed(seed)
        config = dataclasses.replace(adapters(SINGLE), dropout=dropout)
        return GradientState(LoRAStudent(self._model, (splice,), config), TRAIN, 2**30)

    def errors(self, contenders: Mapping[str, Callable[[], Contender]]) -> dict[str, float]:
        """The distance of each one's adapters from those of the first, relative to their change."""
        errors, expected = {}, None
        for name, make in contenders.items():
            made = make()
            before = _vector(made.weights)
            tokens = Tokens(self._shape, _SHORT, self._model.device)
            for _ in range(_STEPS):
                made.step(tokens.next())
            after = _vector(made.weights)
            if expected is None:
                expected = after
            errors[name] = float((after - expected).norm() / (expected - before).norm())
            del made
            gc.collect()
        return errors


def _vector(weights: Weights) -> Tensor:
    return torch.cat([weights[name].detach().double().flatten() for name in sorted(weights)])


def measure(
    contest: Contest, tokens: Tokens, sequences: int, rounds: int, device: torch.device, peak: float
) -> list[dict[str, Any]]:
    """The rows of the record."""
    errors = contest.errors(contest.contenders(dropout=0.0))
    made = {name: make() for name, make in contest.contenders(dropout=0.1).items()}
    calls = {
        name: partial(lambda each: each.step(tokens.next(sequences)), contender)
        for name, contender in made.items()
    }
    times = taking_turns(calls, rounds, device)
    rows = []
    for name, contender in made.items():
        work = work_of(calls[name], device)
        seconds = statistics.median(times[name]) / contender.runs
        rows.append(
            {
                "what": name,
                "runs": contender.runs,
                "seconds": seconds,
                "flops": work.flops / contender.runs,
                "of_peak": work.flops / contender.runs / seconds / peak,
                "in_products": work.in_products,
                "products_of_peak": work.flops_per_second / peak,
                "peak_bytes": None if contender.compiled else work.peak_bytes,
                "error": errors[name],
                "operators": work.operators,
            }
        )
        if device.type == "cpu" and name == _PROFILED:
            products = products_of(calls[name])[:_LISTED]
            rows[-1]["products"] = [dataclasses.asdict(product) for product in products]
    return rows


def table_of_products(row: dict[str, Any], peak: float) -> str:
    """The products of matrices in a step as a Markdown table."""
    whole = row["seconds"] * row["runs"]
    columns: dict[str, list[str]] = {}
    for product in row["products"]:
        for heading, cell in {
            "batch × rows × columns × sum": " × ".join(map(str, product["sizes"])),
            "number": f"{product['number']}",
            "share of the time": f"{product['seconds'] / whole:.0%}",
            "share of peak": f"{product['flops'] / product['seconds'] / peak:.0%}",
        }.items():
            columns.setdefault(heading, []).append(cell)
    return pages.markdown(columns)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    published = rows[0]["seconds"]
    columns: dict[str, list[str]] = {}
    for row in rows:
        for heading, cell in {
            "": row["what"],
            "ms": f"{1e3 * row['seconds']:,.0f}",
            "speedup": f"{published / row['seconds']:.2f}",
            "TFLOP": f"{row['flops'] / 1e12:.2f}",
            "of peak": f"{row['of_peak']:.0%}",
            "in products": f"{row['in_products']:.0%}",
            "their rate": f"{row['products_of_peak']:.0%}",
            "GB": "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}",
            "error": f"{row['error']:.0e}" if row["error"] else "0",
        }.items():
            columns.setdefault(heading, []).append(cell)
    return pages.markdown(columns)


def with_tables(page: str, records: Path) -> str:
    """The text of a page with the tables of its records: `<!-- NAME -->` stands before that of the loops
    in `NAME.json`, and `<!-- NAME_products -->` before that of the products of a pack of five.
    """

    def made(name: str) -> str:
        stem = name.removesuffix("_products")
        record = json.loads((records / f"{stem}.json").read_text())
        if name == stem:
            return table(record["rows"])
        (row,) = (row for row in record["rows"] if row["what"] == _PROFILED)
        return table_of_products(row, record["peak_flops_per_second"])

    return pages.with_tables(page, made)


def _model(folder: Path | None, style: Style, device: torch.device) -> tuple[LanguageModel, Shape]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if folder is None:
        return random_model(style, SMALL, device, dtype), SMALL
    model = LanguageModel(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    model.model.to(device)  # pyright: ignore[reportArgumentType]
    sizes = {"d_model": model.config.hidden_size, "d_vocab": model.config.vocab_size}
    n_blocks, d_sae = len(model.blocks), 4 * model.config.hidden_size
    return model, Shape(**sizes, n_blocks=n_blocks, sae_block=n_blocks // 2, d_sae=d_sae, k=32)


def main() -> None:
    """Measure, write the record, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, nargs="?", help="file of the record; none: only the page")
    parser.add_argument("--page", type=Path, help="page with tables of the records in its folder")
    parser.add_argument("--style", choices=[style.name for style in Style], default="gemma2")
    parser.add_argument("--model", type=Path, help="folder of a model, in place of a random one")
    parser.add_argument("--packs", type=int, nargs="+", default=[1, 5, 25])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--uncompiled", action="store_true", help="leave compiled loops out")
    given = parser.parse_args()
    if given.record is not None:
        _record(given)
    if given.page is not None:
        given.page.write_text(with_tables(given.page.read_text(), given.page.with_suffix("")))


def _record(given: argparse.Namespace) -> None:
    silence_transformers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, shape = _model(given.model, Style[given.style], device)
    choose_attention(model.model, Attention.auto, device)
    peak = peak_flops_per_second(device, model.model.dtype)
    tokens = Tokens(shape, given.context, device)
    contest = Contest(model, shape, given.packs, compiled=not given.uncompiled)
    rows = measure(contest, tokens, given.sequences, given.rounds, device, peak)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(device),
        "model": given.model.name if given.model else given.style,
        "shape": dataclasses.asdict(shape),
        "tokens": [given.sequences, given.context],
        "peak_flops_per_second": peak,
        "rows": rows,
    }
    write_atomically(given.record, as_json(record))
    say(table(rows))


if __name__ == "__main__":
    main()
