"""Models and transcoders in folders, as circuit-tracer and transformers 4 read them."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.config.enums import Reads
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import Splice, decoded
from sae_lora.splice.mlp_input import module_read
from sae_lora.splice.trunk import Splices

_TOKENIZER_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length")


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer with only those settings that older versions of transformers know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    kept = {key: settings[key] for key in _TOKENIZER_KEYS if key in settings}
    write_atomically(path, as_json(kept | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def date_back(folder: Path) -> None:
    """State positions in a model's config as transformers 4 does, besides as transformers 5 does."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    if "rope_theta" in whole:
        config["rope_theta"] = whole["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: whole[key] for key in whole if key != "rope_theta"}
    if "sliding_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    write_atomically(path, as_json(config))


def write_transcoder(splice: Splice, file: Path) -> None:
    """Write a transcoder's weights as circuit-tracer names them, in float32.

    Raises:
        UserError: If the transcoder computes something else from these weights.
    """
    weights = _weights(splice.sae)
    x = torch.randn(8, weights["W_enc"].shape[1], generator=torch.Generator().manual_seed(0))
    module: Any = splice.sae
    with torch.no_grad():
        given = x.to(next(iter(module.state_dict().values())))
        expected = decoded(splice.sae, splice.sae.encode(given), given).float().cpu()
    difference = (_output(weights, x) - expected).norm() / expected.norm()
    if not difference < 1e-2:  # bfloat16 has 8 bits
        raise UserError(f"circuit-tracer has no transcoder that computes what {splice.hookpoint}'s does")
    save_file(weights, file)


def _weights(sae: Any) -> dict[str, Tensor]:
    while hasattr(sae, "sae"):  # a module around that of sae-lens
        sae = sae.sae
    weights = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    if getattr(sae, "threshold", None) is not None:
        weights["threshold"] = sae.threshold
    if hasattr(sae, "W_skip"):
        weights["W_skip"] = sae.W_skip
    return {
        name: weight.detach().float().cpu().clone(memory_format=torch.contiguous_format)
        for name, weight in weights.items()
    }


def _output(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The output that circuit-tracer computes from these weights."""
    before = x @ weights["W_enc"].T + weights["b_enc"]
    threshold = weights.get("threshold", torch.zeros(()))
    output = torch.where(before > threshold, before, 0.0) @ weights["W_dec"] + weights["b_dec"]
    return output + x @ weights["W_skip"].T if "W_skip" in weights else output


def places(model: LanguageModel, splices: Splices) -> dict[str, Any]:
    """The places of transcoders for circuit-tracer, with `{layer}` for the block.

    Returns:
        `input`: a module and `input`, or a hook that circuit-tracer knows by this name; `output`: a
        module and `output`.
    """
    first = splices[0]
    assert first.reads is not None  # a transcoder
    source = model.name_of(module_read(model, first.block, first.reads))
    normalized = first.reads is Reads.mlp_normalized
    return {
        "input": "ln2.hook_normalized" if normalized else [_pattern(source), "input"],
        "output": [_pattern(model.name_at(first.hookpoint)), "output"],
    }


def _pattern(module: str) -> str:
    """The path of a module of block 0 as circuit-tracer writes it: `model.layers[{layer}].mlp`."""
    return re.sub(r"\.0(?=\.|$)", "[{layer}]", module, count=1)
