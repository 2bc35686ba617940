"""A trained map on an SAE's reconstruction: linear, or an MLP with one hidden layer."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sae_lora.common.errors import UserError
from sae_lora.config.enums import Method
from sae_lora.splice.hooks import Coder, decoded

WEIGHTS, _SHAPE = "output_adapter.safetensors", "output_adapter.json"


class OutputAdapter(nn.Module):
    """A map on reconstructions `[..., d_model]`; before training it is the identity.

    For a reconstruction x its output is x + W₂ W₁ x + b (linear; at full rank x + W x + b) or
    x + W₂ gelu(W₁ x + b₁) + b₂ (mlp).

    Source: the linear adapters of arXiv 2503.17272.

    Args:
        kind: `linear_adapter` or `mlp_adapter`.
        d_model: Width of reconstructions.
        rank: Width of the middle layer; `None` for a linear map of full rank, or an MLP as wide as the
            model.
    """

    def __init__(self, kind: Method, d_model: int, rank: int | None) -> None:
        super().__init__()
        self.kind, self.d_model, self.rank = kind, d_model, rank
        self.added: nn.Module
        match kind:
            case Method.linear_adapter if rank is not None:
                last = nn.Linear(rank, d_model)
                self.added = nn.Sequential(nn.Linear(d_model, rank, bias=False), last)
            case Method.linear_adapter:
                self.added = last = nn.Linear(d_model, d_model)
            case Method.mlp_adapter:
                last = nn.Linear(rank or d_model, d_model)
                self.added = nn.Sequential(nn.Linear(d_model, rank or d_model), nn.GELU(), last)
            case _:
                raise NotImplementedError(kind)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, recon: Tensor) -> Tensor:
        """The mapped reconstruction `[..., d_model]`, in float32, the precision of the weights."""
        return recon + self.added(recon.float())


class AdaptedCoder(nn.Module):
    """An SAE with an adapter on its reconstruction."""

    def __init__(self, sae: Coder, adapter: OutputAdapter) -> None:
        super().__init__()
        self.sae = sae
        self.adapter = adapter
        self.eval()  # the SAE is frozen, and splices treat it as such; the adapter has no modes

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.adapter(self.sae.decode(feature_acts))

    def decode_with(self, feature_acts: Tensor, x: Tensor) -> Tensor:
        return self.adapter(decoded(self.sae, feature_acts, x))


def save(adapter: OutputAdapter, folder: Path) -> None:
    """Write an adapter into an existing folder."""
    weights = {name: weight.detach().cpu() for name, weight in adapter.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    shape = {"kind": adapter.kind.name, "d_model": adapter.d_model, "rank": adapter.rank}
    (folder / _SHAPE).write_text(json.dumps(shape, indent=1) + "\n")


def code(folder: Path) -> str:
    """Python code of what a saved adapter adds to `recon`, from its weights file as the dict `weights`.

    Raises:
        UserError: If it is missing or damaged.
    """

    def layer(inputs: str, name: str, *, bias: bool = True) -> str:
        offset = f', weights["{name}.bias"]' if bias else ""
        return f'linear({inputs}, weights["{name}.weight"]{offset})'

    adapter = load(folder, torch.device("cpu"))
    if adapter.kind is Method.mlp_adapter:
        return layer(f"gelu({layer('recon', 'added.0')})", "added.2")
    if adapter.rank is None:
        return layer("recon", "added")
    return layer(layer("recon", "added.0", bias=False), "added.1")


def load(folder: Path, device: torch.device) -> OutputAdapter:
    """Load an adapter that `save` wrote, frozen.

    Raises:
        UserError: If it is missing or damaged.
    """
    try:
        shape = json.loads((folder / _SHAPE).read_text())
        adapter = OutputAdapter(Method[shape["kind"]], shape["d_model"], shape["rank"])
        adapter.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} cannot be loaded: {error}") from error
    return adapter.to(device).requires_grad_(False)
