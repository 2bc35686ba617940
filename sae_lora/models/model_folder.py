"""The files of a model in a local folder, checked before anything is loaded. Imports no torch."""

import json
import zipfile
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from sae_lora.common.errors import listed
from sae_lora.config.schema import ModelConfig
from sae_lora.models.dimensions import UNQUANTISED, check_links, source, unusable

_NUMBERS = ("F64", "F32", "F16", "BF16")
"""Types of weights in safetensors files that are no codes of quantised weights."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of a file of weights in transformers. With `.index.json`, the file lists several."""
_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json", "bpe.codes")
"""Patterns of files that a tokenizer is read from."""
_JSON = (
    *("*config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    "*.index.json",
)
"""Patterns of JSON files that transformers reads. Each holds an object."""


def check_files(config: ModelConfig) -> None:
    """Check that the files of a model are complete. Models that are not in a folder pass.

    Raises:
        UserError: If a file is missing, incomplete or damaged.
    """
    folder = Path(source(config))
    if not folder.is_dir():
        return
    weights = [f"*{Path(name).suffix}" for name in _WEIGHTS]
    check_links(config, folder, (*_JSON, *_TOKENIZER, *weights))
    for file in sorted({file for pattern in _JSON for file in folder.glob(pattern)}):
        try:
            values = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise unusable(config, f"{file} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise unusable(config, f"{file} holds {json.dumps(values)[:40]}, not an object {{…}}")
    check_weights(config)
    check_tokenizer(config)


def check_weights(config: ModelConfig) -> None:
    """Check that the files of weights in the folder of a model are complete.

    Raises:
        UserError: If a file is missing, incomplete or damaged.
    """
    folder = Path(source(config))
    if folder.is_dir():
        for file in _weight_files(config, folder):
            _check_file(config, file)


def check_tokenizer(config: ModelConfig) -> None:
    """Check that the folder of a model has a tokenizer: transformers would look for one on the hub.

    Raises:
        UserError: If it has none.
    """
    folder = Path(source(config))
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER):
        raise unusable(
            config,
            "it has no tokenizer (tokenizer.json, tokenizer.model, …). Save the tokenizer that the "
            "model was trained with into the same folder: tokenizer.save_pretrained(…)",
        )


def has_local_tokenizer(config: ModelConfig) -> bool:
    """True if the tokenizer is on this machine, in a folder or in the Hugging Face cache."""
    if Path(source(config)).is_dir():
        return True
    file = try_to_load_from_cache(config.name, "tokenizer_config.json", revision=config.pinned_revision)
    return isinstance(file, str)


def _weight_files(config: ModelConfig, folder: Path) -> list[Path]:
    for name in _WEIGHTS:
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            files = [folder / shard for shard in _shards(config, index)]
            for file in files:
                if not file.exists():
                    raise unusable(config, f"{file} is missing; {index.name} lists it")
            return files
    raise unusable(config, f"{folder} has no weights ({' or '.join(_WEIGHTS)})")


def _shards(config: ModelConfig, index: Path) -> list[str]:
    """The files that an index lists."""
    values = json.loads(index.read_text())
    for key in ("weight_map", "metadata"):  # transformers reads both
        if not isinstance(values, dict) or not isinstance(values.get(key), dict):
            raise unusable(config, f"{index} has no object {{…}} with the key {key}")
    for name, shard in values["weight_map"].items():
        if not isinstance(shard, str):
            raise unusable(config, f"{index} names no file for the weight {name}: {shard!r}")
    return sorted(set(values["weight_map"].values()))


def files_of_weights(config: ModelConfig) -> str:
    """The names of the files of weights, for messages."""
    folder = Path(source(config))
    files = _weight_files(config, folder) if folder.is_dir() else []
    return listed([file.name for file in files], 3) or "its files of weights"


def files_of_tokenizer(config: ModelConfig) -> str:
    """The names of the files that a tokenizer is read from, for messages."""
    folder = Path(source(config))
    patterns = (*_TOKENIZER, "added_tokens.json", "special_tokens_map.json")
    files = {file.name for pattern in patterns for file in folder.glob(pattern)}
    return f"its tokenizer ({listed(sorted(files)) or 'from the hub'})"


def _check_file(config: ModelConfig, file: Path) -> None:
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise unusable(config, f"{file} is a pointer of Git LFS; fetch the file with `git lfs pull`")
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy") as opened:  # compares its size with its header
                for name in opened.keys():  # noqa: SIM118
                    weight = opened.get_slice(name)
                    stored, n_axes = weight.get_dtype(), len(weight.get_shape())
                    # Causal masks [1, 1, pos, pos] of old models are stored under the name bias.
                    is_weight = name.endswith("weight") or (name.endswith("bias") and n_axes < 4)
                    if is_weight and stored not in _NUMBERS:
                        quantised = f"its weight {name} is quantised ({stored} in {file.name})"
                        raise unusable(config, f"{quantised}, and {UNQUANTISED}")
            return
    except (OSError, SafetensorError) as error:
        raise unusable(config, f"{file} is damaged or incomplete: {error}") from error
    # Versions of torch before 1.6 wrote no zip files.
    if not start.startswith((b"PK", b"\x80")):  # \x80 begins a pickle
        raise unusable(config, f"{file} is no file of torch: it begins with {start[:16]!r}")
    if start.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise unusable(config, f"{file} is incomplete: it is a zip file without its end")
