"""Attribution graphs of a folder's model: `python -m sae_lora.evaluation.circuits FOLDER`.

It runs in circuit-tracer's environment, whose transformers is older, and imports nothing of this package
that needs transformers. Without a folder it only checks the imports. `suite.py` writes the folder.
"""
# pyright: reportMissingImports=false

import json
import sys
from pathlib import Path
from typing import Any

import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_nnsight import NNSightReplacementModel
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.utils.tl_nnsight_mapping import get_mapping
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from sae_lora.common.files import as_json, write_atomically

_INPUT, _OUTPUT = "sae_lora.input", "sae_lora.output"
"""Our names for the places of transcoders, beside circuit-tracer's."""


def trace(folder: Path) -> None:
    """Make the graph of each prompt, and write their scores into `graphs.json`.

    Raises:
        RuntimeError: If this version of transformers computes other logits than the run.
    """
    request = json.loads((folder / "request.json").read_text())
    model = _model(folder, request)
    _check(model, folder, request)
    rows = []
    for number, prompt in enumerate(request["prompts"]):
        graph = attribute(
            prompt, model, max_feature_nodes=request["max_features"], batch_size=64, verbose=False
        )
        rows.append(_scores(graph, model.cfg.n_layers))
        print(f"prompt {number + 1} of {len(request['prompts'])}: {rows[-1]}", flush=True)
    write_atomically(folder / "graphs.json", as_json(rows))


def _model(folder: Path, request: dict[str, Any]) -> Any:
    """The model with its transcoders, as circuit-tracer builds it."""
    config: Any = AutoConfig.from_pretrained(folder)
    hooks = get_mapping(config.architectures[0]).feature_hook_mapping
    where = request["input"]
    hooks[_INPUT] = hooks[where] if isinstance(where, str) else tuple(where)
    hooks[_OUTPUT] = tuple(request["output"])
    device = torch.device(request["device"])
    files = {
        number: folder / f"transcoder_{number}.safetensors" for number in range(config.num_hidden_layers)
    }
    transcoders = {number: _transcoder(number, file, device) for number, file in files.items()}
    return NNSightReplacementModel.from_pretrained_and_transcoders(
        str(folder), TranscoderSet(transcoders, _INPUT, _OUTPUT), device=device, dtype=torch.float32
    )


def _transcoder(number: int, file: Path, device: torch.device) -> SingleLayerTranscoder:
    weights = load_file(file)
    d_transcoder, d_model = weights["W_enc"].shape
    threshold = weights.pop("threshold", None)
    transcoder = SingleLayerTranscoder(
        d_model,
        d_transcoder,
        nn.functional.relu if threshold is None else JumpReLU(threshold.to(device), 0.1),
        number,
        skip_connection="W_skip" in weights,
        device=device,
        dtype=torch.float32,
    )
    for name, weight in weights.items():
        getattr(transcoder, name).data = weight.to(device)
    return transcoder


def _check(model: Any, folder: Path, request: dict[str, Any]) -> None:
    expected = load_file(folder / "expected.safetensors")["logits"]
    with torch.no_grad():
        tokens = torch.tensor([request["prompts"][0]], device=request["device"])
        logits = model._model(input_ids=tokens, use_cache=False).logits[0, -1].float().cpu()
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference <= request["tolerance"]:
        raise RuntimeError(
            "the model differs in circuit-tracer's version of transformers: "
            f"a logit by {difference:.1e} of the largest"
        )


def _scores(graph: Any, n_layers: int) -> dict[str, Any]:
    replacement, completeness = compute_graph_scores(graph)
    kept = prune_graph(graph).node_mask
    n_features, n_tokens = len(graph.selected_features), len(graph.input_tokens)
    return {
        "tokens": n_tokens,
        "features": n_features,
        "replacement": replacement,
        "completeness": completeness,
        "kept_features": int(kept[:n_features].sum()),
        "kept_errors": int(kept[n_features : n_features + n_tokens * n_layers].sum()),
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        trace(Path(argument))
