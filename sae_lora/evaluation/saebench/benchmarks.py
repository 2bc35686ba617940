"""SAEBench's benchmarks, with its data and scores, on our models and SAEs."""

# pyright: reportMissingImports=false

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import transformer_lens  # noqa: F401 must be imported before sae_bench
from sae_bench.evals.absorption import main as absorption
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.core import main as core
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.sparse_probing import main as sparse_probing
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_lens.training.activations_store import ActivationsStore

from sae_lora.evaluation.saebench.model import Model, Pair

NEED_ONLY_ACTIVATIONS = {"sparse_probing", "scr", "tpp", "absorption"}
"""Benchmarks that use only the input of the SAE and not the model's predictions."""
_HELD_OUT = "the run's held-out text"
"""Default data set of core."""
_RUNS_CODE = {"codeparrot/github-code"}
"""Data sets that need their own code, which is never run here."""
_CONFIGS = {
    "sparse_probing": SparseProbingEvalConfig,
    "scr": ScrAndTppEvalConfig,
    "tpp": ScrAndTppEvalConfig,
    "absorption": AbsorptionEvalConfig,
}
Options = Mapping[str, Any]
"""Settings of the user, which replace SAEBench's defaults."""


def check(name: str, options: Options) -> None:
    """Check that a benchmark can run.

    Raises:
        ValueError: For a setting that the benchmark does not have.
        RuntimeError: For a data set that cannot be fetched.
    """
    if name == "core":
        settings = set(inspect.signature(core.multiple_evals).parameters)
        if unknown := sorted(set(options) - settings):
            raise ValueError(f"core has no setting {unknown[0]}; it has {', '.join(sorted(settings))}")
        data_sets = {options["dataset"]} if "dataset" in options else set()
    else:
        data_sets = set(getattr(_config(name, options), "dataset_names", ()))
    for dataset in sorted(
        {name.split("_class_set")[0].removesuffix("_sentiment") for name in data_sets}
    ):
        try:
            datasets.load_dataset_builder(dataset, trust_remote_code=False)
        except ValueError as error:
            # If only the name of its part is missing, the data set exists; SAEBench gives that name.
            if "config name" not in str(error).lower():
                raise
        except Exception as error:
            raise RuntimeError(f"the data set {dataset} cannot be loaded: {error}") from error


def _core(pair: Pair, options: Options, folder: Path) -> None:
    tokens, config = pair.subject.tokens, pair.subject.config
    text = datasets.Dataset.from_dict({"tokens": tokens.tolist()})

    def store(model: Any, sae: Any, *, dataset: str, context_size: int, **_: Any) -> ActivationsStore:
        source = text if dataset == _HELD_OUT else dataset
        device = str(pair.subject.device)
        return ActivationsStore.from_sae(model, sae, source, context_size=context_size, device=device)

    sequences, length = tokens.shape
    at_once = min(sequences, max(1, config.train.eval_batch_tokens // length))
    # The largest batch that divides the sequences, so that all are read once.
    batch = next(size for size in range(at_once, 0, -1) if sequences % size == 0)
    settings = {
        "dataset": _HELD_OUT,
        "context_size": length,
        "eval_batch_size_prompts": batch,
        "n_eval_reconstruction_batches": sequences // batch,
        "n_eval_sparsity_variance_batches": sequences // batch,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": bool(pair.splice.special.ids),
        "dtype": config.train.dtype.name,
        "device": str(pair.subject.device),
    }
    stores = SimpleNamespace(from_sae=store)
    with mock.patch.multiple(core, HookedTransformer=_stand_in(pair.model), ActivationsStore=stores):
        core.multiple_evals(
            [(pair.name, pair.sae)], **(settings | dict(options)), output_folder=str(folder)
        )


def _probed(name: str, module: ModuleType, pair: Pair, options: Options, folder: Path) -> None:
    with mock.patch.multiple(module, HookedTransformer=_stand_in(pair.model)):
        module.run_eval(
            _config(name, options, pair),
            [(pair.name, pair.sae)],
            str(pair.subject.device),
            str(folder),
            save_activations=False,
            artifacts_path=str(folder / "artifacts"),
        )


def _absorption(pair: Pair, options: Options, folder: Path) -> None:
    # By default both functions write into SAEBench's own folder, under the model's name.
    probing = functools.partial(
        absorption.run_k_sparse_probing_experiment,
        probes_dir=folder / "probes",
        experiment_dir=folder / "probing",
    )
    absorbing = functools.partial(
        absorption.run_feature_absortion_experiment,
        probes_dir=folder / "probes",
        experiment_dir=folder / "absorption",
        sparse_probing_experiment_dir=folder / "probing",
    )
    with (
        contextlib.chdir(folder),
        mock.patch.multiple(
            absorption,
            HookedTransformer=_stand_in(pair.model),
            run_k_sparse_probing_experiment=probing,
            run_feature_absortion_experiment=absorbing,
        ),
    ):
        device = str(pair.subject.device)
        config = _config("absorption", options, pair)
        absorption.run_eval(config, [(pair.name, pair.sae)], device, str(folder))


RUN: dict[str, Callable[[Pair, Options, Path], None]] = {
    "core": _core,
    "sparse_probing": functools.partial(_probed, "sparse_probing", sparse_probing),
    "scr": functools.partial(_probed, "scr", scr_and_tpp),
    "tpp": functools.partial(_probed, "tpp", scr_and_tpp),
    "absorption": _absorption,
}
"""Functions that run a benchmark and write `*_eval_results.json` into an empty folder."""


def _config(name: str, options: Options, pair: Pair | None = None) -> Any:
    """A benchmark's own config, with the user's settings and those of the pair."""
    kind: Any = _CONFIGS[name]
    fields = list(kind.__dataclass_fields__)
    for option in options:
        if option not in fields:
            raise ValueError(f"{kind.__name__} has no setting {option}; it has {', '.join(fields)}")
    values: dict[str, Any] = {}
    if pair is not None:
        train = pair.subject.config.train
        values = {"model_name": pair.name, "llm_dtype": train.dtype.name}
        if name != "absorption":  # SAEBench has its own small batches for it
            values["llm_batch_size"] = max(1, train.eval_batch_tokens // 128)
    if "perform_scr" in fields:
        values["perform_scr"] = name == "scr"
    config = kind(**(values | dict(options)))
    if name == "sparse_probing" and "dataset_names" not in options:
        config.dataset_names = [data for data in config.dataset_names if data not in _RUNS_CODE]
    return config


def _stand_in(model: Model) -> Any:
    """A stand-in for HookedTransformer, which SAEBench asks for a model by name."""
    return SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)
