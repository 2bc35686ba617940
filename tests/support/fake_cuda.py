"""Training steps on a CUDA device that does not exist: torch computes shapes, and no numbers.

`fake_cuda.cpp` gives a CPU build of torch a device "cuda". Fake tensors on it take the way of a GPU
through models, autograd and optimisers, and everything that a step asks of the device is counted: waits,
kernels, bytes moved, and the peak of memory. The library must be loaded before torch, so that the steps
run in a process of their own:

    python -m tests.support.fake_cuda CASES.json RESULTS.json
"""

import collections
import dataclasses
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

SOURCE = Path(__file__).with_suffix(".cpp")


@dataclass(frozen=True)
class Case:
    """A pack on the device: runs that differ in their ranks, around each of several SAEs."""

    model: str
    """One of `MODELS`."""
    ranks: tuple[int, ...]
    saes: int = 1
    width: int = 16_384
    batch: int = 1
    context: int = 1024
    overrides: dict[str, Any] = field(default_factory=dict)
    """Values of config keys, by their dotted names."""
    published: bool = False
    """True for the published loop, with the first rank. It is compiled as `train.compile` says."""


@dataclass(frozen=True)
class Counted:
    """A step of a pack, after two others, as it was counted."""

    waits: dict[str, int]
    """The operations that wait for the device, by name and place."""
    kernels: int
    moved: int
    """Bytes that kernels read and write."""
    seconds: float
    """The time of the kernels on an H200, as it is projected from their operations and bytes."""
    parts: dict[str, float]
    """`seconds` by what they are for: "starts" of kernels, "products", "attention" and the "rest"."""
    peak: int
    """Peak memory of a step and of an evaluation in bytes, without that of CUDA itself. Of the published
    loop, of a step."""
    estimated: float
    """The estimate of `peak` on a machine with a GPU."""
    planned: float
    """The estimate for a cluster, on a machine without a GPU."""


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def count(cases: Sequence[Case], folder: Path) -> list[Counted]:
    """Count steps in a process of their own; `folder` is for its files."""
    results = folder / "results.json"
    written = folder / "cases.json"
    written.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    variables = {**os.environ, "LD_PRELOAD": str(_library()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.fake_cuda", str(written), str(results)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [Counted(**counted) for counted in json.loads(results.read_text())]


@functools.cache
def _library() -> Path:
    import torch

    home = Path(torch.__file__).parent
    library = Path(tempfile.mkdtemp()) / "libfakecuda.so"
    paths = [f"-I{home}/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib"]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-ltorch_cpu", "-lc10"]
    command = [compiler() or "c++", str(SOURCE), "-o", str(library), *paths, *flags]
    subprocess.run(command, check=True, capture_output=True)
    return library


# ---- in the process with the library -------------------------------------------------------------


def _main() -> None:
    given, to = map(Path, sys.argv[1:])
    cases = json.loads(given.read_text())
    results = []
    for values in cases:
        values["ranks"] = tuple(values["ranks"])
        results.append(dataclasses.asdict(_counted(Case(**values))))
        gc.collect()
    to.write_text(json.dumps(results))


_SIZES: dict[str, dict[str, Any]] = {
    "gemma-2-2b": {},  # the defaults of transformers
    "gemma-2-9b": {
        "hidden_size": 3584,
        "intermediate_size": 14_336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "gemma-2-27b": {
        "hidden_size": 4608,
        "intermediate_size": 36_864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
    },
    "small-gemma-2": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "sliding_window": 256,
    },
    "llama-3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "small-llama": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}
MODELS = tuple(_SIZES)
_BLOCKS = {"gemma-2-2b": 12, "gemma-2-9b": 20, "gemma-2-27b": 22, "llama-3-8b": 16}
"""The block of the SAE; 1 in a small model."""
_ACTIVE = 80
"""Active latents of a token."""


def _counted(case: Case) -> Counted:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from sae_lora.train.cost import estimate
    from sae_lora.train.cost.memory import CUDA_BYTES
    from tests.support import fake_inductor

    with tempfile.TemporaryDirectory() as home:
        configs = _configs(case, Path(home) / case.model)
        with patch.object(torch.cuda, "is_available", lambda: True):
            estimated = estimate.estimate(configs).peak_bytes - CUDA_BYTES
        for config in configs:
            config.launcher.kind = type(config.launcher.kind)["slurm"]
            config.launcher.gpus_per_node = 1
        planned = estimate.estimate(configs).peak_bytes - CUDA_BYTES
        requests, memory = _requests(case), _device_memory()
        with ExitStack() as modes:
            modes.enter_context(_as_on_a_gpu())
            if configs[0].train.compiles_on(gpu=True):
                modes.enter_context(fake_inductor.as_on_a_gpu(requests, memory))
            for mode in (FakeTensorMode(allow_non_fake_inputs=True), memory, requests):
                modes.enter_context(mode)
            step, evaluate = (_published if case.published else _steps)(case, configs)
            step()
            evaluate()
            gc.collect()
            memory.peak = memory.now
            requests.clear()
            step()
            waits, asked = dict(requests.waits), (requests.kernels, requests.moved)
            seconds = sum(requests.seconds.values()), dict(requests.seconds)
            evaluate()
    named = {f"{name} at {place}": number for (name, place), number in waits.items()}
    return Counted(named, *asked, *seconds, memory.peak, estimated, planned)


Call = Callable[[], object]


def _steps(case: Case, configs: Sequence[Any]) -> tuple[Call, Call]:
    """A step of a pack, and an evaluation."""
    import torch

    pack = _pack(case, configs)
    tokens = torch.zeros(case.batch, case.context, dtype=torch.long)
    return (
        lambda: pack._take_step(pack.active, pack._on_device(tokens)),
        lambda: pack._evaluate([training.student for training in pack.active]),
    )


def _published(case: Case, configs: Sequence[Any]) -> tuple[Call, Call]:
    """A step of the published loop, and no evaluation."""
    import torch

    from scripts.benchmark.reference import Reference

    model, splices = _frozen(case, configs[0])
    loop = Reference(model, splices[:1], configs[0].lora, configs[0].train)
    tokens = torch.zeros(case.batch, case.context, dtype=torch.long).to("cuda", non_blocking=True)
    if configs[0].train.compiles_on(gpu=True):
        loop.compile()
    return lambda: loop.step(tokens), lambda: None


def _configs(case: Case, folder: Path) -> list[Any]:
    from transformers import Gemma2Config, LlamaConfig

    from sae_lora.config.enums import DType, Initialisation, SAEFamily
    from sae_lora.config.schema import Config, SAEChoice

    kind = LlamaConfig if "llama" in case.model else Gemma2Config
    architecture = kind.__name__.replace("Config", "ForCausalLM")
    kind(**_SIZES[case.model], architectures=[architecture]).save_pretrained(folder)
    configs = []
    for number in range(case.saes):
        for rank in case.ranks:
            config = Config()
            config.model.name, config.model.dtype = str(folder), DType.bfloat16
            config.sae.family = SAEFamily.gemma_scope
            block = _BLOCKS.get(case.model, 1)
            config.sae.used = [SAEChoice(block=block, width=case.width, release="r", id=str(number))]
            config.lora.rank, config.lora.alpha, config.lora.dropout = rank, 32.0, 0.1
            config.lora.init, config.train.dtype = Initialisation.kaiming, DType.bfloat16
            config.train.batch_size, config.data.context_length = case.batch, case.context
            config.data.validation_tokens = 2 * config.train.eval_batch_tokens
            config.train.eval_cache_gb, config.train.train_tokens = 0, 15_360_000
            for name, value in case.overrides.items():
                group, key = name.split(".")
                kind_of = type(getattr(getattr(config, group), key))
                is_word = isinstance(value, str) and hasattr(kind_of, "__members__")
                setattr(getattr(config, group), key, kind_of[value] if is_word else value)
            configs.append(config)
    return configs


def _frozen(case: Case, common: Any) -> tuple[Any, tuple[Any, ...]]:
    """The model and the SAEs at their places, without numbers."""
    import torch
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    from sae_lora.models.attention.choice import choose_attention
    from sae_lora.models.language_model import LanguageModel
    from sae_lora.saes.sparse import multiplied
    from sae_lora.splice.hooks import Splice

    device = torch.device("cuda", 0)
    with device:
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(common.model.name))
    for weight in shapes.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    choose_attention(shapes, common.model.attention, device)
    model = LanguageModel(shapes)
    splices = []
    for _ in range(case.saes):
        sizes = {"d_in": model.config.hidden_size, "d_sae": case.width}
        sae = JumpReLUSAE(JumpReLUSAEConfig(**sizes, device="cuda"))
        coder = multiplied(sae.requires_grad_(False).eval(), common.sae.sparse)
        splices.append(Splice(common.sae.used[0].block, coder))
    return model, tuple(splices)


def _pack(case: Case, configs: Sequence[Any]) -> Any:
    """The trainer of the runs, as a process builds it, with weights and tokens without numbers."""
    import torch

    from sae_lora.common.isolation import Isolation
    from sae_lora.splice.head import Head
    from sae_lora.splice.kl import Comparison, kl_of
    from sae_lora.train import methods
    from sae_lora.train.distill import DistillTrainer
    from sae_lora.train.evaluator import Evaluator
    from sae_lora.train.passes import Passing

    common = configs[0]
    model, splices = _frozen(case, common)
    trainings = []
    for config in configs:
        splice = splices[int(config.sae.used[0].id)]
        trainings.append(methods.build(config, model, (splice,), 2**20)[0])
    comparison = Comparison(Head.of(model), common.train.kl_chunk_tokens)
    held_out = torch.zeros(common.data.validation_tokens // case.context, case.context, dtype=torch.long)
    evaluate = Evaluator(model, held_out, common.train.eval_batch_tokens // case.context, comparison)
    kl, micro_batch = kl_of(comparison, common.train.kl), common.train.micro_batch_size
    passing = Passing.of(common.train, model.device)
    return DistillTrainer(model, Isolation(trainings), evaluate, kl, micro_batch, passing)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Inside the block, code that treats fake tensors in another way than real ones does not."""
    import torch
    import transformers
    from torch.nn import functional
    from torch.optim import adam
    from torch.utils import _foreach_utils, flop_counter

    from sae_lora.common import fast_path
    from sae_lora.models.attention import fused
    from sae_lora.splice import kl, stack
    from sae_lora.train import optim

    def attended(query: Any, key: Any, value: Any, how: Any) -> Any:
        return flash(query, key, value, 0.0, True, scale=how.scale)[0]

    def sdpa(query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **named: Any) -> Any:
        if attn_mask is None and named.get("is_causal"):
            return flash(query, key, value, 0.0, True, scale=named.get("scale"))[0]
        return usual(query, key, value, attn_mask, **named)

    def of_batched_product(first: Any, second: Any, *_: Any, **__: Any) -> int:
        return 2 * first.numel() * second.shape[-1]

    def refuse(kind: str, told: str) -> None:
        raise RuntimeError(told)  # another computation would be counted

    def apply(self: torch.nn.Module, change: Any, recurse: bool = True) -> torch.nn.Module:
        """As torch's, which cannot put a fake tensor in the place of another one."""
        for child in self.children():
            child._apply(change)
        for name, weight in self._parameters.items():
            if weight is not None:
                with torch.no_grad():
                    self._parameters[name] = torch.nn.Parameter(change(weight), weight.requires_grad)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else change(buffer)
        return self

    flash = torch.ops.aten._scaled_dot_product_flash_attention
    usual = functional.scaled_dot_product_attention
    state = torch.zeros(16, dtype=torch.uint8)
    cuda = torch.cuda
    with ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers") and hasattr(module, "is_tracing"):
                patches.enter_context(patch.object(module, "is_tracing", lambda tensor=None: False))
        for module in (torch.nn.utils.clip_grad, _foreach_utils):
            patches.enter_context(patch.object(module, "_has_foreach_support", lambda *_: True))
        for owner, name, stand_in in (
            (torch.nn.Module, "_apply", apply),
            (adam, "_default_to_fused_or_foreach", lambda *_, **__: (False, True)),
            (functional, "scaled_dot_product_attention", sdpa),
            (fast_path, "complain", refuse),
            (fused, "_flexible", attended),
            (fused, "_causal", attended),
            (fused, "_difference", lambda *_: 0.0),
            (kl, "_difference", lambda *_: 0.0),
            (stack.Stack, "difference", lambda *_: 0.0),
            (optim._Randomness, "generator", lambda self: torch.Generator()),
            (optim._Randomness, "follow", lambda self, generator: None),
            (fused._Visible, "differs", lambda *_: False),  # fake tensors hold no numbers to compare
            (cuda, "get_rng_state", lambda device=None: state),
            (cuda, "set_rng_state", lambda new, device=None: None),
            (cuda, "synchronize", lambda device=None: None),
            (cuda, "current_device", lambda: 0),
            (torch.Tensor, "pin_memory", lambda self, *_: self),
        ):
            patches.enter_context(patch.object(owner, name, stand_in))
        # torch's own count fails for products with a precision of their own.
        product = torch.ops.aten.bmm
        patches.enter_context(patch.dict(flop_counter.flop_registry, {product: of_batched_product}))
        transformers.logging.set_verbosity_error()
        yield


def _requests(case: Case) -> Any:
    """A mode that counts what is asked of the device, and answers questions about content."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    from tests.support import h200

    questions = ("_local_scalar_dense", "is_nonzero", "equal", "item")
    of_unknown_size = ("masked_select", "_unique2", "unique_consecutive", "repeat_interleave")
    no_kernel = (
        *("detach", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "alias"),
        *("resize_", "_unsafe_view", "device"),
    )

    def tensors(tree: object) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    def on_device(some: Iterable[torch.Tensor]) -> bool:
        return any(tensor.device.type == "cuda" for tensor in some)

    class Requests(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.clear()

        def clear(self) -> None:
            self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
            self.kernels = self.moved = 0
            self.seconds: collections.Counter[str] = collections.Counter()

        @contextmanager
        def paused(self) -> Iterator[None]:
            before = self.waits.copy(), self.kernels, self.moved, self.seconds.copy()
            yield
            self.waits, self.kernels, self.moved, self.seconds = before

        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
        ) -> Any:
            keywords = keywords or {}
            name = function._overloadpacket.__name__
            inputs = tensors((arguments, keywords))
            if name in questions and on_device(inputs):
                self._wait(name)
                return True if arguments[0].dtype == torch.bool else 1
            if name == "nonzero" and on_device(inputs):
                self._wait(name)
                self._count(name, function, inputs, [], 0)
                number = min(_ACTIVE * case.batch * case.context, arguments[0].numel())
                return torch.empty(number, arguments[0].dim(), dtype=torch.long, device="cuda")
            if name == "index" and on_device(inputs):
                masks = [mask for mask in arguments[1] if mask is not None and mask.dtype == torch.bool]
                if masks:
                    self._wait("index by a mask")
                    rest = arguments[0].shape[masks[0].dim() :]
                    shape = masks[0].numel(), *rest
                    return torch.empty(shape, dtype=arguments[0].dtype, device="cuda")
            if name in of_unknown_size and on_device(inputs):
                self._wait(name)
            result = function(*arguments, **keywords)
            if name in ("_to_copy", "copy_"):
                self._note_copy(name, arguments, keywords, result)
            counted = flop_registry.get(function._overloadpacket)
            flops = 0 if counted is None else counted(*arguments, **keywords, out_val=result)
            self._count(name, function, inputs, tensors(result), flops)
            return result

        def _note_copy(self, name: str, arguments: Any, keywords: Any, result: Any) -> None:
            source = arguments[0] if name == "_to_copy" else arguments[1]
            kinds = {source.device.type, result.device.type}
            is_free = keywords.get("non_blocking") or (name == "copy_" and arguments[2:3] == (True,))
            if kinds == {"cpu", "cuda"} and not is_free:
                self._wait(f"copy from {source.device.type} to {result.device.type}")

        def _wait(self, name: str) -> None:
            frames = traceback.extract_stack()
            ours = [frame for frame in frames if "/sae_lora/" in frame.filename]
            libraries = [
                frame
                for frame in frames
                if "site-packages" in frame.filename and "/torch/" not in frame.filename
            ]
            place = " ".join(
                f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
                for frame in (*ours[-1:], *libraries[-1:])
            )
            self.waits[name, place] += 1

        def _count(self, name: str, function: Any, inputs: Any, outputs: Any, flops: int) -> None:
            if not on_device([*inputs, *outputs]) or name in no_kernel:
                return
            known = {tensor.untyped_storage()._cdata for tensor in inputs}
            is_view = outputs and all(t.untyped_storage()._cdata in known for t in outputs)
            if is_view and not function._schema.is_mutable:
                return
            self.kernels += 1
            gathers = name.startswith("embedding") or name in ("gather", "index_select", "index")
            read = outputs if gathers else inputs
            moved = sum(t.numel() * t.element_size() for t in (*read, *outputs))
            self.moved += moved
            dtype = inputs[0].dtype if inputs else None
            self.seconds += h200.seconds(name, flops, dtype, moved)

    return Requests()


def _device_memory() -> Any:
    """A mode that counts the memory of the device, in the blocks of CUDA's allocator."""
    import torch

    from sae_lora.train.cost.memory import PeakMemory

    class DeviceMemory(PeakMemory):
        is_paused = False

        @contextmanager
        def paused(self) -> Iterator[None]:
            before, self.is_paused = self.is_paused, True
            yield
            self.is_paused = before

        def _count(self, storage: torch.UntypedStorage) -> None:
            if not self.is_paused:
                super()._count(storage)

    return DeviceMemory(device="cuda", granularity=512)


if __name__ == "__main__":
    _main()
