"""The model card of an exported run, from the template `model_card.md.jinja`. Imports no torch."""

from collections.abc import Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from sae_lora.models.dimensions import EMBEDDED_NAME
from sae_lora.records.metrics import METRICS

_NUMBERS = (
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "initial_kl", "kl"),
    *("top1_agreement", "fvu", "fvu_without_outliers", "l0", "trainable_parameters", "train_tokens"),
)


def card(
    config: dict[str, Any], summary: dict[str, Any], modules: Sequence[str], *, merged: bool
) -> str:
    """Write the card as Markdown, with metadata for the hub and code that works without `sae_lora`.

    Args:
        config: The run's config, as plain values that may be published.
        summary: The run's summary, as plain values that may be published.
        modules: Dotted paths of the modules in the transformers model whose outputs the SAEs replace.
        merged: True if the folder contains the whole model, with merged adapters.
    """
    model = summary["model"]
    is_embedded = model["name"] == EMBEDDED_NAME
    saes = {
        module: _loading_code(sae)
        for module, sae in zip(modules, summary["sae"], strict=True)
        if sae["family"] != "identity"
    }
    revision = f', revision="{model["commit"]}"' if model["commit"] is not None else ""
    has_local_model = not (is_embedded or merged) and model["commit"] is None
    prefix = "local + " if has_local_model else ""
    templates = Environment(
        loader=PackageLoader("sae_lora.export.model_card", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["in_words"] = _sae_in_words
    return templates.get_template("model_card.md.jinja").render(
        config=config,
        summary=summary,
        merged=merged,
        metadata=yaml.safe_dump(_metadata(summary, merged), sort_keys=False),
        model=_model_in_words(model),
        places=_spliced_outputs(summary["sae"]),
        text=_text_in_words(summary),
        numbers=[
            (METRICS[key], METRICS[key].written(summary[key], digits=4))
            for key in _NUMBERS
            if key in summary  # summaries of older versions have fewer
        ],
        saes=saes,
        embedded=[
            *(["MODEL"] if is_embedded and not merged else []),
            *(["SAES"] if any("SAES" in code for code in saes.values()) else []),
        ],
        pretrained=("MODEL" if is_embedded else f'{prefix}"{model["name"]}"') + revision,
        has_local_parts=has_local_model
        or any(sae["release"] is None and sae["path"] is not None for sae in summary["sae"]),
        # If the run rounded weights to bfloat16 and computed in float32, the code does the same.
        dtype="bfloat16"
        if "bfloat16" in (config["model"]["dtype"], config["train"]["dtype"])
        else "float32",
    )


def _metadata(summary: dict[str, Any], merged: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if summary["model"]["commit"] is not None:  # a model from the hub
        metadata |= {
            "base_model": summary["model"]["name"],
            "base_model_relation": "finetune" if merged else "adapter",
        }
    if summary["data"]["source"] == "hub":
        metadata["datasets"] = [summary["data"]["name"]]
    return metadata | {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sparse-autoencoder", "sae_lora"],
    }


def _model_in_words(model: dict[str, Any]) -> str:
    if model["name"] == EMBEDDED_NAME:
        return "the model in the package `sae_lora`"
    source = f" at commit `{model['commit']}`" if model["commit"] is not None else " (a local folder)"
    return f"`{model['name']}`{source}"


def _spliced_outputs(saes: Sequence[dict[str, Any]]) -> str:
    words = {
        "hook_resid_post": "its residual stream",
        "hook_attn_out": "its attention's output",
        "hook_mlp_out": "its MLPs' output",
    }
    hooks = {sae["hookpoint"].rpartition(".")[2] for sae in saes}
    return " and ".join(words[hook] for hook in words if hook in hooks)


def _sae_in_words(sae: dict[str, Any]) -> str:
    match sae:
        case {"release": str(release), "id": id, "commit": commit}:
            return f"`{release}`, `{id}` (from sae-lens's registry, commit `{commit}`)"
        case {"path": str(path)}:
            return f"`{path}` (a folder)"
        case {"id": str(id)}:
            return f"`{id}`, included in the package `sae_lora`"
        case _:
            return "none: the identity function, as a control"


def _text_in_words(summary: dict[str, Any]) -> str:
    data = summary["data"]
    match data["source"]:
        case "hub":
            subset = f", {data['subset']}" if data["subset"] else ""
            return f"`{data['name']}`{subset}, split {data['split']}, at `{data['revision']}`"
        case "text_files":
            return f"{data['files']} local files, content hash `{data['content']}`"
        case "stdlib":
            python = summary["environment"]["python"]
            return f"source code of Python {python}'s standard library, content hash `{data['content']}`"
        case _:
            raise NotImplementedError(data["source"])


def _loading_code(sae: dict[str, Any]) -> str:
    """Python code that loads the SAE."""
    dtype = f'dtype="{sae["dtype"]}"'
    if sae["release"] is not None:
        return f'SAE.from_pretrained("{sae["release"]}", "{sae["id"]}", {dtype})'
    location = f'local + "{sae["path"]}"' if sae["path"] is not None else f'SAES / "{sae["id"]}"'
    return f"SAE.load_from_disk({location}, {dtype})"
