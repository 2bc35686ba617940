"""The latents of a run as Neuronpedia and SAEDashboard read them: files of `NeuronpediaDashboardBatch`.

<folder>/<n>/before/batch-0.json ...   the latents of SAE n in the plain model
<folder>/<n>/after/batch-0.json ...    the same latents after training

Source: sae-dashboard 0.8.0, neuronpedia/neuronpedia_dashboard.py. Neurons and other latents that
correlate with a latent are not measured; their lists are empty.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sae_lora.common.console import count
from sae_lora.common.errors import UserError
from sae_lora.common.files import check_writable, new_folder
from sae_lora.config.schema import Config
from sae_lora.config.serialize import load
from sae_lora.evaluation.latents.contexts import BINS, FULL, TOKENS_BEFORE, WIDTH
from sae_lora.evaluation.latents.effects import LOGIT_BINS
from sae_lora.evaluation.latents.pages import of_sae, shown_tokens
from sae_lora.evaluation.latents.suite import FILE
from sae_lora.evaluation.latents.tokens import texts_of
from sae_lora.models.loading import load_tokenizer
from sae_lora.records.status import with_weights

_AT_ONCE = 128
"""Latents in one file, as many as SAEDashboard writes."""
_WHEN = ("before", "after")
_NOT_MEASURED = (
    *(f"neuron_alignment_{kind}" for kind in ("indices", "values", "l1")),
    *(f"correlated_neurons_{kind}" for kind in ("indices", "l1", "pearson")),
    *(f"correlated_features_{kind}" for kind in ("indices", "l1", "pearson")),
    "decoder_weights_dist",
    "vector",
)


def export(run: Path, to: Path) -> str:
    """Write the latents of a run into a new folder; return what was written, in words.

    Args:
        run: Folder of a run with results of the suite `latents`.
        to: A new folder.

    Raises:
        UserError: If the run has no such results, or the folder exists or cannot be written.
    """
    folder = with_weights(run)
    file = folder.evaluation / FILE
    if not file.is_file():
        raise UserError(f"{run} has no measured latents: run `sae-lora evaluate {run} --suite latents`")
    if to.exists():
        raise UserError(f"--to: {to} exists; choose another folder")
    check_writable(to.parent, "--to")
    config, arrays = load(folder.config.read_text()), load_file(file)
    described = {sae["hookpoint"]: sae for sae in folder.read_summary()["sae"]}
    ids = shown_tokens(arrays, described).tolist()
    strings = dict(zip(ids, texts_of(load_tokenizer(config.model), ids), strict=True))
    with new_folder(to) as new:
        for number, (name, sae) in enumerate(described.items()):
            latents = _Latents(of_sae(arrays, name), arrays["tokens"], strings, _source(config))
            for cell, when in enumerate(_WHEN):
                heading = {
                    "model_id": config.model.name,
                    "layer": sae["block"],
                    "sae_set": sae.get("release") or name,
                    "sae_id_suffix": f"{folder.path.name}-{when}",
                }
                (new / str(number) / when).mkdir(parents=True)
                for batch, features in enumerate(latents.batches(cell)):
                    content = json.dumps(heading | {"features": features}, allow_nan=False)
                    (new / str(number) / when / f"batch-{batch}.json").write_text(content)
    return f"latents of {count(len(described), 'SAE')}, before and after training: {to}"


def _source(config: Config) -> str:
    """The name of the text."""
    return config.data.name or config.data.source.name


class _Latents:
    """The latents of one SAE.

    Args:
        arrays: Their measures.
        text: The held-out text, `[sequence, pos]`.
        strings: The texts of tokens by id.
        source: The name of the text.
    """

    def __init__(
        self, arrays: Mapping[str, Tensor], text: Tensor, strings: Mapping[int, str], source: str
    ) -> None:
        self._arrays, self._text, self._strings, self._source = arrays, text, strings, source

    def batches(self, cell: int) -> Iterator[list[dict[str, Any]]]:
        """Features for each file. `cell` is 0 for before training, 1 for after."""
        total = len(self._arrays["cosine"])
        for first in range(0, total, _AT_ONCE):
            yield [self._feature(n, cell) for n in range(first, min(total, first + _AT_ONCE))]

    def _feature(self, latent: int, cell: int) -> dict[str, Any]:
        of = self._arrays
        raised, lowered = (
            (
                [self._strings[id] for id in of["promoted"][cell, sign, latent].tolist()],
                _rounded(of["promoted_logits"][cell, sign, latent]),
            )
            for sign in (0, 1)
        )
        low, high = of["logit_bounds"][cell, latent].tolist()
        return {
            "feature_index": latent,
            **{name: [] for name in _NOT_MEASURED},
            "pos_str": raised[0],
            "pos_values": raised[1],
            "neg_str": lowered[0],
            "neg_values": lowered[1],
            "frac_nonzero": float(of["density"][cell, latent]),
            "freq_hist_data_bar_values": _middles(0, float(of["highest"][latent]), BINS),
            "freq_hist_data_bar_heights": of["histogram"][cell, latent].tolist(),
            "logits_hist_data_bar_values": _middles(low, high, LOGIT_BINS),
            "logits_hist_data_bar_heights": of["logit_histogram"][cell, latent].tolist(),
            "n_prompts_total": len(self._text),
            "n_tokens_in_prompt": self._text.shape[1],
            "dataset": self._source,
            "activations": list(self._activations(latent, cell)),
        }

    def _activations(self, latent: int, cell: int) -> Iterator[dict[str, Any]]:
        """The contexts in which the latent is most active, in SAEDashboard's bin of top activations."""
        length, highest = self._text.shape[1], float(self._arrays["highest"][latent])
        most = float(self._arrays["top_activations"][cell, 0, latent])
        for order, place in enumerate(self._arrays["top_tokens"][cell, :, latent].tolist()):
            if place < 0:
                return
            sequence, position = divmod(place, length)
            first = max(0, position - TOKENS_BEFORE)
            last = min(length, position - TOKENS_BEFORE + WIDTH)
            skipped = first - (position - TOKENS_BEFORE)
            shares = self._arrays["context_activations"][cell, order, latent]
            values = shares[skipped : skipped + last - first].double() * highest / FULL
            yield {
                "bin_min": -1,
                "bin_max": most,
                "bin_contains": -1,
                "tokens": [self._strings[id] for id in self._text[sequence, first:last].tolist()],
                "values": _rounded(values),
                "qualifying_token_index": position - first,
            }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def _middles(low: float, high: float, bins: int) -> list[float]:
    return [round(low + (bin + 0.5) * (high - low) / bins, 3) for bin in range(bins)]
