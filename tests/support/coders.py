"""SAEs small enough to reason about, made by sae-lens."""

import json
from pathlib import Path

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from tests.support.families import D_MODEL


def topk_sae(k: int = 4, width: int = 64, seed: int = 7) -> TopKSAE:
    """A random TopK SAE; it reconstructs badly, so that a gap opens."""
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


def write_topk_sae(folder: Path, hookpoint: str, d_in: int = 128, width: int = 256, k: int = 32) -> Path:
    """A random TopK SAE in sae-lens's format, which says that it was trained at this place."""
    torch.manual_seed(width)
    metadata = SAEMetadata(hook_name=hookpoint, exclude_special_tokens=True, l0=float(k))
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=width, k=k, metadata=metadata))
    sae.save_model(folder)
    return folder


def write_cfg(folder: Path, **values: object) -> str:
    """A folder of sae-lens's format as far as planning reads it, of an SAE as wide as the tiny model."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps({"d_in": 128, **values}))
    (folder / "sae_weights.safetensors").write_text("not read by the plan, only hashed")
    return str(folder)
