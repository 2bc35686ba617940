"""Files of adapters in peft's format: save, load and read."""

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import ParamWrapper
from peft.utils import SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.lora import adapted_weight


def save(adapters: PeftModel, folder: Path, base_model: str) -> None:
    """Save adapters for `PeftModel.from_pretrained`; `base_model`: name or folder of their model."""
    config = adapters.peft_config["default"]
    config.base_model_name_or_path = base_model
    parameters = [
        adapted_weight(name, layer)
        for name, layer in adapters.get_base_model().named_modules()
        if isinstance(layer, ParamWrapper)
    ]
    if parameters:  # the files contain no other hint on the order in which peft nests such adapters
        config.target_parameters = parameters[::-1]  # pyright: ignore[reportAttributeAccessIssue]
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
"""A file's key of an A is `_PREFIX`, the adapter's dotted path in the transformers model, and `_A`."""


class _SavedA(NamedTuple):
    """The entry of a file that holds A, `[experts · rank, input]`."""

    key: str
    experts: int
    inputs: int


def _saved(folder: Path) -> dict[str, _SavedA]:
    """Every entry of an A in the file, by the name of its matrix or of its stack of matrices."""
    config: Any = LoraConfig.from_pretrained(str(folder))
    entries: dict[str, _SavedA] = {}
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        keys: list[str] = file.keys()
        for key in keys:
            if key.endswith(_A):
                rows, inputs = (int(size) for size in file.get_slice(key).get_shape())
                adapter = key.removeprefix(_PREFIX).removesuffix(_A)
                name = _saved_name(adapter, config.target_parameters or [])
                entries[name] = _SavedA(key, rows // config.r, inputs)
    return entries


def _saved_name(adapter: str, parameters: Sequence[str]) -> str:
    """Name of a matrix. Adapters of several weights of a module are nested, the first one innermost."""
    module = adapter.replace(".base_layer", "")
    inside = [name for name in parameters if name.rpartition(".")[0] == module]
    depth = adapter.count(".base_layer")
    return inside[-1 - depth].removesuffix(".weight") if depth < len(inside) else adapter


def saved_inputs(folder: Path) -> list[tuple[str, int]]:
    """Name, as in `AdaptedMatrix`, and number of inputs of each adapted matrix, without reading weights.

    Raises:
        UserError: If the adapters are missing or damaged.
    """
    with _explained(folder):
        return sorted(
            (f"{name}[{expert}]" if saved.experts > 1 else name, saved.inputs)
            for name, saved in _saved(folder).items()
            for expert in range(saved.experts)
        )


def saved_a(folder: Path, name: str) -> Tensor:
    """A of a matrix, `[rank, input]`, by its name from `saved_inputs`.

    Raises:
        UserError: If the adapters are missing or damaged.
    """
    matrix, _, expert = name.removesuffix("]").partition("[")
    with _explained(folder), safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        saved = _saved(folder)[matrix]
        return file.get_tensor(saved.key).chunk(saved.experts)[int(expert or 0)]


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
