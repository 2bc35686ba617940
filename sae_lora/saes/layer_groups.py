"""Which blocks share an SAE: measured on text once for a model, and kept. Imports torch only then."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_lora.common.console import Display
from sae_lora.common.errors import ConfigError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.common.lazy_imports import quick_imports
from sae_lora.config.schema import Config
from sae_lora.config.serialize import as_dict
from sae_lora.models.dimensions import Dimensions

if TYPE_CHECKING:
    from sae_lora.data.corpus import Corpus


@dataclass(frozen=True)
class LayerGroups:
    """Groups of blocks that share an SAE, and how they were found."""

    groups: list[list[int]]
    """Blocks of each, all but the model's last."""
    amad: float
    """Mean over groups of the widest angular distance in each."""
    amad_by_count: list[float]
    """The same for the best groups of each number, from one on."""
    distances: list[list[float]]
    """Angular distance between residual streams after two blocks, a share of a half turn."""
    evenly: bool
    """Whether they are neighbours in equal numbers, rather than blocks that lie close."""
    sae_flops_saved: float
    """Share of the SAEs' own training FLOPs that is saved over one SAE for each block."""


def are_wanted(config: Config) -> bool:
    """Whether SAEs are asked for by groups of blocks."""
    return config.layer.amad_max is not None or config.layer.n_groups is not None


class Distances:
    """Angular distances between the blocks of models, each read or measured once."""

    def __init__(self) -> None:
        self._known: dict[str, Sequence[Sequence[float]]] = {}

    def of(self, config: Config) -> Sequence[Sequence[float]]:
        """Those of a config's model on its held-out text.

        Raises:
            UserError: Where the model or the text cannot be had.
        """
        values = as_dict(config)
        asked = json.dumps([values["model"], values["data"], values["train"]["dtype"]], sort_keys=True)
        if asked not in self._known:
            self._known[asked] = _distances(config)
        return self._known[asked]


def groups(config: Config, model: Dimensions, known: Distances) -> LayerGroups:
    """The groups that `layer` asks for. The model is loaded where its distances are not known yet.

    Args:
        config: Of a point.
        model: Its model's.
        known: What was measured before.

    Raises:
        ConfigError: For more groups than there are blocks without the last.
        UserError: Where the model or the text cannot be had.
    """
    layer, most = config.layer, model.n_blocks - 1
    if layer.n_groups is not None and layer.n_groups > most:
        allowed = f"groups from 1 to {most}, the blocks of {config.model.name} without the last"
        raise ConfigError("layer.n_groups", layer.n_groups, allowed, nearest=most)
    with quick_imports():
        import torch

        from sae_lora.saes import block_distances  # brings torch in

    distances = torch.tensor(known.of(config), dtype=torch.float64)
    found = block_distances.group_blocks(distances, amad_max=layer.amad_max, n_groups=layer.n_groups)
    blocks, amad = found.groups, found.amad
    if layer.evenly:
        blocks = block_distances.evenly_spaced(most, len(blocks))
        amad = block_distances.amad(distances, blocks)
    return LayerGroups(
        groups=blocks,
        amad=amad,
        amad_by_count=list(found.amad_by_count),
        distances=distances.tolist(),
        evenly=layer.evenly,
        sae_flops_saved=block_distances.sae_flops_saved(len(blocks), most),
    )


def _distances(config: Config) -> Sequence[Sequence[float]]:
    """Angular distances between blocks on the held-out text, from the cache where they are there."""
    with quick_imports():
        from sae_lora.common import hub
        from sae_lora.data import corpus
        from sae_lora.models import loading  # bring torch in

    with Display() as show:
        text = corpus.load(config.data, loading.load_tokenizer(config.model), 1)

        def file() -> Path:
            name, revision = config.model.name, config.model.revision
            commit = config.model.commit or hub.cached_commit(name, revision)
            measured_on = [name, revision, commit, text.description["corpus"], config.train.dtype.name]
            key = hashlib.sha256(json.dumps(measured_on).encode()).hexdigest()[:16]
            return Path(config.data.cache_dir).expanduser() / "distances" / f"{key}.json"

        if file().exists():
            return json.loads(file().read_text())
        found = _measure(config, text, show)
        file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file(), as_json(found))  # by now the model's commit is known
        return found


def _measure(config: Config, text: "Corpus", show: Display) -> list[list[float]]:
    from sae_lora.models import loading
    from sae_lora.models.loading import device_of
    from sae_lora.saes import block_distances  # bring torch in

    show.stage(f"measuring distances between the blocks of {config.model.name}")
    model = loading.load_model(config.model, config.train.dtype, device_of(config))
    at_once = max(1, config.train.eval_batch_tokens // config.data.context_length)
    count, total = show.counter("measuring", "tokens"), text.validation.size
    found = block_distances.angular_distances(
        model,
        text.validation_tokens.split(at_once),
        text.special_ids,
        lambda tokens: count(tokens, total),
    )
    show.end()
    return found.tolist()
