"""The student of one run: the frozen model with its SAEs, and adapters of its own."""

from collections.abc import Iterable

from torch import Tensor, nn

from sae_lora import lora
from sae_lora.checks import adapted_blocks
from sae_lora.config import LoRAConfig
from sae_lora.models import LanguageModel
from sae_lora.splice import Observer, spliced
from sae_lora.trunk import Splices, Trunk, cuts_around


class Student:
    """A model with adapters of its own and SAEs in place; the weights are those of the plain model.

    Its work on a batch begins at the first adapted block: what lies before is the trunk's.

    Args:
        model: The plain model; it is not changed.
        splices: The SAEs, in the order of their places.
        config: The adapters. Their initial values come from torch's global random state.

    Raises:
        ConfigError: Where the model has no such blocks or matrices.
        UserError: Where an SAE sits inside a block of an architecture for which that is not known.
    """

    def __init__(self, model: LanguageModel, splices: Splices, config: LoRAConfig) -> None:
        model.check_additions(splice.block for splice in splices if splice.place.is_inside)
        first_sae = splices[0].block
        self.splices = splices
        self.model = model.view()
        self.adapters = lora.attach(self.model, config, first_sae)
        """peft's view of it, for saving."""
        self.first_adapted = min(adapted_blocks(config.blocks, first_sae, len(model.blocks)))
        """The first block with an adapter."""
        self.frozen: Splices = tuple(one for one in splices if one.block < self.first_adapted)
        """The SAEs whose work no adapter changes."""
        self.live: Splices = splices[len(self.frozen) :]
        """The SAEs that read what adapters have changed."""

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The adapters' weights by name: all that an optimiser may move."""
        return lora.trainable_weights(self.model)

    @property
    def cuts(self) -> set[int]:
        """The blocks whose input it or its untrained twin asks a trunk for."""
        return {self.first_adapted, *cuts_around(self.splices)}

    def hidden(self, trunk: Trunk, observe: Observer | None = None) -> Tensor:
        """What the head reads, `[batch, pos, d_model]`, with SAEs and adapters.

        Args:
            trunk: The batch.
            observe: Called each time one of the `live` SAEs has been applied.
        """
        resid = trunk.resid_entering(self.first_adapted, self.frozen)
        saes = {splice.hookpoint: splice.sae for splice in self.live}
        with spliced(self.model, saes, trunk.kept_positions(self.live), observe):
            return self.model.hidden(trunk.tokens, self.first_adapted, resid)


def cuts(students: Iterable[Student]) -> set[int]:
    """The blocks whose input one of the students asks a trunk for."""
    return set().union(*(student.cuts for student in students))
