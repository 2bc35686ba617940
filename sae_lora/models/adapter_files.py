"""Adapters in peft's format: saved, loaded, merged, and looked into."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from sae_lora.common.errors import UserError
from sae_lora.models.language_model import LanguageModel


def save(adapters: PeftModel, folder: Path, base_model: str) -> None:
    """Writes the adapters in peft's format, for `PeftModel.from_pretrained`.

    Args:
        adapters: What `attach` returned.
        folder: Where.
        base_model: Repository or folder of the model they belong to.
    """
    adapters.peft_config["default"].base_model_name_or_path = base_model
    # No embedding is adapted; asked to find that out itself, peft would look the base model up online.
    adapters.save_pretrained(str(folder), save_embedding_layers=False)


def load(model: LanguageModel, folder: Path) -> PeftModel:
    """Puts saved adapters into the model, frozen and without dropout.

    Args:
        model: The language model they belong to; changed in place.
        folder: Where `save` wrote them.

    Returns:
        peft's view of the same model.

    Raises:
        UserError: Where they are missing, damaged, or another model's.
    """
    try:
        with warnings.catch_warnings():
            # peft goes on without weights that the file lacks, and only warns of it.
            warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            adapters = PeftModel.from_pretrained(
                model.model, str(folder), torch_device=str(model.device)
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UserWarning) as error:
        raise UserError(f"the adapters in {folder} cannot be loaded: {error}") from error
    return adapters.eval()


def begin_with(adapters: PeftModel, folder: Path) -> None:
    """Gives fresh adapters the values of saved ones.

    Args:
        adapters: What `attach` returned.
        folder: Where `save` wrote adapters of the same shape.

    Raises:
        UserError: Where they are missing, damaged or of another shape.
    """
    try:
        given = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        result = set_peft_model_state_dict(adapters, given)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"init: the adapters in {folder} cannot be loaded: {error}") from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise UserError(
            f"init: the adapters in {folder} belong to other matrices than lora.targets and lora.blocks "
            f"name, such as {[*missing, *result.unexpected_keys][0]}"
        )


_A_IN_FILE = ".lora_A.weight"


def saved_inputs(folder: Path) -> list[tuple[str, int]]:
    """The matrices of saved adapters, by name, and how many inputs each has; no weights are read.

    Args:
        folder: Where `save` wrote them.

    Raises:
        UserError: Where they are missing or damaged.
    """
    with _opened(folder) as file:
        keys = _keys_of_a(file)
        return sorted((name, int(file.get_slice(key).get_shape()[1])) for name, key in keys.items())


def saved_a(folder: Path, name: str) -> Tensor:
    """A of one matrix of saved adapters, `[rank, input]`.

    Args:
        folder: Where `save` wrote them.
        name: The matrix, as `saved_inputs` has it.

    Raises:
        UserError: Where they are missing or damaged.
    """
    with _opened(folder) as file:
        return file.get_tensor(_keys_of_a(file)[name])


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    path = weights_file(folder)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"the adapters in {folder} cannot be read: {error}") from error


def _keys_of_a(file: Any) -> dict[str, str]:
    """A's keys in a file by the dotted path of the matrix in the transformers model.

    peft's own view of that lies around it.
    """
    keys: list[str] = file.keys()
    return {
        key.removeprefix("base_model.model.").removesuffix(_A_IN_FILE): key
        for key in keys
        if key.endswith(_A_IN_FILE)
    }


def weights_file(folder: Path) -> Path:
    """The file in a folder of saved adapters that holds their weights."""
    return folder / SAFETENSORS_WEIGHTS_NAME


def merged(adapters: PeftModel) -> PreTrainedModel:
    """The model with the adapters added to its weights, which are changed in place."""
    return adapters.merge_and_unload()  # pyright: ignore[reportReturnType]


def republish(folder: Path, to: Path, base_model: str | None, revision: str | None) -> None:
    """Writes saved adapters once more, with another word on which model they belong to.

    Args:
        folder: Where `save` wrote them.
        to: A folder that is there.
        base_model: Repository of that model; `None` where it is in none.
        revision: Its commit.

    Raises:
        UserError: Where they are missing or damaged.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        load_file(weights)  # a file that is cut short is found here
        config = PeftConfig.from_pretrained(str(folder))
        shutil.copyfile(weights, to / weights.name)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapters in {folder} cannot be read: {error}") from error
    config.base_model_name_or_path = base_model
    config.revision = revision
    config.save_pretrained(str(to))
