"""The model card of an exported run: description, numbers, and code that loads it. Imports no torch."""

from collections.abc import Sequence
from typing import Any

import yaml

from sae_lora.models.dimensions import EMBEDDED_NAME
from sae_lora.records.metrics import METRICS


def card(
    config: dict[str, Any], summary: dict[str, Any], modules: Sequence[str], *, merged: bool
) -> str:
    """The card as Markdown, with the hub's metadata in front.

    Args:
        config: The run's config, as plain values that may be published.
        summary: The run's summary, as plain values that may be published.
        modules: Dotted paths of the modules in the transformers model whose output the SAEs replace.
        merged: Whether the folder holds the whole model, with the adapters in its weights.
    """
    parts = [
        f"---\n{yaml.safe_dump(_metadata(config, summary, merged), sort_keys=False)}---",
        f"# {summary['name']}",
        _introduction(summary, merged),
        "## Result",
        _numbers(summary),
        "## How to load it",
        f"```python\n{_snippet(config, summary, modules, merged)}```",
        "## Made of",
        _ingredients(config, summary),
        "## Files",
        _files(merged),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(config: dict[str, Any], summary: dict[str, Any], merged: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if summary["model"]["commit"] is not None:  # a model of the hub
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


def _introduction(summary: dict[str, Any], merged: bool) -> str:
    what = "A model in float32 with LoRA adapters merged into its weights" if merged else "LoRA adapters"
    saes = "sparse autoencoders (SAEs)" if len(summary["sae"]) > 1 else "a sparse autoencoder (SAE)"
    return (
        f"{what}, trained so that {_model_in_words(summary['model'])} with {saes} spliced into "
        f"{_spliced_into(summary['sae'])} predicts what the plain model does. Model and SAE were "
        "frozen; the loss was KL(plain model ‖ spliced model with adapters) "
        "([arXiv 2501.19406](https://arxiv.org/abs/2501.19406)). The adapters belong to the spliced "
        "model: without the SAE they are out of place."
    )


def _spliced_into(saes: Sequence[dict[str, Any]]) -> str:
    words = {
        "hook_resid_post": "its residual stream",
        "hook_attn_out": "its attention's output",
        "hook_mlp_out": "its MLPs' output",
    }
    hooks = {sae["hookpoint"].rpartition(".")[2] for sae in saes}
    return " and ".join(words[hook] for hook in words if hook in hooks)


def _model_in_words(model: dict[str, Any]) -> str:
    if model["name"] == EMBEDDED_NAME:
        return "the model that ships with the package `sae_lora`"
    at = f" at commit `{model['commit']}`" if model["commit"] is not None else " (a local folder)"
    return f"`{model['name']}`{at}"


_NUMBERS = (
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "initial_kl", "kl"),
    *("top1_agreement", "fvu", "l0", "trainable_parameters", "train_tokens"),
)


def _numbers(summary: dict[str, Any]) -> str:
    rows = ["| | | |", "|---|---:|---|"]
    for key in _NUMBERS:
        metric = METRICS[key]
        value = metric.written(summary[key], digits=4)
        rows.append(f"| {metric.name} | {value} {metric.suffix} | {metric.text} |")
    rows.append(f"| held-out tokens | {summary['validation_tokens']:,} | Tokens measured on. |")
    return "\n".join(rows)


def _ingredients(config: dict[str, Any], summary: dict[str, Any]) -> str:
    model, lora, made = summary["model"], summary["lora"], summary["environment"]
    kept = summary["data"]["special_tokens_kept"]
    scale = "alpha / √rank" if config["lora"]["rank_stabilised"] else "alpha / rank"
    versions = {"sae_lora": made["sae_lora"], "Python": made["python"]} | made["packages"]
    lines = [
        f"**Model**: {_model_in_words(model)}, {model['class']}, loaded in {model['loaded_as']}, "
        f"computed in {model['computed_in']}",
        *(f"**SAE**: {_sae_in_words(sae)}" for sae in summary["sae"]),
        "**Special tokens** (BOS, EOS): "
        + ("keep their activation" if kept else "go through the SAE too"),
        f"**LoRA**: rank {lora['rank']}, alpha {lora['alpha']:g} (scale {scale}), dropout "
        f"{lora['dropout']:g}, matrices {lora['targets']}, blocks {lora['blocks']}",
        f"**Text**: {_text_in_words(summary)}, {config['data']['context_length']} tokens per sequence",
        f"**Seeds**: adapters {summary['seed']}, text {config['data']['seed']}",
        f"**Run**: `{summary['hash']}`, code at `{made['git_commit'] or 'no commit'}`",
        "**Versions**: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _sae_in_words(sae: dict[str, Any]) -> str:
    match sae:
        case {"release": str(release), "id": id, "commit": commit}:
            name = f"`{release}`, `{id}` (of sae-lens's registry, commit `{commit}`)"
        case {"path": str(path)}:
            name = f"`{path}` (a folder)"
        case {"id": str(id)}:
            name = f"`{id}`, ships with the package `sae_lora`"
        case _:
            name = "none: the identity, as a control"
    return (
        f"{name}, at `{sae['hookpoint']}`, {sae['architecture']}, {sae['width'] or '?'} latents, L0 "
        f"{sae['l0']:.1f}, FVU {sae['fvu']:.4f}, in {sae['dtype']}; SHA-256 of its weights as loaded "
        f"`{sae['sha256']}`"
    )


def _text_in_words(summary: dict[str, Any]) -> str:
    data = summary["data"]
    match data["source"]:
        case "hub":
            subset = f", {data['subset']}" if data["subset"] else ""
            return f"`{data['name']}`{subset}, split {data['split']}, at `{data['revision']}`"
        case "text_files":
            return f"{data['files']} files of the author's, content `{data['content']}`"
        case "stdlib":
            python = summary["environment"]["python"]
            return f"sources of Python {python}'s standard library, content `{data['content']}`"
        case _:
            raise NotImplementedError(data["source"])


def _files(merged: bool) -> str:
    weights = "the whole model and its tokenizer" if merged else "the adapters in peft's format"
    return (
        f"Beside {weights}: `config.yaml`, `curve.jsonl` and `summary.json` as the run wrote them, "
        "without what concerns the machine it ran on and the account it was tracked with."
    )


_SPLICING = """


def splice(sae, keep):
    def hook(module, inputs, output):
        resid = output[0] if isinstance(output, tuple) else output
        recon = sae.decode(sae.encode(resid)).to(resid.dtype)
        recon = torch.where(keep[..., None], resid, recon)
        return (recon, *output[1:]) if isinstance(output, tuple) else recon

    return hook


tokens = tokenizer("import os", return_tensors="pt").input_ids
{keep}
hooks = [
    base.get_submodule(block).register_forward_hook(splice(sae, keep)) for block, sae in saes.items()
]
with torch.no_grad():
    logits = model(tokens).logits
for hook in hooks:
    hook.remove()
"""
_KEEPING = """\
special = [id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id) if id is not None]
keep = torch.isin(tokens, torch.tensor(special))  # these positions keep their activation"""
_KEEPING_NONE = "keep = torch.zeros_like(tokens, dtype=torch.bool)  # BOS and EOS go through the SAE too"


def _snippet(
    config: dict[str, Any], summary: dict[str, Any], modules: Sequence[str], merged: bool
) -> str:
    """Code that loads the exported folder and splices the SAEs in, without `sae_lora`."""
    embedded = summary["model"]["name"] == EMBEDDED_NAME
    saes = {
        block: _loading_sae(sae)
        for block, sae in zip(modules, summary["sae"], strict=True)
        if sae["family"] != "identity"
    }
    ours = [
        *(["MODEL"] if embedded and not merged else []),
        *(["SAES"] if any("SAES" in code for code in saes.values()) else []),
    ]
    lines = [
        "import torch",
        *([] if merged else ["from peft import PeftModel"]),
        *(["from sae_lens import SAE"] if saes else []),
        *([f"from sae_lora.embedded import {', '.join(ours)}"] if ours else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'here = "."  # this folder, or its name on the hub',
        *_loading_model(config, summary, merged),
        "saes = {",
        *(f'    "{block}": {code},' for block, code in saes.items()),
        "}",
    ]
    keep = _KEEPING if summary["data"]["special_tokens_kept"] else _KEEPING_NONE
    return "\n".join(lines) + _SPLICING.format(keep=keep)


def _loading_model(config: dict[str, Any], summary: dict[str, Any], merged: bool) -> list[str]:
    if merged:
        return [
            "tokenizer = AutoTokenizer.from_pretrained(here)",
            "model = base = AutoModelForCausalLM.from_pretrained(here)",
        ]
    model, loaded, computed = summary["model"], config["model"]["dtype"], config["train"]["dtype"]
    at = f', revision="{model["commit"]}"' if model["commit"] is not None else ""
    name = "MODEL" if model["name"] == EMBEDDED_NAME else f'"{model["name"]}"'
    # Weights that the run rounded to bfloat16 and used in float32 are rounded here too.
    dtype = "bfloat16" if "bfloat16" in (loaded, computed) else "float32"
    widened = ".float()" if dtype != computed else ""
    return [
        f"tokenizer = AutoTokenizer.from_pretrained({name}{at})",
        f"base = AutoModelForCausalLM.from_pretrained({name}{at}, dtype=torch.{dtype}){widened}",
        "model = PeftModel.from_pretrained(base, here).eval()",
    ]


def _loading_sae(sae: dict[str, Any]) -> str:
    dtype = f'dtype="{sae["dtype"]}"'
    if sae["release"] is not None:
        return f'SAE.from_pretrained("{sae["release"]}", "{sae["id"]}", {dtype})'
    where = f'"{sae["path"]}"' if sae["path"] is not None else f'SAES / "{sae["id"]}"'
    return f"SAE.load_from_disk({where}, {dtype})"
