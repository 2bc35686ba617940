"""One session on a GPU: waits, times and memory of training steps at Gemma-2-2B's shape.

    python -m scripts.gpu_session docs/results/gpu.json
    python -m scripts.gpu_session gpu.json --tiny       # small shapes, also on a CPU: a rehearsal

Model, SAEs (JumpReLU, 16k latents) and tokens are random, so nothing is downloaded. `waits` lists the
places where the host waits for the device, `steps` has the time and the peak memory of a step of packs
and of the published loop, and `changes` the time of a pack of five with other implementations of its
parts, and of the published loop compiled. It takes at most eight minutes, and needs the package with its
dependencies and a C compiler (for Triton). `pytest -m gpu` tests what only a GPU can show.
A row that fails is recorded with its error; the others go on. Prints each row as it is measured, and
writes the record after each.
"""

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from torch.profiler import ProfilerActivity, profile

from sae_lora.common.files import as_json, write_atomically
from sae_lora.common.provenance import environment
from sae_lora.config.enums import Attention, DType, KLComputation, SAEFamily
from sae_lora.config.schema import Config, SAEChoice
from sae_lora.models.attention import blockwise
from sae_lora.models.attention.choice import choose_attention
from sae_lora.models.loading import silence_transformers
from sae_lora.saes.sparse import multiplied
from sae_lora.splice import kl
from sae_lora.splice.hooks import Splice
from sae_lora.train.cost.estimate import estimate
from sae_lora.train.distill import DistillTrainer
from sae_lora.train.passes import EACH_ALONE, Passing
from scripts.benchmark import compare
from scripts.benchmark.compare import RANKS, SINGLE
from scripts.benchmark.measure import wait
from scripts.benchmark.shapes import Shape, Style, random_model

GEMMA_2_2B = Shape(
    d_model=2304,
    d_mlp=9216,
    n_blocks=26,
    n_heads=8,
    n_kv_heads=4,
    d_head=256,
    d_vocab=256_000,
    sae_block=12,
    d_sae=16_384,
    k=80,
)
TINY = Shape(
    d_model=64,
    d_mlp=128,
    n_blocks=4,
    n_heads=4,
    n_kv_heads=2,
    d_head=16,
    d_vocab=512,
    sae_block=1,
    d_sae=256,
    k=80,
)
Step = Callable[[], object]


class Session:
    """A frozen model with random weights, and what was measured with it.

    Args:
        tiny: True for small shapes.
        to: File of the record.
    """

    def __init__(self, tiny: bool, to: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._shape, self._context = (TINY, 32) if tiny else (GEMMA_2_2B, 1024)
        self._rounds, self._warm = (1, 1) if tiny else (6, 3)
        self.model = random_model(Style.gemma2, self._shape, self.device, torch.bfloat16)
        choose_attention(self.model.model, Attention.auto, self.device)
        self._tokens = compare.Tokens(self._shape, self._context, torch.device("cpu"))
        self._to = to
        self._record: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "environment": environment(self.device),
            "shape": dataclasses.asdict(self._shape),
            "context": self._context,
            "waits": {},
            "steps": [],
            "changes": [],
            "errors": {},
        }

    def take(self, parts: Sequence[str]) -> None:
        """Measure parts, one after the other."""
        for part in parts:
            start = time.monotonic()
            with self._recorded_errors(part):
                getattr(self, part)()
            self._write()
            print(f"-- {part}: {time.monotonic() - start:.0f} s", flush=True)

    def waits(self) -> None:
        """Record where the host waits for the device in a step, alone and in packs."""
        for ranks, saes in (([SINGLE], 1), (RANKS, 1), (RANKS, 5)):
            step = self._packed(ranks, saes)
            step()
            step()
            places: Counter[str] = Counter()
            if self.device.type == "cuda":
                with warnings.catch_warnings(), patch.object(warnings, "showwarning", _noting(places)):
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    step()
                    torch.cuda.set_sync_debug_mode("default")
            self._record["waits"][f"{len(ranks) * saes}"] = dict(places)
            print(f"waits of a pack of {len(ranks) * saes}: {dict(places)}", flush=True)
            del step
            self._free()

    def steps(self) -> None:
        """Record time, peak memory and kernels of packs and of the published loop."""
        cases = (([SINGLE], 1), ([256], 1), (RANKS, 1), ([SINGLE] * 8, 1), (RANKS, 5))
        for ranks, saes in cases:
            runs = len(ranks) * saes
            with self._recorded_errors(f"pack of {runs}"):
                row = self._timed(self._packed(ranks, saes), runs, count=runs <= 8)
                row["estimated_gb"] = self._estimated_gb(ranks, saes)
                self._keep("steps", {"what": "here", "ranks": list(ranks), "saes": saes} | row)
        for rank in (SINGLE, 256):
            row = self._timed(self._published(rank), 1)
            self._keep("steps", {"what": "published loop", "ranks": [rank], "saes": 1} | row)

    def changes(self) -> None:
        """Record a pack of five without compilation, with adapters in float32, with each run alone, with
        a sparse SAE, with float32 instead of TF32, with other attentions, and with the KL in operations
        of torch; and the published loop compiled.
        """
        way = compare.usual_way(self.model)
        self._change("none", self._packed(RANKS))
        self._change("not compiled", self._packed(RANKS, passing=way._replace(compiled=False)))
        in_float32 = way._replace(products=torch.float32)
        self._change("adapters multiplied in float32", self._packed(RANKS, passing=in_float32))
        self._change("each run alone", self._packed(RANKS, passing=EACH_ALONE))
        self._change("SparseSAE", self._packed(RANKS, of=[multiplied(self._sae(0), True)]))
        exact = [Splice(self._shape.sae_block, self._sae(0), tf32=False)]
        self._change("the SAE encodes in float32", self._packed(RANKS, splices=exact))
        for name in ("eager", blockwise.NAME):
            with self._recorded_errors(name), self._attention(name):
                self._change(f"attention {name}", self._packed(RANKS))
        with patch.object(kl, "_by_kernels", kl._by_operations):
            self._change("the KL in operations of torch", self._packed(RANKS))
        self._change("published loop, blocks and KL compiled", self._published(SINGLE, compiled=True), 1)

    def _change(self, what: str, step: Step, runs: int = len(RANKS)) -> None:
        with self._recorded_errors(what):
            self._keep("changes", {"what": what} | self._timed(step, runs, count=False))

    # ---- steps --------------------------------------------------------------------------------

    def _packed(
        self,
        ranks: Sequence[int],
        saes: int = 1,
        of: Sequence[Any] | None = None,
        splices: Sequence[Splice] = (),
        *,
        passing: Passing | None = None,
    ) -> Step:
        """A step of a pack with every rank around every SAE; `None` for the way of the default."""
        coders = of or [multiplied(self._sae(seed), None) for seed in range(saes)]
        splices = splices or [Splice(self._shape.sae_block, coder) for coder in coders]
        runs = [compare.training(self.model, splice, rank) for splice in splices for rank in ranks]
        together: DistillTrainer = compare.pack(self.model, runs, KLComputation.fused, passing=passing)
        return lambda: together._take_step(together.active, together._on_device(self._tokens.next()))

    def _published(self, rank: int, *, compiled: bool = False) -> Step:
        """A step of the published loop."""
        loop = compare.reference(self.model, Splice(self._shape.sae_block, self._sae(0)), rank)
        if compiled:
            loop.compile()
        return lambda: loop.step(self._tokens.next().to(self.device))

    def _sae(self, seed: int) -> JumpReLUSAE:
        """Random, with `shape.k` active latents on a token whose activations have variance one."""
        torch.manual_seed(seed)
        d_model, width = self._shape.d_model, self._shape.d_sae
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_model, d_sae=width, device=str(self.device)))
        quantile = torch.distributions.Normal(0, 1).icdf(
            torch.tensor(max(0.5, 1 - self._shape.k / width))
        )
        with torch.no_grad():
            sae.W_enc.normal_(std=d_model**-0.5)
            sae.W_dec.normal_(std=d_model**-0.5)
            sae.threshold.fill_(float(quantile))
        return sae.requires_grad_(False).eval()

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        before: Any = self.model.model.config._attn_implementation
        self.model.model.set_attn_implementation(name)
        try:
            yield
        finally:
            self.model.model.set_attn_implementation(before)

    # ---- measurements -------------------------------------------------------------------------

    def _timed(self, step: Step, runs: int, *, count: bool = True) -> dict[str, Any]:
        """Milliseconds of a step: until it returns and until the device is done; medians of rounds."""
        for _ in range(self._warm):
            step()
        wait(self.device)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        returned, done = [], []
        for _ in range(self._rounds):
            start = time.perf_counter()
            step()
            returned.append(time.perf_counter() - start)
            wait(self.device)
            done.append(time.perf_counter() - start)
        row: dict[str, Any] = {
            "ms": 1e3 * statistics.median(done),
            "ms_least": 1e3 * min(done),
            "ms_most": 1e3 * max(done),
            "host_ms": 1e3 * statistics.median(returned),
            "ms_per_run": 1e3 * statistics.median(done) / runs,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        }
        if count:
            with profile(
                activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
            ) as profiled:
                step()
                wait(self.device)
            averages: Any = profiled.key_averages()
            row["kernels"] = sum(event.count for event in averages if "LaunchKernel" in event.key)
            if on_gpu:
                on_device = (event for event in averages if event.device_type.name == "CUDA")
                row["device_ms"] = sum(event.self_device_time_total for event in on_device) / 1e3
                table = averages.table(sort_by="self_cuda_time_total", row_limit=30)
                named = f"{self._to.stem}_profile_{runs}_{len(self._record['steps'])}.txt"
                self._to.with_name(named).write_text(table)
        return row

    def _estimated_gb(self, ranks: Sequence[int], saes: int) -> float:
        """The estimate for these runs, without CUDA's own memory."""
        configs = []
        with tempfile.TemporaryDirectory() as home:
            self.model.config.architectures = ["Gemma2ForCausalLM"]
            self.model.config.save_pretrained(home)
            for number in range(saes):
                for rank in ranks:
                    config = Config()
                    config.model.name, config.model.dtype = home, DType.bfloat16
                    config.sae.family, config.sae.dtype = SAEFamily.gemma_scope, DType.float32
                    choice = SAEChoice(
                        block=self._shape.sae_block, width=self._shape.d_sae, release="r", id=str(number)
                    )
                    config.sae.used = [choice]
                    config.lora = compare.adapters(rank)
                    config.train.dtype, config.train.batch_size = DType.bfloat16, 1
                    config.data.context_length = config.data.validation_tokens = self._context
                    configs.append(config)
            return estimate(configs).peak_bytes / 1e9

    def _keep(self, part: str, row: dict[str, Any]) -> None:
        self._record[part].append(row)
        self._write()
        print({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()}, flush=True)
        self._free()

    def _write(self) -> None:
        write_atomically(self._to, as_json(self._record))

    @contextmanager
    def _recorded_errors(self, what: str) -> Iterator[None]:
        """Record an error, so that what remains of the session is measured."""
        try:
            yield
        except Exception as error:  # of any library: the session is short, and cannot be repeated
            traceback.print_exc()
            self._record["errors"][what] = f"{type(error).__name__}: {error}"[:500]
        self._free()

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _noting(places: Counter[str]) -> Callable[..., None]:
    """A receiver of warnings that counts the lines of this package whose calls wait for the device."""

    def note(message: Warning | str, category: object, file: str, line: int, *_: object) -> None:
        if "synchroniz" in str(message):
            ours = [frame for frame in traceback.extract_stack() if "/sae_lora/" in frame.filename]
            place = f"{Path(file).name}:{line}"
            places[
                f"{place} from {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else place
            ] += 1

    return note


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("to", type=Path, help="JSON file for the record")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--parts", nargs="+", default=("waits", "steps", "changes"))
    given = parser.parse_args()
    silence_transformers()
    Session(given.tiny, given.to).take(given.parts)


if __name__ == "__main__":
    main()
