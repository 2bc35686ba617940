"""Export of a finished run into a folder: adapters or the whole model, with a model card."""

import dataclasses
import shutil
from pathlib import Path, PurePath
from typing import Any

import torch
from omegaconf import OmegaConf

from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, check_writable, new_folder, write_atomically
from sae_lora.config.enums import DType
from sae_lora.config.identity import ADAPTING
from sae_lora.config.schema import Config, ModelConfig, as_list
from sae_lora.config.serialize import as_dict, load
from sae_lora.export.model_card import card
from sae_lora.models import adapter_files, loading
from sae_lora.models.language_model import LanguageModel
from sae_lora.records.status import finished

TOLERANCE = 1e-4
"""Largest allowed change of a logit by merging, as a share of the largest logit. Rounding changes far
less."""
_CPU = torch.device("cpu")


def export(run: Path, to: Path, *, merge: bool = False) -> str:
    """Write the folder, complete or not at all, and return a one-line description of it.

    Args:
        run: The run folder, `outputs/<sweep>/<run>`.
        to: A new or an empty folder.
        merge: True: write the whole model in float32, with the adapters merged into its weights.

    Raises:
        UserError: If the run is not finished, the folder cannot be written, a file of the run is
            missing, or the merged model differs from the model with the adapters.
    """
    folder, to = finished(run), to.expanduser().absolute()
    config = load(folder.config.read_text())
    if config.method.kind not in ADAPTING:
        file_format = "in sae-lens's format" if folder.sae.exists() else "as safetensors"
        result = folder.sae if folder.sae.exists() else folder.output_adapter
        raise UserError(f"{run} has no LoRA adapters to export; its result is {result}, {file_format}")
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"--to: {to} exists and is not an empty folder; choose another folder")
    check_writable(to.parent, "--to")
    loading.silence_transformers()
    summary = _public_summary(folder.read_summary())
    base = dataclasses.replace(config.model, commit=summary["model"]["commit"])
    values = _public_config(dataclasses.replace(config, model=base))
    try:
        with new_folder(to) as new:
            if merge:
                model = loading.load_model(base, DType.float32, _CPU)
                difference = write_merged(model, folder.adapter, new)
                loading.load_tokenizer(base).save_pretrained(new)
                content = (
                    f"the merged model; no logit differs by more than {difference:.1e} of the largest"
                )
            else:
                name = None if base.commit is None else base.name
                adapter_files.republish(folder.adapter, new, name, base.commit)
                content = "the adapters"
            write_atomically(new / "config.yaml", OmegaConf.to_yaml(values))
            write_atomically(new / "summary.json", as_json(summary))
            shutil.copyfile(folder.curve, new / "curve.jsonl")
            shapes = loading.load_shapes(base)
            modules = [shapes.name_at(sae["hookpoint"]) for sae in summary["sae"]]
            write_atomically(new / "README.md", card(values, summary, modules, merged=merge))
    except OSError as error:
        raise UserError(f"cannot export {run} to {to}: {error}") from error
    return f"{content}: {to}"


def write_merged(model: LanguageModel, adapter: Path, to: Path) -> float:
    """Write the model with adapters merged into its weights, and check the written model.

    Args:
        model: The plain model in float32; it is changed in place.
        adapter: The folder of the adapters.
        to: The folder to write into.

    Returns:
        The largest difference of a logit between the merged model and the model with separate adapters,
        as a share of the largest logit.

    Raises:
        UserError: If the difference is larger than `TOLERANCE`.
    """
    length = min(64, getattr(model.config, "max_position_embeddings", 64))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    adapters = adapter_files.load(model, adapter)
    with torch.no_grad():
        separate = adapters(input_ids=tokens, use_cache=False).logits
        adapters.merge_and_unload().save_pretrained(to)  # pyright: ignore[reportCallIssue]
        reloaded = loading.load_model(ModelConfig(name=str(to)), DType.float32, _CPU)
        merged = reloaded.model(input_ids=tokens, use_cache=False).logits
    difference = float((merged - separate).abs().max() / separate.abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"the merged model is not equal to the model with adapters: a logit differs by "
            f"{difference:.1e} of the largest logit, more than {TOLERANCE:.0e}; nothing was written"
        )
    return difference


def _public_config(config: Config) -> dict[str, Any]:
    """The config as plain values, without details of the user's machine and accounts.

    `launcher`, `tracking` and output folders are left out; other paths are cut to their last part.
    """
    values = as_dict(config)
    for name in ("launcher", "tracking", "output_dir"):
        del values[name]
    del values["data"]["cache_dir"]
    if config.data.files is not None:
        values["data"]["files"] = [_last_part(path) for path in as_list(config.data.files)]
    values["model"]["name"] = _public_name(config.model.name, config.model.commit)
    for entry in (values["sae"], *values["sae"]["used"]):
        entry["path"] = _last_part(entry["path"])
    return values


def _public_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary without host, visible GPUs, and the address of the W&B run."""
    model, environment = summary["model"], summary["environment"]
    return summary | {
        "model": model | {"name": _public_name(model["name"], model["commit"])},
        "sae": [sae | {"path": _last_part(sae["path"])} for sae in summary["sae"]],
        "environment": {
            key: value for key, value in environment.items() if key not in ("host", "visible_gpus")
        },
        "tracked_at": None,
    }


def _public_name(name: str, commit: str | None) -> str:
    """The name of a repository, or the last part of a local path."""
    return name if commit is not None else str(_last_part(name))


def _last_part(path: str | None) -> str | None:
    return None if path is None else PurePath(path).name
