"""What a run trains: a frozen model with SAEs in place, and the few weights that may move."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from sae_lora.config.lora_targets import adapted_blocks
from sae_lora.config.schema import LoRAConfig
from sae_lora.models import lora
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import Observer, reconstructed, spliced
from sae_lora.splice.trunk import Splices, Trunk, cuts_around


class Student:
    """A model with SAEs in place, and the weights that are trained, in it or in the SAEs.

    Its work on a batch begins where something is trained: what lies before is the trunk's.

    Args:
        model: The model that computes its part; frozen but for `weights`.
        splices: The SAEs, by block, as they are in training.
        first: The first block that it computes itself. An SAE right before it is its own where `live`
            says so.
        live: How many of the SAEs, from the last on, see what is trained or are trained.
        weights: By name; all that an optimiser may move.
        before: The SAEs as they were before training: what `spliced_ce` is about. By default those in
            place.
        modules: What is trained beside the model, by name: SAEs, adapters on what they put back.
        is_new: Whether the SAEs were untrained before, so that there was no gap yet to be closed.
    """

    def __init__(
        self,
        model: LanguageModel,
        splices: Splices,
        first: int,
        live: int,
        weights: Mapping[str, nn.Parameter],
        before: Splices | None = None,
        modules: Mapping[str, nn.Module] | None = None,
        *,
        is_new: bool = False,
    ) -> None:
        self.model = model
        self.splices = splices
        self.before = splices if before is None else before
        """The SAEs as they were before training."""
        self.first = first
        """The first block that it computes itself."""
        self.frozen: Splices = splices[: len(splices) - live]
        """The SAEs whose work nothing that is trained changes."""
        self.live: Splices = splices[len(splices) - live :]
        """The SAEs that are trained, or that read what training has changed."""
        self.weights = dict(weights)
        """The trained weights by name."""
        self.modules = dict(modules or {})
        """What is trained beside the model, by name."""
        self.is_new = is_new
        """Whether the SAEs were untrained before."""

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What else training changes, by name."""
        return {
            f"{name}/{own}": buffer
            for name, module in self.modules.items()
            for own, buffer in module.named_buffers()
        }

    @property
    def cuts(self) -> set[int]:
        """The blocks whose input it or its untrained twin asks a trunk for."""
        return {self.first, *cuts_around(self.before), *cuts_around(self.frozen)}

    def without(self, hookpoint: str) -> "Student":
        """The same, without one of its SAEs; what it shares with this one moves with it."""
        left = tuple(splice for splice in self.splices if splice.hookpoint != hookpoint)
        live = sum(splice.hookpoint != hookpoint for splice in self.live)
        # What all of them cost before training is not asked for: of none it is known already.
        return Student(self.model, left, self.first, live, self.weights, (), self.modules)

    def alone(self, hookpoint: str, model: LanguageModel) -> "Student":
        """One of its SAEs alone in a model; what it shares with this one moves with it."""
        (splice,) = (splice for splice in self.splices if splice.hookpoint == hookpoint)
        return Student(model, (splice,), splice.place.begins, 1, {}, (), self.modules)

    def hidden(self, trunk: Trunk, observe: Observer | None = None) -> Tensor:
        """What the head reads, `[batch, pos, d_model]`, as training has made it so far.

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
        UserError: Where an SAE sits inside a block of an architecture for which that is not known.
    """

    def __init__(self, model: LanguageModel, splices: Splices, config: LoRAConfig) -> None:
        model.check_additions(splice.block for splice in splices if splice.place.is_inside)
        first_sae = splices[0].block
        view = model.view()
        self.adapters = lora.attach(view, config, first_sae)
        """peft's view of the model, for saving."""
        lora.set_adapter_dropout(view, True)
        first = min(adapted_blocks(config.blocks, first_sae, len(model.blocks)))
        live = sum(splice.block >= first for splice in splices)
        super().__init__(view, splices, first, live, lora.trainable_weights(view))


def cuts(students: Iterable[Student]) -> set[int]:
    """The blocks whose input one of the students asks a trunk for."""
    return set().union(*(student.cuts for student in students))
