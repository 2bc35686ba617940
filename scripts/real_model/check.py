"""Check the numbers of a run of LoRA, or of a finetuned TopK SAE, in float64, without the package.

    python -m scripts.real_model.check outputs/SWEEP/RUN --to check.json

Reads the files of the run folder: the config, the adapters in peft's format, the SAE in SAELens's format
and the held-out tokens. The sums below are written out from the definitions, for models with Llama's
modules and SAEs after a block. Nothing of `sae_lora` is imported.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def merged(folder, model):
    """The plain weights plus scale · B · A, by the name of the module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        module = name.split(".lora_A.")[0].removeprefix("base_model.model.")
        plain = model.get_parameter(f"{module}.weight")
        yield module, plain + scale * b.to(plain) @ a.to(plain)


class TopK:
    """A TopK SAE from its files."""

    def __init__(self, folder):
        self.config = json.loads((folder / "cfg.json").read_text())
        assert self.config["architecture"] == "topk"
        assert self.config["normalize_activations"] == "none"
        weights = load_file(folder / "sae_weights.safetensors")
        self.w = {name: weight.double() for name, weight in weights.items()}
        self.norms = self.w["W_dec"].norm(dim=1)

    def __call__(self, x):
        """Reconstruction and latents of activations `[token, d_model]`."""
        centred = x - self.w["b_dec"] if self.config["apply_b_dec_to_input"] else x
        scores = centred @ self.w["W_enc"] + self.w["b_enc"]
        by_norm = self.config.get("rescale_acts_by_decoder_norm", False)
        if by_norm:
            scores = scores * self.norms
        best = scores.topk(self.config["k"], dim=-1)
        latents = torch.zeros_like(scores).scatter(-1, best.indices, best.values.clamp(min=0))
        decoded = (latents / self.norms if by_norm else latents) @ self.w["W_dec"]
        return decoded + self.w["b_dec"], latents


@torch.no_grad()
def measured(run, batch):
    """The measures of the run on its held-out tokens, all sums in float64."""
    run = Path(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    summary = json.loads((run / "summary.json").read_text())
    cache = Path(config["data"]["cache_dir"]).expanduser() / "corpora" / summary["data"]["corpus"]
    held_out = np.load(cache / "validation.npy").astype(np.int64)
    held_out = held_out[: config["data"]["validation_tokens"] // held_out.shape[1]]
    (entry,) = summary["sae"]
    (used,) = config["sae"]["used"]
    folder = run / "sae" / entry["hookpoint"]  # if the run has trained the SAE
    before = TopK(Path(used["path"]))
    after = TopK(folder) if folder.exists() else before
    block = entry["block"]
    load = lambda: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        config["model"]["name"], dtype=torch.float64, attn_implementation="eager"
    ).eval()
    teacher, student = load(), load()
    if (run / "adapter").exists():
        for module, weight in merged(run / "adapter", student):
            student.get_parameter(f"{module}.weight").copy_(weight)

    def logits(model, tokens, sae, seen):
        """Logits with the SAE's reconstruction in place of the output of the block."""

        def replace(module, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            keep = torch.isin(tokens, torch.tensor(entry["kept"]["ids"], dtype=torch.long))
            if entry["kept"]["first"]:
                keep[:, 0] = True
            assert entry["kept"]["norm_multiple"] is None
            recon, latents = sae(x[~keep])
            seen.append((x[~keep], recon, latents))
            x = x.clone()
            x[~keep] = recon
            return (x, *output[1:]) if isinstance(output, tuple) else x

        hook = model.model.layers[block].register_forward_hook(replace) if sae else None
        result = model(tokens, use_cache=False).logits.log_softmax(-1)
        if hook:
            hook.remove()
        return result

    sums: dict[str, float] = defaultdict(float)
    tokens_seen, squared, active = 0, 0.0, 0.0
    total, total_squares = torch.zeros(student.config.hidden_size, dtype=torch.float64), 0.0
    for start in range(0, len(held_out), batch):
        tokens = torch.from_numpy(held_out[start : start + batch])
        base = logits(teacher, tokens, None, [])
        cells = {"spliced": (teacher, before), "student": (student, after)}
        for name, (model, sae) in cells.items():
            seen = []
            scores = logits(model, tokens, sae, seen)
            kl = (base.exp() * (base - scores)).sum()
            sums["initial_kl" if name == "spliced" else "kl"] += float(kl)
            sums[f"{name}_ce"] -= float(scores[:, :-1].gather(-1, tokens[:, 1:, None]).sum())
            if name == "student":
                sums["top1"] += float((scores.argmax(-1) == base.argmax(-1)).sum())
                ((x, recon, latents),) = seen
                tokens_seen += len(x)
                squared += float((x - recon).square().sum())
                active += float((latents > 0).sum())
                total += x.sum(0)
                total_squares += float(x.square().sum())
        sums["base_ce"] -= float(base[:, :-1].gather(-1, tokens[:, 1:, None]).sum())
        print(f"{start + len(tokens)} of {len(held_out)} sequences", flush=True)
    positions, predicted = held_out.size, held_out[:, 1:].size
    result = {name: sums[name] / predicted for name in ("base_ce", "spliced_ce", "student_ce")}
    result |= {name: sums[name] / positions for name in ("initial_kl", "kl")}
    result["top1_agreement"] = sums["top1"] / positions
    result["gap_closed"] = (result["spliced_ce"] - result["student_ce"]) / (
        result["spliced_ce"] - result["base_ce"]
    )
    variance = total_squares - float(total.square().sum()) / tokens_seen
    result["fvu"] = squared / variance
    result["l0"] = active / tokens_seen
    return result, summary


def main():
    """Print the numbers of the run and of this script side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch", type=int, default=4, help="sequences per forward pass")
    parser.add_argument("--to", type=Path, help="JSON file for the table")
    arguments = parser.parse_args()
    result, summary = measured(arguments.run, arguments.batch)
    rows = {}
    for name, value in result.items():
        given = summary.get(name, summary["sae"][0].get(name))
        rows[name] = {
            "run": given,
            "script": value,
            "difference": None if given is None else given - value,
        }
        print(f"{name:15} {given} {value:.12f} {rows[name]['difference']}")
    if arguments.to:
        arguments.to.write_text(json.dumps({"run": arguments.run.name, "values": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
