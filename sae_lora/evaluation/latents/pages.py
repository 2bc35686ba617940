"""Pages to browse the latents of a run, which need no network and no server.

evaluation/latents/
    index.html              the page
    text.js                 the held-out text, and the texts of tokens
    <n>/measures.js         the measures of all latents of SAE n
    <n>/<shard>.js          contexts, histograms and promoted tokens of `SHARD` latents

A page that is opened from a disk may not read files, but may run scripts: the data are calls of a
function, with arrays in base64. They can be made again from `latents.safetensors`.
"""

import base64
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.common.files import new_folder
from sae_lora.evaluation.latents import PAGE
from sae_lora.evaluation.latents.contexts import FULL, TOKENS_BEFORE
from sae_lora.evaluation.latents.tokens import texts_of
from sae_lora.records.folder import RunFolder

FOLDER, _INDEX = PAGE.split("/")
"""Folder of the pages in the run's `evaluation/`."""
SHARD = 256
"""Latents in one file."""
_SEARCHED = 5
"""Promoted tokens of each latent that a search reads."""
_KINDS = {torch.uint8: "Uint8Array", torch.int32: "Int32Array", torch.float32: "Float32Array"}
_MEASURES = (
    "density",
    "mean_activation",
    "highest",
    "ablation",
    "correlation",
    "overlap",
    "cosine",
    "norm_ratio",
)


def write(
    run: RunFolder, arrays: Mapping[str, Tensor], changes: Mapping[str, Any], tokenizer: Any
) -> Path:
    """Write the pages of a run over its older ones; return the path of `index.html`.

    Args:
        run: The run.
        arrays: The content of `latents.safetensors`.
        changes: The summary `Change` of each SAE, by hookpoint.
        tokenizer: The run's tokenizer.

    Raises:
        UserError: If a file has the name of the folder.
    """
    to = run.evaluation / FOLDER
    if to.exists() and not (to / _INDEX).is_file():
        raise UserError(f"{to} is not a folder of pages about latents: move it away")
    known, text = _Vocabulary.of(arrays, changes), arrays["tokens"]
    new, old = (to.with_name(f"{FOLDER}.{when}") for when in ("new", "old"))
    for left in (new, old):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with new_folder(new) as folder:
        strings = texts_of(tokenizer, known.ids.tolist())
        _send(folder / "text.js", "text", {"text": _packed(known.indices(text)), "strings": strings})
        for number, name in enumerate(changes):
            (folder / str(number)).mkdir()
            _write_sae(folder / str(number), number, of_sae(arrays, name), known)
        (folder / _INDEX).write_text(_page(run, changes, text), encoding="utf-8")
    if to.exists():
        to.rename(old)
    new.rename(to)
    shutil.rmtree(old, ignore_errors=True)
    return to / _INDEX


def of_sae(arrays: Mapping[str, Tensor], hookpoint: str) -> dict[str, Tensor]:
    """The arrays of one SAE in `latents.safetensors`, by their names."""
    prefix = f"{hookpoint}/"
    return {
        name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)
    }


def shown_tokens(arrays: Mapping[str, Tensor], hookpoints: Iterable[str]) -> Tensor:
    """The ids of all tokens of the text and of those that latents promote, each once, sorted."""
    shown = [arrays["tokens"], *(arrays[f"{name}/promoted"] for name in hookpoints)]
    return torch.cat([values.flatten().int() for values in shown]).unique()


class _Vocabulary:
    """The tokens that the pages show, numbered without gaps."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor], names: Mapping[str, Any]) -> "_Vocabulary":
        return cls(shown_tokens(arrays, names))

    def indices(self, ids: Tensor) -> Tensor:
        return torch.searchsorted(self.ids, ids.int()).int()


def _write_sae(folder: Path, number: int, arrays: Mapping[str, Tensor], known: _Vocabulary) -> None:
    promoted = known.indices(arrays["promoted"])
    _send(
        folder / "measures.js",
        f"{number}/measures",
        {name: _packed(arrays[name]) for name in _MEASURES}
        | {"promoted": _packed(promoted[:, 0, :, :_SEARCHED].transpose(0, 1))},
    )
    by_latent = {  # the latent is the first axis
        "places": arrays["top_tokens"].permute(2, 0, 1),
        "activations": arrays["context_activations"].permute(2, 0, 1, 3),
        "histogram": arrays["histogram"].transpose(0, 1),
        "promoted": promoted.permute(2, 0, 1, 3),
        "logits": arrays["promoted_logits"].permute(2, 0, 1, 3),
    }
    for shard, first in enumerate(range(0, len(by_latent["places"]), SHARD)):
        parts = {name: _packed(values[first : first + SHARD]) for name, values in by_latent.items()}
        _send(folder / f"{shard}.js", f"{number}/{shard}", parts)


def _packed(values: Tensor) -> dict[str, Any]:
    """An array as the page reads it: the name of its class in JavaScript, its shape, its bytes."""
    data = base64.b64encode(values.contiguous().numpy().tobytes()).decode()
    return {"kind": _KINDS[values.dtype], "shape": list(values.shape), "data": data}


def _send(file: Path, name: str, values: Mapping[str, Any]) -> None:
    content = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    file.write_text(f"receive({json.dumps(name)}, {content});\n", encoding="utf-8")


def _page(run: RunFolder, changes: Mapping[str, Any], text: Tensor) -> str:
    loader = PackageLoader("sae_lora.evaluation.latents.pages", ".")
    templates = Environment(loader=loader, autoescape=True, trim_blocks=True)
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    facts = {
        "length": text.shape[1],
        "shard": SHARD,
        "before": TOKENS_BEFORE,
        "full": FULL,
        "saes": [{"name": name, **asdict(change)} for name, change in changes.items()],
    }
    return templates.get_template("browser.html").render(
        run=run.path.name, summary=run.read_summary(), facts=facts
    )
