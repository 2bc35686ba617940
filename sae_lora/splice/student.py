"""The student of a run: a frozen model with SAEs, and the trained weights."""

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
    """A model with SAEs, and the trained weights, in the model or in the SAEs.

    The student computes a batch from the first trained weight on; the trunk computes everything before.
    """

    model: LanguageModel
    """The model; frozen except for `weights`."""
    frozen: Splices
    """The SAEs whose outputs training does not change, in the order of their places."""
    live: Splices
    """The other SAEs, which come later: training changes them or their inputs."""
    first: int
    """The first block that the student computes. It also applies a live SAE right before this block."""
    weights: dict[str, nn.Parameter]
    """The trained weights, by name."""
    before: Splices
    """The SAEs before training, which determine `spliced_ce`."""
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """Trained modules outside the model, by name: SAEs, or adapters on their output."""
    is_new: bool = False
    """True if the SAEs are new, so that gap closed is undefined."""

    @property
    def splices(self) -> Splices:
        """All SAEs, in the order of their places."""
        return self.frozen + self.live

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the trained modules, which training changes besides the weights, by name."""
        return {
            f"{name}/{buffer_name}": buffer
            for name, module in self.modules.items()
            for buffer_name, buffer in module.named_buffers()
        }

    @property
    def cuts(self) -> set[int]:
        """The blocks whose input the student needs from the trunk, for SAEs before training and now."""
        return {self.first, *cuts_around(self.before), *cuts_around(self.frozen)}

    def without(self, hookpoint: str) -> "Student":
        """This student without one of its SAEs; the two share their weights."""
        frozen, live, before = (
            tuple(splice for splice in splices if splice.hookpoint != hookpoint)
            for splices in (self.frozen, self.live, self.before)
        )
        return Student(self.model, frozen, live, self.first, self.weights, before, self.modules)

    def alone(self, hookpoint: str, model: LanguageModel) -> "Student":
        """A student with only one of the SAEs, in the given model; the SAE's weights are shared."""
        (splice,) = (splice for splice in self.splices if splice.hookpoint == hookpoint)
        # `before` is empty, because the CE before training is not needed again.
        return Student(model, (), (splice,), splice.place.begins, {}, (), self.modules)

    def hidden(self, trunk: Trunk, observe: Observer | None = None) -> Tensor:
        """The states that the head reads, `[batch, pos, d_model]`, with the weights as they are now.

        Args:
            trunk: The trunk of the batch.
            observe: Called after each application of a `live` SAE.
        """
        resid = trunk.resid_entering(self.first, self.frozen)
        return hidden_from(self.model, self.first, self.live, trunk.tokens, resid, observe)


class LoRAStudent(Student):
    """A student with new LoRA adapters; its other weights are shared with the plain model.

    Args:
        model: The plain model, which is not changed.
        splices: The SAEs, in the order of their places.
        config: The adapters. Their initial values come from torch's global random state.
        before: The SAEs before training, if `splices` are trained; else `None`.
        modules: The trained SAEs, by name.

    Raises:
        ConfigError: If the model does not have the blocks or matrices to adapt, or an SAE is inside a
            block and the architecture does not support that.
    """

    def __init__(
        self,
        model: LanguageModel,
        splices: Splices,
        config: LoRAConfig,
        before: Splices | None = None,
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        model.check_additions(splice.place for splice in splices if splice.place.is_inside)
        first_sae = splices[0].block
        view = model.view()
        self.adapters = lora.attach(view, config, first_sae)
        """peft's view of the model, for saving."""
        lora.set_adapter_dropout(view, True)
        first = min(adapted_blocks(config.blocks, first_sae, len(model.blocks)))
        if modules:
            first = min(first, splices[0].place.begins)
        n_frozen = 0 if modules else sum(splice.block < first for splice in splices)
        frozen, live = splices[:n_frozen], splices[n_frozen:]
        weights = lora.trainable_weights(view) | named_weights(modules or {})
        super().__init__(view, frozen, live, first, weights, before or splices, modules or {})


def hidden_from(
    model: LanguageModel,
    first: int,
    live: Splices,
    tokens: Tensor,
    resid: Tensor | None,
    observe: Observer | None = None,
) -> Tensor:
    """The states that the head reads, `[batch, pos, d_model]`, of tokens `[batch, pos]`.

    Args:
        model: The model, with adapters.
        first: The first block to compute.
        live: The SAEs right before this block and in it or later ones.
        tokens: The tokens.
        resid: The residual stream that the block reads, before an SAE right before it; `None` for
            block 0.
        observe: Called after each application of an SAE.
    """
    later = []
    for splice in live:
        if splice.place == Place(first - 1):
            assert resid is not None  # no SAE is before block 0
            resid = reconstructed(splice, resid, tokens, observe)
        else:
            later.append(splice)
    with spliced(model, later, tokens, observe):
        return model.hidden(tokens, first, resid)


def named_weights(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The weights of the modules that are trained, by name."""
    return {
        f"{module_name}/{name}": weight
        for module_name, module in modules.items()
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }


def cuts(students: Iterable[Student]) -> set[int]:
    """The blocks whose input the students need from the trunk."""
    return set().union(*(student.cuts for student in students))
