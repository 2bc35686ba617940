"""Export of a finished run into a folder that stands alone: trained weights, SAEs and a model card."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError

from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, check_writable, new_folder, sha256, write_atomically
from sae_lora.config.enums import DType, TextSource
from sae_lora.config.identity import ADAPTING, TRAINING_SAES
from sae_lora.config.schema import Adapters, Config, DataConfig, ModelConfig, SAEConfig, as_list
from sae_lora.config.serialize import load
from sae_lora.data import corpus
from sae_lora.export.model_card import card
from sae_lora.export.public import (
    BASE_MODEL,
    is_local,
    last_part,
    public,
    public_config,
    public_summary,
)
from sae_lora.models import adapter_files, loading
from sae_lora.models.dimensions import EMBEDDED_NAME, read_dimensions
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.records.folder import MODEL_CARD, RunFolder
from sae_lora.records.status import with_weights
from sae_lora.saes import output_adapter
from sae_lora.saes.from_run import check_as_planned, trained_saes
from sae_lora.saes.loading import write_copy
from sae_lora.splice.mlp_input import code_of_reading, module_read

TOLERANCE = 1e-4
"""Largest allowed change of a logit by merging, as a share of the largest logit. Rounding changes far
less."""
_PROMPT_TOKENS = 12
_CPU = torch.device("cpu")


def export(run: Path, to: Path, *, merge: bool = False) -> str:
    """Write the folder, complete or not at all, and return a one-line description of it.

    The folder is laid out like a run folder, with the adapters at its top, where peft looks for them. It
    holds everything that the student needs and that is neither on the hub nor in this package, but for
    the base model: trained weights, and SAEs that are only on this machine.

    Args:
        run: The run folder, `outputs/<sweep>/<run>`.
        to: A new or an empty folder.
        merge: True: write the whole model in float32, with the adapters merged into its weights.

    Raises:
        UserError: If the run is not finished, the folder cannot be written, a file of the run or of an
            SAE is missing, or the merged model differs from the model with the adapters.
    """
    folder, to = with_weights(run), to.expanduser().absolute()
    config = load(folder.config.read_text())
    if merge and config.method.kind not in ADAPTING:
        raise UserError(
            f"--merge: {run} has no LoRA adapters: it is of method={config.method.kind.name}"
        )
    if folder.path.absolute().parent in to.parents:
        raise UserError(f"--to: {to} lies among the runs of a sweep; choose a folder elsewhere")
    try:
        is_free = not to.exists() or (to.is_dir() and not any(to.iterdir()))
    except OSError as error:
        raise UserError(f"--to: {to} cannot be used: {error.strerror}") from error
    if not is_free:
        raise UserError(f"--to: {to} exists and is not an empty folder; choose another folder")
    check_writable(to.parent, "--to")
    loading.silence_transformers()
    summary = folder.read_summary()
    base = replace(config.model, commit=summary["model"]["commit"])
    try:
        with new_folder(to) as new:
            content = _write_weights(folder, config, base, new, merge=merge)
            sae, saes = _write_saes(config, folder, summary["sae"], new)
            values = public_config(replace(config, model=base), sae)
            summary = public_summary(summary, base, saes)
            write_atomically(new / "config.yaml", OmegaConf.to_yaml(values))
            write_atomically(new / "summary.json", as_json(summary))
            shutil.copyfile(folder.curve, new / "curve.jsonl")
            shapes = loading.load_shapes(base)
            modules = [shapes.name_at(sae["hookpoint"]) for sae in summary["sae"]]
            folders = {
                module: sae["adapter"]
                for module, sae in zip(modules, saes, strict=True)
                if sae.get("adapter") is not None
            }
            reads = {
                module: (
                    shapes.name_of(module_read(shapes, choice.block, choice.reads)),
                    code_of_reading(shapes, choice.block, choice.reads),
                )
                for module, choice in zip(modules, config.sae.used, strict=True)
                if choice.reads is not None
            }
            text = card(
                values,
                summary,
                modules,
                reads,
                _prompt(config, summary, base),
                {module: f"{path}/{output_adapter.WEIGHTS}" for module, path in folders.items()},
                next((output_adapter.code(new / path) for path in folders.values()), ""),
                merged=merge,
            )
            write_atomically(new / MODEL_CARD, text)
    except (OSError, SafetensorError) as error:  # a full disk, for example
        raise UserError(f"cannot export {run} to {to}: {error}") from error
    return f"{content}: {to}"


def _write_weights(
    folder: RunFolder, config: Config, base: ModelConfig, to: Path, *, merge: bool
) -> str:
    """Write the adapters or the merged model, if the run has adapters; describe the export in words."""
    if config.method.kind not in ADAPTING:
        return "the SAEs" if config.method.kind in TRAINING_SAES else "the maps on the output of SAEs"
    if merge:
        model = loading.load_model(base, DType.float32, _CPU)
        difference = write_merged(model, folder.adapter, to)
        loading.load_tokenizer(base).save_pretrained(to)
        return f"the merged model; no logit differs by more than {difference:.1e} of the largest"
    name = BASE_MODEL if is_local(base) else base.name
    adapter_files.republish(folder.adapter, to, None if name == EMBEDDED_NAME else name, base.commit)
    return "the adapters and the SAEs" if config.method.kind in TRAINING_SAES else "the adapters"


def _write_saes(
    config: Config, folder: RunFolder, descriptions: list[dict[str, Any]], to: Path
) -> tuple[SAEConfig, list[dict[str, Any]]]:
    """Write the student's SAEs that are only on this machine, and the trained maps on their output.

    Args:
        config, folder: The run.
        descriptions: Its SAEs, from its summary.
        to: The folder to write into: `sae/<hookpoint>/` and `output_adapter/<hookpoint>/`.

    Returns:
        The SAEs for the exported config, and for the exported summary, with paths in the export.
    """
    trained = trained_saes(config, folder, read_dimensions(config.model))
    used, described, digests = [], [], {}
    for choice, description in zip(trained.used, descriptions, strict=True):
        hookpoint = str(Place.of(choice))
        if choice.path is not None:
            # An SAE that several blocks share is saved under the first of them.
            first = replace(choice, block=min([choice.block, *choice.group]))
            path = f"sae/{Place.of(first)}"
            if path not in digests:
                digests[path] = write_copy(trained, first, to / path)
                cfg = to / path / "cfg.json"
                values = public(json.loads(cfg.read_text()), config.model)
                write_atomically(cfg, as_json(values))
            choice = replace(choice, path=path, sha256=sha256(to / path / "sae_weights.safetensors"))
            description = description | {"path": path, "sha256": digests[path]}
        if choice.adapter is not None:
            check_as_planned(choice.adapter)
            path = f"output_adapter/{hookpoint}"
            shutil.copytree(choice.adapter.path, to / path)
            choice = replace(choice, adapter=Adapters(path, choice.adapter.sha256))
            description = description | {"adapter": path}
        used.append(choice)
        described.append(description)
    if config.method.kind in TRAINING_SAES:  # the config keeps the SAEs that the run began with
        return replace(config.sae, path=last_part(config.sae.path)), described
    path = trained.path
    if isinstance(path, list):
        path = [choice.path for choice in used]
    elif path is not None:
        path = f"sae/blocks.{{block}}.hook_{used[0].hook.name}"
    return replace(trained, path=path, used=used), described


def _prompt(config: Config, summary: dict[str, Any], base: ModelConfig) -> str:
    """A text to continue, of the kind that the run was trained on: the beginning of held-out text.

    Words of the user's own files are not published; for them, and without the cache, it is any text.
    """
    data = config.data
    if data.source is not TextSource.text_files:
        tokens = corpus.first_held_out(data, str(summary["data"].get("corpus")))
        tokenizer = loading.load_tokenizer(base)
        text = tokenizer.decode(tokens[:_PROMPT_TOKENS], skip_special_tokens=True)
        # The last character may lack some of its bytes; three ticks would end the code on the card.
        text = str(text).rstrip("\ufffd").partition("```")[0].strip()
        if text:
            return text
    return "import os" if _is_python(data) else "Once upon a time"


def _is_python(data: DataConfig) -> bool:
    """True if the text is Python code."""
    if data.source is TextSource.stdlib:
        return True
    return data.files is not None and all(str(path).endswith(".py") for path in as_list(data.files))


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
