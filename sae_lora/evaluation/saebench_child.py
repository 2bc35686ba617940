"""SAEBench on a run's models and SAEs: `python -m sae_lora.evaluation.saebench_child <request.json>`.

Runs in the environment that has SAEBench (`saebench_environment.py`). Each benchmark is SAEBench's own,
from its data to its score; in the place of the model that it would load it is given the run's, and
in the place of an SAE from a registry the run's. Without a request it only makes sure that all can be
imported.
"""

# pyright: reportMissingImports=false

import contextlib
import copy
import functools
import inspect
import json
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
import transformer_lens  # noqa: F401 before sae_bench, whose order of imports it does not bear
from sae_bench.evals.absorption import main as absorption
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.core import main as core
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.sparse_probing import main as sparse_probing
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.files import write_atomically
from sae_lora.models import LanguageModel
from sae_lora.records import RunFolder
from sae_lora.splice import Splice

HELD_OUT = "the run's held-out text"
"""What core reads, unless another data set is asked for."""
_RUNS_CODE = {"codeparrot/github-code"}
"""Data sets that come with code of their own, which nothing here runs unless they are asked for."""


@dataclass(frozen=True)
class _Task:
    """A benchmark of one model and SAE.

    Args:
        model: The model.
        sae: A copy of the SAE, with all in its config that SAEBench looks for.
        splice: The SAE at its place.
        subject: The run.
        options: What the user asks for, over SAEBench's own settings.
        folder: An empty one for whatever is written.
    """

    model: "_Model"
    sae: Any
    splice: Splice
    subject: Subject
    options: Mapping[str, Any]
    folder: Path

    @property
    def shared(self) -> dict[str, Any]:
        """Settings that every benchmark has."""
        config = self.subject.config
        return {
            "model_name": self.model.cfg.model_name,
            "llm_dtype": config.train.dtype.name,
            "llm_batch_size": max(1, config.train.eval_batch_tokens // 128),
        }

    @property
    def chosen(self) -> list[tuple[str, Any]]:
        """The SAE as SAEBench's commands take it."""
        return [(self.model.cfg.model_name, self.sae)]

    @property
    def device(self) -> str:
        """Where both are."""
        return str(self.subject.device)


class _Model(HookedProxyLM):
    """A transformers model as SAEBench knows them, which is as TransformerLens has them: with one hook.

    Args:
        model: With or without adapters.
        tokenizer: The model's; changed.
        hookpoint: Where the SAE sits.
        name: What SAEBench is to call it.
    """

    def __init__(self, model: LanguageModel, tokenizer: Any, hookpoint: str, name: str) -> None:
        module = model.name_at(hookpoint)
        super().__init__(model.model, tokenizer, hook_names=[module])
        point = self.hook_dict.pop(module)
        point.name = hookpoint
        self.hook_dict = {hookpoint: point}
        self.mod_dict = {hookpoint: point}
        self.named_modules_dict = {hookpoint: self.named_modules_dict[module]}
        self.hookpoint = hookpoint
        self.cfg = SimpleNamespace(
            model_name=name, d_model=model.config.hidden_size, device=str(model.device)
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"

    def run_with_cache(self, *given: Any, **named: Any) -> Any:
        """Also of texts."""
        return super(HookedProxyLM, self).run_with_cache(*given, **named)

    def forward(self, tokens: Tensor | str | list[str], *given: Any, **named: Any) -> Any:
        """As a HookedTransformer's; where it is to stop behind a block, it stops behind the hook."""
        if not isinstance(tokens, Tensor):
            tokens = self.to_tokens(tokens)
        stops = named.get("stop_at_layer") is not None
        named["_names_filter"] = [self.hookpoint] if stops else None
        return super().forward(tokens.to(self.cfg.device), *given, **named)

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = True,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Tensor:
        """`[text, pos]`, each behind a BOS unless that is not wanted."""
        texts = [input] if isinstance(input, str) else input
        found = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        tokens = found["input_ids"].long()
        bos: Any = self.tokenizer.bos_token_id
        if prepend_bos is not False and bos is not None:
            tokens = torch.cat([torch.full_like(tokens[:, :1], bos), tokens], dim=1)
        return tokens.to(self.cfg.device) if move_to_device else tokens


def _core(task: _Task) -> None:
    text = datasets.Dataset.from_dict({"tokens": task.subject.tokens.tolist()})

    def store(model: Any, sae: Any, *, dataset: str, context_size: int, **_: Any) -> ActivationsStore:
        return ActivationsStore.from_sae(
            model,
            sae,
            dataset=text if dataset == HELD_OUT else dataset,
            context_size=context_size,
            device=task.device,
        )

    sequences, length = task.subject.tokens.shape
    largest = max(1, task.subject.config.train.eval_batch_tokens // length)
    batch = next(one for one in range(min(largest, sequences), 0, -1) if sequences % one == 0)
    settings = {
        "dataset": HELD_OUT,
        "context_size": length,
        "eval_batch_size_prompts": batch,
        "n_eval_reconstruction_batches": sequences // batch,
        "n_eval_sparsity_variance_batches": sequences // batch,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": task.splice.keeps,
    } | dict(task.options)
    with _instead(core, HookedTransformer=_giving(task.model), ActivationsStore=_From(store)):
        core.multiple_evals(
            task.chosen,
            **settings,
            dtype=task.shared["llm_dtype"],
            device=task.device,
            output_folder=str(task.folder),
            force_rerun=True,
        )


def _sparse_probing(task: _Task) -> None:
    config = _config(SparseProbingEvalConfig, task.shared | dict(task.options))
    if "dataset_names" not in task.options:
        config.dataset_names = [one for one in config.dataset_names if one not in _RUNS_CODE]
    _probed(sparse_probing, config, task)


def _scr_or_tpp(task: _Task, *, scr: bool) -> None:
    config = _config(ScrAndTppEvalConfig, task.shared | dict(task.options) | {"perform_scr": scr})
    _probed(scr_and_tpp, config, task)


def _probed(module: ModuleType, config: Any, task: _Task) -> None:
    with _instead(module, HookedTransformer=_giving(task.model)):
        module.run_eval(
            config,
            task.chosen,
            task.device,
            str(task.folder),
            force_rerun=True,
            save_activations=False,
            artifacts_path=str(task.folder / "artifacts"),
        )


def _absorption(task: _Task) -> None:
    config = _config(AbsorptionEvalConfig, task.shared | {"llm_batch_size": 10} | dict(task.options))
    kept = task.folder / "artifacts"
    folders = {"probes_dir": kept / "probes"}
    probing = {**folders, "experiment_dir": kept / "probing"}
    absorbed = {
        **folders,
        "experiment_dir": kept / "absorption",
        "sparse_probing_experiment_dir": kept / "probing",
    }
    with (
        contextlib.chdir(task.folder),
        _instead(
            absorption,
            HookedTransformer=_giving(task.model),
            # By default what they keep lies in SAEBench's own folder, by the model's name.
            run_k_sparse_probing_experiment=functools.partial(
                absorption.run_k_sparse_probing_experiment, **probing
            ),
            run_feature_absortion_experiment=functools.partial(
                absorption.run_feature_absortion_experiment, **absorbed
            ),
        ),
    ):
        absorption.run_eval(config, task.chosen, task.device, str(task.folder), force_rerun=True)


_BENCHMARKS: dict[str, Callable[[_Task], None]] = {
    "core": _core,
    "sparse_probing": _sparse_probing,
    "scr": functools.partial(_scr_or_tpp, scr=True),
    "tpp": functools.partial(_scr_or_tpp, scr=False),
    "absorption": _absorption,
}
_CONFIGS = {
    "sparse_probing": SparseProbingEvalConfig,
    "scr": ScrAndTppEvalConfig,
    "tpp": ScrAndTppEvalConfig,
    "absorption": AbsorptionEvalConfig,
}
_READ_THE_STREAM_ALONE = {"sparse_probing", "scr", "tpp", "absorption"}
"""Benchmarks that know of a model nothing but what its SAE reads."""


def evaluate(request: Mapping[str, Any]) -> None:
    """Takes what is not there yet, and says on standard output what it is at.

    What of a benchmark fails is told in `failed.json`, and the others go on.

    Args:
        request: `run`, `device`, `benchmarks`, `options`, and `to`, the folder for SAEBench's own
            results, `<benchmark> <cell> <hookpoint>.json`.
    """
    to = Path(request["to"])
    subject = Subject(RunFolder(Path(request["run"])), request["device"])
    failed: dict[str, str] = {}
    for hookpoint in [splice.hookpoint for splice in subject.after]:
        tasks = dict(_tasks(subject, hookpoint, request["options"]))
        same = _is_the_same(tasks)
        for benchmark in request["benchmarks"]:
            files = {cell: to / f"{benchmark} {cell} {hookpoint}.json" for cell in tasks}
            once = same and benchmark in _READ_THE_STREAM_ALONE
            for cell in list(tasks)[: 1 if once else None]:
                if files[cell].exists():
                    continue
                print(f"  {benchmark}, {cell}, {hookpoint}", flush=True)
                try:
                    write_atomically(files[cell], _result(benchmark, tasks[cell], to))
                except Exception as error:  # whatever goes wrong inside of it
                    failed[f"{benchmark}, {cell}, {hookpoint}"] = _said(error)
            first, *others = files.values()
            for file in others if once and first.exists() else ():
                write_atomically(file, first.read_text())
    write_atomically(to / "failed.json", json.dumps(failed))


def check(request: Mapping[str, Any]) -> dict[str, str]:
    """What stands against benchmarks, by name: settings that they do not have, or data that is not here.

    Args:
        request: `benchmarks` and `options`.
    """
    lacking = {}
    for name in request["benchmarks"]:
        try:
            _check(name, request["options"].get(name, {}))
        except Exception as error:  # of the hub, of a data set, of a setting
            lacking[name] = _said(error)
    return lacking


def _check(name: str, options: Mapping[str, Any]) -> None:
    if name not in _CONFIGS:
        unknown = sorted(set(options) - set(inspect.signature(core.multiple_evals).parameters))
        if unknown:
            raise ValueError(f"core has no setting {unknown[0]}")
        wanted = {options.get("dataset", HELD_OUT)} - {HELD_OUT}
    else:
        config = _config(_CONFIGS[name], options)
        chosen = getattr(config, "dataset_names", [])
        wanted = set(chosen) if "dataset_names" in options else set(chosen) - _RUNS_CODE
    for one in sorted({one.split("_class_set")[0].removesuffix("_sentiment") for one in wanted}):
        try:
            datasets.load_dataset_builder(one)
        except ValueError as error:
            if "config name" not in str(error).lower():  # else it is here, and SAEBench names the part
                raise
        except Exception as error:
            raise RuntimeError(f"its data set {one} cannot be loaded: {_said(error)}") from error


def _config(of: type, values: Mapping[str, Any]) -> Any:
    """One of SAEBench's own configs."""
    fields: Any = vars(of)["__dataclass_fields__"]
    for name in values:
        if name not in fields:
            raise ValueError(f"{of.__name__} has no setting {name}; it has {', '.join(fields)}")
    return of(**values)


def _tasks(
    subject: Subject, hookpoint: str, options: Mapping[str, Any]
) -> Iterator[tuple[Cell, Callable[[str, Path], _Task]]]:
    """The plain model with the SAE as it was, and the adapted one with the SAE as the run left it."""
    for cell in (Cell.spliced, Cell.student):
        found = [one for one in subject.splices_of(cell) if one.hookpoint == hookpoint]
        if not found:
            continue
        (splice,) = found
        name = f"{subject.folder.path.name}-{cell}"
        tokenizer = copy.deepcopy(subject.adapted.tokenizer)
        model = _Model(subject.model_of(cell), tokenizer, hookpoint, name)
        sae = _described(splice, name, subject.tokens.shape[1])

        def task(
            benchmark: str, folder: Path, model: _Model = model, sae: Any = sae, splice: Splice = splice
        ) -> _Task:
            return _Task(model, sae, splice, subject, options.get(benchmark, {}), folder)

        yield cell, task


def _described(splice: Splice, model_name: str, context_size: int) -> Any:
    """A copy of the SAE, its config filled in, its decoder's rows of length 1 as SAEBench has them."""
    sae: Any = copy.deepcopy(getattr(splice.sae, "sae", splice.sae))
    with contextlib.suppress(NotImplementedError):
        sae.fold_W_dec_norm()
    about = sae.cfg.metadata
    about.model_name = model_name
    about.hook_name = splice.hookpoint
    about.hook_layer = splice.block
    about.hook_head_index = None
    about.context_size = context_size
    about.prepend_bos = True
    about.dataset_trust_remote_code = False
    about.model_from_pretrained_kwargs = {}
    return sae


@torch.no_grad()
def _is_the_same(tasks: Mapping[Cell, Callable[[str, Path], _Task]]) -> bool:
    """Whether the run has changed neither the SAE nor what it reads: then both cells score the same."""
    if len(tasks) < 2:
        return False
    before, after = (make("", Path()) for make in tasks.values())
    if before.splice.sae is not after.splice.sae:
        return False
    tokens = before.subject.tokens[:2]
    hook = before.model.hookpoint
    first, second = (
        one.model.run_with_cache(tokens, names_filter=[hook], stop_at_layer=one.splice.block + 1)[1][
            hook
        ]
        for one in (before, after)
    )
    return torch.equal(first, second)


def _result(benchmark: str, task: Callable[[str, Path], _Task], to: Path) -> str:
    """SAEBench's own file of results, as text."""
    folder = to / "scratch"
    with _emptied(folder), (to / "saebench.log").open("a") as log:
        made = task(benchmark, folder)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 what SAEBench draws from
        torch.manual_seed(0)
        torch.set_grad_enabled(True)
        log.write(f"\n{benchmark}, {made.model.cfg.model_name}, {made.model.hookpoint}\n")
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            _BENCHMARKS[benchmark](made)
        results = list(folder.rglob("*_eval_results.json"))
        if len(results) != 1:
            raise RuntimeError(f"SAEBench gives no result, and says why in {log.name}")
        return results[0].read_text()


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """The folder, empty before and gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _instead(module: ModuleType, **others: Any) -> Iterator[None]:
    """Inside the block, the module finds other things under these names."""
    before = {name: getattr(module, name) for name in others}
    try:
        for name, other in others.items():
            setattr(module, name, other)
        yield
    finally:
        for name, one in before.items():
            setattr(module, name, one)


def _giving(model: _Model) -> Any:
    """In the place of the class that SAEBench asks for a model by name."""
    return SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)


@dataclass(frozen=True)
class _From:
    """In the place of the class that SAEBench asks for a store of activations."""

    from_sae: Callable[..., ActivationsStore]


def _said(error: Exception) -> str:
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def main(arguments: list[str]) -> None:
    """Does what the request says; without one, nothing."""
    if not arguments:
        return
    request = json.loads(Path(arguments[0]).read_text())
    if "run" in request:
        evaluate(request)
    else:
        print(json.dumps(check(request)))


if __name__ == "__main__":
    main(sys.argv[1:])
