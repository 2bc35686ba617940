"""Values of a run without details of the user's machine and accounts. Imports no torch."""

import re
from pathlib import Path, PurePath
from typing import Any

from sae_lora.config.schema import Config, ModelConfig, SAEConfig, as_list
from sae_lora.config.serialize import as_dict
from sae_lora.models.dimensions import EMBEDDED_NAME

BASE_MODEL = "<path of the base model>"
"""The name of a local model in an export: nobody else has its folder."""
"""The file of the model card, which every export has, and no run folder."""
_PATH = re.compile(
    r"(?<![\w:/.<\\])(?:(?:file|path):(?://)?)?(?:~[\w.-]*|\.\.)?/(?:[^\s'\"`,;:()/]+/)+([^\s'\"`,;:()/]*)"
    r"|(?<![\w\\])[A-Za-z]:\\(?:[^\s'\"`,;:()\\]+\\)*([^\s'\"`,;:()\\]*)"
)
"""A path outside this folder of at least two parts, or a path of Windows, in a text; a group is its last
part. An address such as https://… is no such path."""


def is_local(model: ModelConfig) -> bool:
    """True if the model is a folder of this machine: neither embedded nor from the hub."""
    if model.name == EMBEDDED_NAME:
        return False
    path = Path(model.name).expanduser()
    return model.commit is None or path.is_absolute() or path.is_dir()


def public(values: Any, model: ModelConfig) -> Any:
    """Plain values without absolute paths: each is cut to its last part, a local model to `BASE_MODEL`.

    Args:
        values: Nested dicts and lists of plain values.
        model: The run's model.
    """
    match values:
        case dict():
            return {key: public(value, model) for key, value in values.items()}
        case list():
            return [public(value, model) for value in values]
        case str() if values == model.name and is_local(model):
            return BASE_MODEL
        case str() if values.startswith(("/", "~/")):
            return PurePath(values).name
        case str():
            names_folder = is_local(model) and "/" in model.name
            text = values.replace(model.name, BASE_MODEL) if names_folder else values
            return _PATH.sub(lambda path: path[1] or path[2] or "", text)
        case _:
            return values


def public_config(config: Config, sae: SAEConfig) -> dict[str, Any]:
    """The config as plain values. `launcher`, `tracking` and output folders are left out.

    Args:
        config: The run's config.
        sae: The SAEs, with paths in the export.
    """
    values = as_dict(config) | {"sae": as_dict(Config(sae=sae))["sae"]}
    for name in ("launcher", "tracking", "output_dir"):
        del values[name]
    del values["data"]["cache_dir"]
    if config.data.files is not None:
        values["data"]["files"] = [PurePath(path).name for path in as_list(config.data.files)]
    values["init"] = last_part(config.init)
    return public(values, config.model)


def public_summary(
    summary: dict[str, Any], model: ModelConfig, saes: list[dict[str, Any]]
) -> dict[str, Any]:
    """The summary without host, visible GPUs, the address of the W&B run, and the hashes of files that
    an export changes.

    Args:
        summary: The run's summary.
        model: Its model.
        saes: The descriptions of its SAEs, with paths in the export.
    """
    left_out = ("host", "visible_gpus")
    method = summary.get("method", {})
    changed = {
        "sae": saes,
        "method": method | {"init": last_part(method.get("init"))},
        "environment": {
            key: value for key, value in summary["environment"].items() if key not in left_out
        },
        "tracked_at": None,
    }
    hashes = {"weights", "files", "digest"}
    values = {key: value for key, value in (summary | changed).items() if key not in hashes}
    return public(values, model)


def last_part(path: Any) -> Any:
    """The last part of a path, or of each path of a list."""
    if isinstance(path, list):
        return [last_part(each) for each in path]
    return None if path is None else PurePath(path).name
