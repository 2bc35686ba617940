"""The suite `circuits`: attribution graphs of a model whose MLPs are transcoders, by circuit-tracer."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sae_lora.common.console import say
from sae_lora.common.errors import UserError, listed
from sae_lora.common.files import as_json, write_atomically
from sae_lora.config.enums import DType, Method, TextSource
from sae_lora.config.execution import EvaluationConfig
from sae_lora.evaluation.bootstrap import Bootstrap, Interval, interval
from sae_lora.evaluation.circuits.files import date_back, places, write_tokenizer, write_transcoder
from sae_lora.evaluation.circuits.prompts import prompts
from sae_lora.evaluation.environments import CIRCUITS
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.models import adapter_files, loading
from sae_lora.records.folder import RunFolder

DEPENDS_ON = ("circuits_prompts", "circuits_max_features", "resamples")
"""The keys of `evaluation` that the suite depends on."""
_CELLS = (Cell.spliced, Cell.student)
_CLASSES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM")
"""The models that circuit-tracer knows with nnsight."""
_SCORES = ("replacement", "completeness", "error_nodes")


@dataclass(frozen=True)
class Graph:
    """Scores of the attribution graph of a prompt, as circuit-tracer defines them."""

    tokens: int
    features: int
    """Number of nodes of the graph that are active latents."""
    replacement: float
    """Share of the influence of tokens on the output that goes through features and not errors."""
    completeness: float
    """Share of the inputs of nodes that are features or tokens and not errors, weighted by the nodes'
    influence on the output."""
    kept_features: int
    """Features in the pruned graph: 80% of the influence of nodes, 98% of that of edges."""
    kept_errors: int
    """Error nodes in the pruned graph."""

    @property
    def error_nodes(self) -> float:
        """Share of error nodes among features and errors of the pruned graph."""
        return self.kept_errors / (self.kept_errors + self.kept_features)


@dataclass(frozen=True)
class Circuits:
    """The suite `circuits`. Means over prompts, with 95% bootstrap intervals over prompts.

    The cells are `spliced`, the plain model with the transcoders before the run, and `student`, the
    adapted model with the transcoders after the run. Errors are what transcoders do not reconstruct.
    """

    version: str
    """Version of circuit-tracer."""
    prompts: list[str]
    graphs: dict[str, list[Graph]]
    """By cell, a graph for each prompt."""
    means: dict[str, dict[str, Interval]]
    """By cell: `replacement`, `completeness` and `error_nodes`."""
    change: dict[str, Interval]
    """student − spliced, by score."""


def check(config: EvaluationConfig, folder: RunFolder) -> None:
    """Check the request before a model is loaded.

    Raises:
        UserError: If there is no environment with circuit-tracer, the prompts cannot be used, or the
            run has no transcoder at every block.
    """
    prompts(config.circuits_prompts, TextSource.stdlib)
    values, model = folder.read_config(), folder.read_summary()["model"]
    used = values["sae"]["used"]
    if model["class"] not in _CLASSES:
        raise UserError(f"circuit-tracer knows {listed(_CLASSES)}, and not {model['class']}")
    reads = {choice.get("reads") for choice in used}
    if [choice["block"] for choice in used] != list(range(model["blocks"])) or None in reads:
        raise UserError(
            "attribution graphs need a transcoder at every block: "
            "sae=transcoder layer=every_nth layer.every=1"
        )
    if len(reads) > 1 or len({choice.get("width") for choice in used}) > 1:
        raise UserError("circuit-tracer needs transcoders of one width that read the same activation")
    maps = Method.linear_adapter.name, Method.mlp_adapter.name
    if values["method"]["kind"] in maps or any(choice.get("adapter") for choice in used):
        raise UserError("circuit-tracer knows transcoders of SAELens, without a map on their output")
    CIRCUITS.python(config.circuits_python)


def score(subject: Subject, config: EvaluationConfig) -> Circuits:
    """Make the graphs in circuit-tracer's environment, in float32.

    Raises:
        UserError: If a prompt has no tokens, or circuit-tracer fails or computes another model.
    """
    texts = prompts(config.circuits_prompts, subject.config.data.source)
    ids = [subject.adapted.tokens_of(text) for text in texts]
    for text, tokens in zip(texts, ids, strict=True):
        if not set(tokens) - set(subject.special_ids):
            raise UserError(f"evaluation.circuits_prompts: {text!r} has no tokens")
    cells = [cell for cell in _CELLS if cell in subject.cells]
    log = subject.folder.evaluation / "circuits.log"
    log.parent.mkdir(exist_ok=True)
    graphs: dict[str, list[Graph]] = {}
    with tempfile.TemporaryDirectory(dir=subject.folder.evaluation) as home:
        for cell in cells:
            folder = Path(home) / cell.value
            _write(subject, cell, ids[0], folder)
            request = places(subject.model, subject.splices_of(cell)) | {
                "prompts": ids,
                "max_features": config.circuits_max_features,
                "device": subject.device.type,
                "tolerance": 0.1 if subject.config.train.dtype is DType.bfloat16 else 1e-3,
            }
            write_atomically(folder / "request.json", as_json(request))
            say(f"  graphs of {len(ids)} prompts, {cell.value}")
            _run(CIRCUITS.python(config.circuits_python), folder, log)
            rows = json.loads((folder / "graphs.json").read_text())
            graphs[cell.value] = [Graph(**row) for row in rows]
            shutil.rmtree(folder)  # of a model of gigabytes
    return _summarised(texts, graphs, config.resamples)


def _summarised(texts: list[str], graphs: dict[str, list[Graph]], resamples: int) -> Circuits:
    bootstrap = Bootstrap(len(texts), resamples)
    ones = torch.ones(len(texts))
    means = {
        cell: {
            name: bootstrap.mean(torch.tensor([getattr(graph, name) for graph in of_cell]), ones)
            for name in _SCORES
        }
        for cell, of_cell in graphs.items()
    }
    before, after = means.get(Cell.spliced.value), means[Cell.student.value]
    return Circuits(
        version=CIRCUITS.version,
        prompts=texts,
        graphs=graphs,
        means={
            cell: {name: interval(mean) for name, mean in of_cell.items()}
            for cell, of_cell in means.items()
        },
        change={}
        if before is None
        else {name: interval(after[name] - before[name]) for name in _SCORES},
    )


def _write(subject: Subject, cell: Cell, tokens: list[int], folder: Path) -> None:
    """Write the model and the transcoders of a cell, and the logits that the model should have."""
    folder.mkdir()
    summary = subject.folder.read_summary()
    base = replace(subject.config.model, commit=summary["model"]["commit"])
    model = loading.load_model(base, DType.float32, torch.device("cpu"))
    whole: Any = model.model
    if cell is Cell.student and subject.adapted.peft is not None:
        adapters: Any = adapter_files.load(model, subject.folder.adapter)
        whole = adapters.merge_and_unload()
    whole.save_pretrained(folder)
    date_back(folder)
    write_tokenizer(subject.adapted.tokenizer, folder)
    for splice in subject.splices_of(cell):
        write_transcoder(splice, folder / f"transcoder_{splice.block}.safetensors")
    with torch.no_grad():
        inputs = torch.tensor([tokens], device=subject.device)
        logits = subject.model_of(cell).model(input_ids=inputs, use_cache=False).logits[0, -1]
    save_file({"logits": logits.float().cpu().contiguous()}, folder / "expected.safetensors")


def _run(python: Path, folder: Path, log: Path) -> None:
    """Make the graphs of a folder in a child process, with its output in a log."""
    command = [str(python), "-m", CIRCUITS.module, str(folder.absolute())]
    with log.open("a") as printed:
        done = subprocess.run(
            command, stdout=printed, stderr=printed, env=CIRCUITS.environment(), check=False
        )
    if done.returncode != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(
            f"circuit-tracer exited with code {done.returncode}; see {log}: {' '.join(last)}"
        )
