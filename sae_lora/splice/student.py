"""The student of a run: a frozen model with SAEs in place, and the few weights that are trained."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from sae_lora.config.lora_targets import adapted_blocks
from sae_lora.config.schema import LoRAConfig
from sae_lora.models import lora
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import Observer, reconstructed, spliced
from sae_lora.splice.trunk import Splices, Trunk, cuts_around


@dataclass(eq=False)
class Student:
    """A model with SAEs in place, and the weights that are trained, in it or in the SAEs.

    Its work on a batch begins where something is trained: the trunk does the work before.
    """

    model: LanguageModel
    """The model that computes its part; frozen except for `weights`."""
    frozen: Splices
    """The SAEs whose work does not depend on training, in the order of their places."""
    live: Splices
    """The SAEs after these: they are trained, or read what training has changed."""
    first: int
    """The first block that it computes itself. It also applies a live SAE right before this block."""
    weights: dict[str, nn.Parameter]
    """The trained weights, by name."""
    before: Splices
    """The SAEs as they were before training, to which `spliced_ce` belongs."""
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """Trained modules beside the model, by name: SAEs, adapters on their output."""
    is_new: bool = False
    """True where the SAEs were untrained before, so that there was no gap to close."""

    @property
    def splices(self) -> Splices:
        """All SAEs, in the order of their places."""
        return self.frozen + self.live

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Tensors beside the weights that training changes, by name."""
        return {
            f"{name}/{buffer_name}": buffer
            for name, module in self.modules.items()
            for buffer_name, buffer in module.named_buffers()
        }

    @property
    def cuts(self) -> set[int]:
        """The blocks whose input it needs from a trunk, before training and now."""
        return {self.first, *cuts_around(self.before), *cuts_around(self.frozen)}

    def without(self, hookpoint: str) -> "Student":
        """This student without one of its SAEs; the two share their weights."""
        frozen, live = (
            tuple(splice for splice in splices if splice.hookpoint != hookpoint)
            for splices in (self.frozen, self.live)
        )
        # No SAEs before training: nobody asks for their CE, and without SAEs it is known already.
        return Student(self.model, frozen, live, self.first, self.weights, (), self.modules)

    def alone(self, hookpoint: str, model: LanguageModel) -> "Student":
        """One of its SAEs alone in a model; the two share its weights."""
        (splice,) = (splice for splice in self.splices if splice.hookpoint == hookpoint)
        return Student(model, (), (splice,), splice.place.begins, {}, (), self.modules)

    def hidden(self, trunk: Trunk, observe: Observer | None = None) -> Tensor:
        """The states that the head reads, `[batch, pos, d_model]`, with the weights as they are now.

        Args:
            trunk: The batch.
            observe: Called each time one of the `live` SAEs has been applied.
        """
        resid = trunk.resid_entering(self.first, self.frozen)
        keep = trunk.kept_positions(self.live)
        later = {}
        for splice in self.live:
            if splice.place == Place(self.first - 1):
                assert resid is not None  # no SAE lies before the first block
                resid = reconstructed(splice.hookpoint, splice.sae, resid, keep, observe)
            else:
                later[splice.hookpoint] = splice.sae
        with spliced(self.model, later, keep, observe):
            return self.model.hidden(trunk.tokens, self.first, resid)


class LoRAStudent(Student):
    """A model with LoRA adapters of its own, fresh; its other weights are those of the plain model.

    Args:
        model: The plain model; it is not changed.
        splices: The SAEs, in the order of their places.
        config: The adapters. Their initial values come from torch's global random state.

    Raises:
        ConfigError: Where the model has no such blocks or matrices.
        UserError: Where an SAE sits inside a block of an architecture that does not support that.
    """

    def __init__(self, model: LanguageModel, splices: Splices, config: LoRAConfig) -> None:
        model.check_additions(splice.block for splice in splices if splice.place.is_inside)
        first_sae = splices[0].block
        view = model.view()
        self.adapters = lora.attach(view, config, first_sae)
        """peft's view of the model, for saving."""
        lora.set_adapter_dropout(view, True)
        first = min(adapted_blocks(config.blocks, first_sae, len(model.blocks)))
        n_frozen = sum(splice.block < first for splice in splices)
        frozen, live = splices[:n_frozen], splices[n_frozen:]
        super().__init__(view, frozen, live, first, lora.trainable_weights(view), before=splices)


def cuts(students: Iterable[Student]) -> set[int]:
    """The blocks whose input the students need from a trunk."""
    return set().union(*(student.cuts for student in students))
