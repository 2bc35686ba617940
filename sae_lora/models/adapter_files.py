"""Adapters in peft's format: saved, loaded and read."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.models.language_model import LanguageModel


def save(adapters: PeftModel, folder: Path, base_model: str) -> None:
    """Write adapters for `PeftModel.from_pretrained`; `base_model` is their model's name or folder."""
    adapters.peft_config["default"].base_model_name_or_path = base_model
    # No embedding is adapted; to find that out itself, peft would look the base model up online.
    adapters.save_pretrained(str(folder), save_embedding_layers=False)


def load(model: LanguageModel, folder: Path) -> PeftModel:
    """Put saved adapters into the model, frozen and without dropout; returns peft's view of it.

    Raises:
        UserError: Where they are missing, damaged, or another model's.
    """
    with _explained(folder), warnings.catch_warnings():
        # peft only warns of weights that the file lacks.
        warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return PeftModel.from_pretrained(model.model, str(folder), torch_device=str(model.device)).eval()


def begin_with(adapters: PeftModel, folder: Path) -> None:
    """Give fresh adapters the values of saved ones of the same shape.

    Raises:
        UserError: Where they are missing, damaged or of another shape.
    """
    with _explained(folder, "init: "):
        weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        result = set_peft_model_state_dict(adapters, weights)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise UserError(
            f"init: the adapters in {folder} belong to other matrices than lora.targets and lora.blocks "
            f"name, such as {[*missing, *result.unexpected_keys][0]}"
        )


_BEFORE, _A = "base_model.model.", ".lora_A.weight"
"""A's key in a file is the matrix's dotted path in the transformers model, between these two."""


def saved_inputs(folder: Path) -> list[tuple[str, int]]:
    """Name and number of inputs of each adapted matrix; reads no weights.

    Raises:
        UserError: Where the adapters are missing or damaged.
    """
    with _explained(folder), safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        keys: list[str] = file.keys()
        return sorted(
            (key.removeprefix(_BEFORE).removesuffix(_A), int(file.get_slice(key).get_shape()[1]))
            for key in keys
            if key.endswith(_A)
        )


def saved_a(folder: Path, name: str) -> Tensor:
    """A of a matrix, `[rank, input]`, by its name in `saved_inputs`.

    Raises:
        UserError: Where the adapters are missing or damaged.
    """
    with _explained(folder), safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        return file.get_tensor(f"{_BEFORE}{name}{_A}")


@contextmanager
def _explained(folder: Path, before: str = "") -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UserWarning) as error:
        raise UserError(f"{before}the adapters in {folder} cannot be loaded: {error}") from error


def republish(folder: Path, to: Path, base_model: str | None, revision: str | None) -> None:
    """Copy saved adapters to an existing folder, with their model's repository, if any, and commit.

    Raises:
        UserError: Where they are missing or damaged.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    with _explained(folder):
        load_file(weights)  # a file that is cut short is found here
        config = PeftConfig.from_pretrained(str(folder))
    shutil.copyfile(weights, to / weights.name)
    config.base_model_name_or_path = base_model
    config.revision = revision
    config.save_pretrained(str(to))
