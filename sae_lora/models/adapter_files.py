"""Files of adapters in peft's format: save, load and read."""

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
    """Save adapters for `PeftModel.from_pretrained`; `base_model`: name or folder of their model."""
    adapters.peft_config["default"].base_model_name_or_path = base_model
    # No embedding is adapted. Without this argument, peft would look up the base model online.
    adapters.save_pretrained(str(folder), save_embedding_layers=False)


def load(model: LanguageModel, folder: Path) -> PeftModel:
    """Load saved adapters into the model, frozen and without dropout, and return peft's view of it.

    Raises:
        UserError: If they are missing or damaged, or belong to another model.
    """
    with _explained(folder), warnings.catch_warnings():
        # peft only warns if the file lacks weights; here that is an error.
        warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return PeftModel.from_pretrained(model.model, str(folder), torch_device=str(model.device)).eval()


def begin_with(adapters: PeftModel, folder: Path) -> None:
    """Set new adapters to the values of saved adapters of the same shape.

    Raises:
        UserError: If the saved adapters are missing, damaged or of another shape.
    """
    with _explained(folder, "init: "):
        weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
        result = set_peft_model_state_dict(adapters, weights)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise UserError(
            f"init: lora.targets and lora.blocks select other matrices than the adapters in {folder}, "
            f"for example {[*missing, *result.unexpected_keys][0]}"
        )


_PREFIX, _A = "base_model.model.", ".lora_A.weight"
"""A file's key of an A is `_PREFIX`, the matrix's dotted path in the transformers model, and `_A`."""


def saved_inputs(folder: Path) -> list[tuple[str, int]]:
    """Name and number of inputs of each adapted matrix, without reading weights.

    Raises:
        UserError: If the adapters are missing or damaged.
    """
    with _explained(folder), safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        keys: list[str] = file.keys()
        return sorted(
            (key.removeprefix(_PREFIX).removesuffix(_A), int(file.get_slice(key).get_shape()[1]))
            for key in keys
            if key.endswith(_A)
        )


def saved_a(folder: Path, name: str) -> Tensor:
    """A of a matrix, `[rank, input]`, by its name from `saved_inputs`.

    Raises:
        UserError: If the adapters are missing or damaged.
    """
    with _explained(folder), safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        return file.get_tensor(f"{_PREFIX}{name}{_A}")


@contextmanager
def _explained(folder: Path, prefix: str = "") -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UserWarning) as error:
        raise UserError(f"{prefix}the adapters in {folder} cannot be loaded: {error}") from error


def republish(folder: Path, to: Path, base_model: str | None, revision: str | None) -> None:
    """Copy saved adapters to an existing folder, with the model's repository and commit, if any.

    Raises:
        UserError: If they are missing or damaged.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    with _explained(folder):
        load_file(weights)  # fails if the file is truncated
        config = PeftConfig.from_pretrained(str(folder))
    shutil.copyfile(weights, to / weights.name)
    config.base_model_name_or_path = base_model
    config.revision = revision
    config.save_pretrained(str(to))
