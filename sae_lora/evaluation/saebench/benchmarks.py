"""SAEBench's benchmarks, each its own from its data to its score; the model and the SAE are ours."""

# pyright: reportMissingImports=false

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import transformer_lens  # noqa: F401 before sae_bench, whose order of imports it does not bear
from sae_bench.evals.absorption import main as absorption
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.core import main as core
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.sparse_probing import main as sparse_probing
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_lens.training.activations_store import ActivationsStore

from sae_lora.evaluation.saebench.model import Model, Pair

READ_THE_STREAM_ALONE = {"sparse_probing", "scr", "tpp", "absorption"}
"""Benchmarks that know of a model nothing but what its SAE reads."""
_HELD_OUT = "the run's held-out text"
"""What core reads, unless another data set is asked for."""
_RUNS_CODE = {"codeparrot/github-code"}
"""Data sets that come with code of their own, which nothing here runs."""
_CONFIGS = {
    "sparse_probing": SparseProbingEvalConfig,
    "scr": ScrAndTppEvalConfig,
    "tpp": ScrAndTppEvalConfig,
    "absorption": AbsorptionEvalConfig,
}
Options = Mapping[str, Any]
"""What the user asks for, over SAEBench's own settings."""


def check(name: str, options: Options) -> None:
    """Makes sure that a benchmark can be taken, without taking it.

    Raises:
        ValueError: For a setting that it does not have.
        RuntimeError: For a data set that is not here and cannot be fetched.
    """
    if name == "core":
        settings = set(inspect.signature(core.multiple_evals).parameters)
        if unknown := sorted(set(options) - settings):
            raise ValueError(f"core has no setting {unknown[0]}; it has {', '.join(sorted(settings))}")
        wanted = {options[key] for key in ("dataset",) if key in options}
    else:
        wanted = set(getattr(_config(name, options), "dataset_names", ()))
    for one in sorted({one.split("_class_set")[0].removesuffix("_sentiment") for one in wanted}):
        try:
            datasets.load_dataset_builder(one, trust_remote_code=False)
        except ValueError as error:
            if (
                "config name" not in str(error).lower()
            ):  # else it is here; SAEBench says which part of it
                raise
        except Exception as error:
            raise RuntimeError(f"its data set {one} cannot be loaded: {error}") from error


def take(name: str, pair: Pair, options: Options, folder: Path) -> None:
    """Has SAEBench take a benchmark; its results land in `*_eval_results.json` in the folder.

    Args:
        name: The benchmark.
        pair: Of which model and SAE.
        options: As `check` has seen them.
        folder: An empty one.
    """
    _TAKE[name](pair, options, folder)


def _core(pair: Pair, options: Options, folder: Path) -> None:
    tokens, config = pair.subject.tokens, pair.subject.config
    text = datasets.Dataset.from_dict({"tokens": tokens.tolist()})

    def store(model: Any, sae: Any, *, dataset: str, context_size: int, **_: Any) -> ActivationsStore:
        found = text if dataset == _HELD_OUT else dataset
        device = str(pair.subject.device)
        return ActivationsStore.from_sae(model, sae, found, context_size=context_size, device=device)

    sequences, length = tokens.shape
    at_once = min(sequences, max(1, config.train.eval_batch_tokens // length))
    batch = next(one for one in range(at_once, 0, -1) if sequences % one == 0)  # all, and none twice
    settings = {
        "dataset": _HELD_OUT,
        "context_size": length,
        "eval_batch_size_prompts": batch,
        "n_eval_reconstruction_batches": sequences // batch,
        "n_eval_sparsity_variance_batches": sequences // batch,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": pair.splice.keeps,
        "dtype": config.train.dtype.name,
        "device": str(pair.subject.device),
    }
    with _instead(core, HookedTransformer=_giving(pair.model), ActivationsStore=_From(store)):
        core.multiple_evals(
            [(pair.name, pair.sae)], **(settings | dict(options)), output_folder=str(folder)
        )


def _probed(name: str, module: ModuleType, pair: Pair, options: Options, folder: Path) -> None:
    with _instead(module, HookedTransformer=_giving(pair.model)):
        module.run_eval(
            _config(name, options, pair),
            [(pair.name, pair.sae)],
            str(pair.subject.device),
            str(folder),
            save_activations=False,
            artifacts_path=str(folder / "artifacts"),
        )


def _absorption(pair: Pair, options: Options, folder: Path) -> None:
    kept = {"probes_dir": folder / "probes"}
    probing = kept | {"experiment_dir": folder / "probing"}
    absorbed = kept | {
        "experiment_dir": folder / "absorption",
        "sparse_probing_experiment_dir": folder / "probing",
    }
    with (
        contextlib.chdir(folder),
        _instead(
            absorption,
            HookedTransformer=_giving(pair.model),
            # By default what they keep lies in SAEBench's own folder, by the model's name.
            run_k_sparse_probing_experiment=functools.partial(
                absorption.run_k_sparse_probing_experiment, **probing
            ),
            run_feature_absortion_experiment=functools.partial(
                absorption.run_feature_absortion_experiment, **absorbed
            ),
        ),
    ):
        device = str(pair.subject.device)
        config = _config("absorption", options, pair)
        absorption.run_eval(config, [(pair.name, pair.sae)], device, str(folder))


_TAKE: dict[str, Callable[[Pair, Options, Path], None]] = {
    "core": _core,
    "sparse_probing": functools.partial(_probed, "sparse_probing", sparse_probing),
    "scr": functools.partial(_probed, "scr", scr_and_tpp),
    "tpp": functools.partial(_probed, "tpp", scr_and_tpp),
    "absorption": _absorption,
}


def _config(name: str, options: Options, pair: Pair | None = None) -> Any:
    """A benchmark's own config: as asked for, and about the pair that it is to be taken of.

    Raises:
        ValueError: For a setting that it does not have.
    """
    kind: Any = _CONFIGS[name]
    fields = list(kind.__dataclass_fields__)
    for option in options:
        if option not in fields:
            raise ValueError(f"{kind.__name__} has no setting {option}; it has {', '.join(fields)}")
    values: dict[str, Any] = {}
    if pair is not None:
        config = pair.subject.config.train
        values = {"model_name": pair.name, "llm_dtype": config.dtype.name}
        if name != "absorption":  # whose prompts are few at once by SAEBench's own settings
            values["llm_batch_size"] = max(1, config.eval_batch_tokens // 128)
    if "perform_scr" in fields:
        values["perform_scr"] = name == "scr"
    found = kind(**(values | dict(options)))
    if name == "sparse_probing" and "dataset_names" not in options:
        found.dataset_names = [one for one in found.dataset_names if one not in _RUNS_CODE]
    return found


@contextlib.contextmanager
def _instead(module: ModuleType, **others: Any) -> Iterator[None]:
    """Inside the block, the module finds other things under these names."""
    before = {name: getattr(module, name) for name in others}
    try:
        vars(module).update(others)
        yield
    finally:
        vars(module).update(before)


def _giving(model: Model) -> Any:
    """In the place of the class that SAEBench asks for a model by name."""
    return SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)


@dataclass(frozen=True)
class _From:
    """In the place of the class that SAEBench asks for a store of activations."""

    from_sae: Callable[..., ActivationsStore]
