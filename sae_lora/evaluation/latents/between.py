"""Latents of two adapted models compared with each other: how much two seeds differ."""

from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_lora.config.identity import TRAINING_SAES
from sae_lora.config.serialize import load
from sae_lora.evaluation.latents.activations import CONTEXTS
from sae_lora.evaluation.latents.effects import cosines, directions
from sae_lora.evaluation.latents.pages import of_sae
from sae_lora.evaluation.latents.suite import FILE, LIVE, TURNED, shared
from sae_lora.models.dimensions import read_dimensions
from sae_lora.records.folder import RunFolder
from sae_lora.saes.loading import SAEs

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Between:
    """Differences between the latents of two runs with the same SAEs; means over SAEs.

    Over latents that are active on ten tokens or more in both runs. The names are those of `Change`.
    """

    turned: float
    contexts_changed: float
    cosine: float
    overlap: float
    promoted: float


def between(first: RunFolder, second: RunFolder) -> Between | None:
    """Compare two runs that the suite `latents` has measured.

    `None` if they cannot be compared: an SAE was trained, or a file is missing, or the texts differ.
    """
    config = load(first.config.read_text())
    files = [folder.evaluation / FILE for folder in (first, second)]
    if config.method.kind in TRAINING_SAES or not all(file.is_file() for file in files):
        return None
    pair = [load_file(file) for file in files]
    if not torch.equal(pair[0]["tokens"], pair[1]["tokens"]):
        return None
    products = pair[0]["head_products"].double()
    loaded = SAEs(read_dimensions(config.model), _CPU).of(config.sae)
    each = []
    for sae in loaded:
        arrays = [of_sae(arrays, sae.description["hookpoint"]) for arrays in pair]
        if not all(arrays):
            return None
        decoder = directions(sae.sae, len(arrays[0]["cosine"]), _CPU)
        each.append(_of_sae(arrays, decoder, products))
    return Between(*(sum(values) / len(values) for values in zip(*each, strict=True)))


def _of_sae(arrays: list[dict[str, Tensor]], decoder: Tensor, products: Tensor) -> tuple[float, ...]:
    effects = [decoder @ of_run["derivative_after"].float().T for of_run in arrays]
    live = torch.cat([of_run["active"] >= LIVE for of_run in arrays]).all(0)
    cosine = cosines(effects[0], effects[1], products)[0][live]
    top = [of_run["top_tokens"][1][:, live].T for of_run in arrays]
    kept = shared(top[0], top[1]) * CONTEXTS
    raised = [of_run["promoted"][1, 0, live] for of_run in arrays]
    return (
        _mean((cosine < TURNED).double()),
        _mean((kept < CONTEXTS / 2).double()),
        _mean(cosine),
        _mean(kept / (2 * CONTEXTS - kept)),
        _mean(shared(raised[0], raised[1])),
    )


def _mean(values: Tensor) -> float:
    return float(values.mean())
