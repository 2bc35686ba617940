"""The model card of an exported run, from the template `model_card.md.jinja`. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from sae_lora.config.enums import Method, SAEFamily
from sae_lora.config.identity import ADAPTING, TRAINING_SAES
from sae_lora.config.lora_targets import in_words
from sae_lora.export.public import BASE_MODEL
from sae_lora.models.dimensions import EMBEDDED_NAME
from sae_lora.records.metrics import METRICS

_NUMBERS = (
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "initial_kl", "kl"),
    *("top1_agreement", "fvu", "fvu_without_outliers", "l0", "trainable_parameters", "train_tokens"),
)


def card(
    config: dict[str, Any],
    summary: dict[str, Any],
    modules: Sequence[str],
    reads: Mapping[str, tuple[str, str]],
    prompt: str,
    maps: Mapping[str, str],
    map_code: str,
    *,
    merged: bool,
) -> str:
    """Write the card as Markdown, with metadata for the hub and code that works without `sae_lora`.

    Args:
        config: The run's config, as plain values that may be published.
        summary: The run's summary, as plain values that may be published.
        modules: Dotted paths of the modules in the transformers model whose outputs the SAEs replace.
        reads: By module, for a transcoder, the path of the module whose input it reads, and code of what
            it reads from `x`, this input.
        prompt: Text that the code runs the model on.
        maps: By module, the weights file of the trained map on the SAE's output, if there is one.
        map_code: Code of what such a map adds to `recon`, from its `weights`.
        merged: True if the folder contains the whole model, with merged adapters.
    """
    model, method = summary["model"], Method[config["method"]["kind"]]
    is_embedded = model["name"] == EMBEDDED_NAME
    saes = {
        module: _loading_code(sae)
        for module, sae in zip(modules, summary["sae"], strict=True)
        if sae["family"] != SAEFamily.identity.name or sae.get("adapter") is not None
    }
    rules = [_kept(sae, summary["data"]) for sae in summary["sae"]]
    revision = f', revision="{model["commit"]}"' if model["commit"] is not None else ""
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
        metadata=yaml.safe_dump(_metadata(summary, method, merged), sort_keys=False),
        model=_model_in_words(model),
        places=_spliced_outputs(summary["sae"]),
        text=_text_in_words(summary),
        numbers=[
            (METRICS[key], METRICS[key].written(summary[key], digits=4))
            for key in _NUMBERS
            if key in summary  # summaries of older versions have fewer
        ],
        left_out=in_words(summary["lora"].get("left_out", {})),  # older summaries do not have it
        saes=saes,
        reads={module: reads[module] for module in saes if module in reads},
        kept=dict(zip(modules, rules, strict=True)),
        kept_in_words="; ".join(dict.fromkeys(map(_kept_in_words, rules))),
        embedded=[
            *(["MODEL"] if is_embedded and not merged else []),
            *(["SAES"] if any("SAES" in code for code in saes.values()) else []),
        ],
        pretrained=("MODEL" if is_embedded else f'"{model["name"]}"') + revision,
        placeholder=BASE_MODEL if model["name"] == BASE_MODEL and not merged else None,
        prompt=repr(prompt),
        method=method.name,
        has_adapters=method in ADAPTING and not merged,
        map_code=map_code,
        maps=maps,
        # If the run rounded weights to bfloat16 and computed in float32, the code does the same.
        dtype="bfloat16"
        if "bfloat16" in (config["model"]["dtype"], config["train"]["dtype"])
        else "float32",
    )


def _kept(sae: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The positions that keep their activation around an SAE; `ids` is Python code."""
    if "kept" in sae:
        return {**sae["kept"], "ids": str(sae["kept"]["ids"])}
    # A run of version 0.1, which had one rule for all SAEs.
    ids = "[id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id) if id is not None]"
    return {"ids": ids if data["special_tokens_kept"] else "[]", "first": False, "norm_multiple": None}


def _kept_in_words(rule: Mapping[str, Any]) -> str:
    parts = []
    if rule["ids"] != "[]":
        parts.append(f"tokens {rule['ids']}")
    if rule["first"]:
        parts.append("the first position")
    if rule["norm_multiple"] is not None:
        parts.append(f"positions with a norm above {rule['norm_multiple']:g} times the median")
    kept = " and ".join(parts)
    return f"{kept} keep their activations" if kept else "none; the SAE replaces every activation"


def _metadata(summary: dict[str, Any], method: Method, merged: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if summary["model"]["commit"] is not None:  # a model from the hub
        metadata["base_model"] = summary["model"]["name"]
        if method in ADAPTING:
            metadata["base_model_relation"] = "finetune" if merged else "adapter"
    if summary["data"]["source"] == "hub":
        metadata["datasets"] = [summary["data"]["name"]]
    if method in ADAPTING:
        library = "transformers" if merged else "peft"
    else:
        library = "sae_lens" if method in TRAINING_SAES else "sae_lora"
    return metadata | {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["lora" if method in ADAPTING else method.name, "sparse-autoencoder", "sae_lora"],
    }


def _model_in_words(model: dict[str, Any]) -> str:
    if model["name"] == EMBEDDED_NAME:
        return "the model in the package `sae_lora`"
    if model["name"] == BASE_MODEL:
        return "a local model"
    return f"`{model['name']}` at commit `{model['commit']}`"


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
            origin = f"`{release}`, `{id}` (from sae-lens's registry, commit `{commit}`)"
        case {"id": str(id)}:
            origin = f"`{id}`, included in the package `sae_lora`"
        case {"path": None}:
            return "none: the identity function, as a control"
        case _:
            origin = ""
    if sae["path"] is None:
        return origin
    return f"`{sae['path']}` in this folder" + (origin and f", trained from {origin}")


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
    if sae["family"] == SAEFamily.identity.name:
        return "SimpleNamespace(encode=torch.nn.Identity(), decode=torch.nn.Identity())"
    if sae["path"] is not None:
        return f'SAE.load_from_disk(f"{{folder}}/{sae["path"]}", {dtype})'
    if sae["release"] is not None:
        return f'SAE.from_pretrained("{sae["release"]}", "{sae["id"]}", {dtype})'
    return f'SAE.load_from_disk(SAES / "{sae["id"]}", {dtype})'
