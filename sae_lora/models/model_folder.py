"""The files of a model in a local folder, checked before anything is loaded. Imports no torch."""

import json
import zipfile
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from sae_lora.config.schema import ModelConfig
from sae_lora.models.dimensions import UNQUANTISED, source, unusable

_NUMBERS = ("F64", "F32", "F16", "BF16")
"""Types of weights in safetensors files that are no codes of quantised weights."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of a file of weights in transformers. With `.index.json`, the file lists several."""
_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json", "bpe.codes")
"""Patterns of files that a tokenizer is read from."""
_JSON = ("*config.json", "tokenizer.json", "special_tokens_map.json", "vocab.json", "*.index.json")


def check_files(config: ModelConfig) -> None:
    """Check that the files of a model are complete. Models that are not in a folder pass.

    Raises:
        UserError: If a file is missing, incomplete or damaged.
    """
    folder = Path(source(config))
    if not folder.is_dir():
        return
    for file in sorted({file for pattern in _JSON for file in folder.glob(pattern)}):
        try:
            json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise unusable(config, f"{file} cannot be read: {error}") from error
    if (folder / "adapter_config.json").exists():
        raise unusable(
            config, f"{folder} holds an adapter of peft; save the model after merge_and_unload()"
        )
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
            shards = json.loads(index.read_text()).get("weight_map") or {}
            files = [folder / shard for shard in sorted(set(shards.values()))]
            for file in files:
                if not file.exists():
                    raise unusable(config, f"{file} is missing; {index.name} lists it")
            return files
    raise unusable(config, f"{folder} has no weights ({' or '.join(_WEIGHTS)})")


def _check_file(config: ModelConfig, file: Path) -> None:
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise unusable(config, f"{file} is a pointer of Git LFS; fetch the file with `git lfs pull`")
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy") as opened:  # compares its size with its header
                types = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            for name, stored in types.items():
                if name.endswith("weight") and stored not in _NUMBERS:
                    quantised = f"its weight {name} is quantised ({stored} in {file.name})"
                    raise unusable(config, f"{quantised}, and {UNQUANTISED}")
            return
    except (OSError, SafetensorError) as error:
        raise unusable(config, f"{file} is damaged or incomplete: {error}") from error
    # Versions of torch before 1.6 wrote no zip files.
    if start.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise unusable(config, f"{file} is incomplete: it is a zip file without its end")
