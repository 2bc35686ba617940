"""Small SAEs, in sae-lens's classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata
from safetensors.numpy import save_file

from sae_lora.saes.transcoders import with_skip
from tests.support.families import D_MODEL


def topk_sae(k: int = 4, width: int = 64, seed: int = 7) -> TopKSAE:
    """A random TopK SAE. It reconstructs badly, so that there is a gap."""
    torch.manual_seed(seed)
    sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=width, k=k))
    return sae.requires_grad_(False).eval()


def jumprelu_sae(width: int = 64, seed: int = 8) -> JumpReLUSAE:
    """A random JumpReLU SAE with positive thresholds."""
    torch.manual_seed(seed)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_MODEL, d_sae=width))
    with torch.no_grad():
        sae.threshold.uniform_(0.1, 0.5)
        sae.b_enc.normal_(std=0.1)
    return sae.requires_grad_(False).eval()


def transcoder(architecture: str = "jumprelu_skip_transcoder", seed: int = 0) -> Any:
    """A random transcoder of sae-lens, as a splice uses it."""
    torch.manual_seed(seed)
    kind, config = get_sae_class(architecture)
    sae = kind(config(d_in=D_MODEL, d_sae=64, d_out=D_MODEL, apply_b_dec_to_input=False))
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            weight.normal_(std=0.3) if name != "threshold" else weight.uniform_(0.1, 0.5)
    sae.requires_grad_(False).eval()
    return with_skip(sae, sae)


def write_topk_sae(folder: Path, hookpoint: str, d_in: int = 128, width: int = 256, k: int = 32) -> Path:
    """Write a random TopK SAE in sae-lens's format, with metadata that names this hookpoint."""
    torch.manual_seed(width)
    metadata = SAEMetadata(hook_name=hookpoint, exclude_special_tokens=True, l0=float(k))
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=width, k=k, metadata=metadata))
    sae.save_model(folder)
    return folder


def write_cfg(folder: Path, b_dec: float = 0.0, **values: Any) -> str:
    """Write an SAE that returns `b_dec`, with these values in its config, for the tiny model's width."""
    folder.mkdir(parents=True)
    config = {"architecture": "standard", "d_in": 128, "d_sae": 8, **values}
    (folder / "cfg.json").write_text(json.dumps(config))
    d_in, d_sae = config["d_in"], config["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in)}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    weights["b_dec"] = np.full(d_in, b_dec, np.float32)
    save_file(weights, folder / "sae_weights.safetensors")
    return str(folder)
