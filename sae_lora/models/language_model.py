"""A transformers language model with access to its parts: backbone, blocks and head."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sae_lora.common.errors import ConfigError, UserError, is_out_of_memory, nearest_name
from sae_lora.config.enums import Hook
from sae_lora.models.attention.packed_rows import Answers, searched_once
from sae_lora.models.dimensions import short_cause, stated
from sae_lora.models.hookpoints import PLACES, Place, resid_post
from sae_lora.models.stand_ins import Given, Passing, first_argument

Key = TypeVar("Key")


class LanguageModel:
    """A causal LM with access to its backbone, its blocks and its head.

    Args:
        model: The transformers model. It is frozen and put in evaluation mode.
        structure: Its structure, if it is known.

    Raises:
        UserError: If the architecture has no list of blocks, or cannot be run on tokens alone.
    """

    def __init__(self, model: PreTrainedModel, structure: "_Structure | None" = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.notes: list[str] = []
        """Notes about its files, from loading."""
        self.shards: list[Any] = []
        """The `Shard` of each block, if the weights are divided among processes."""
        self._known_additions: set[Place] = set()
        self._packed_rows: Answers = {}
        with self.supported():
            self.config: Any = model.config.get_text_config()
            self._blocks_at = self._find_blocks()
            self.blocks: nn.ModuleList = getattr(*self._blocks_at)
            if structure is not None:
                self._structure = structure
            elif self.device.type != "meta":
                _ = self._structure  # now, because hooks may change later forward passes

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden(self, tokens: Tensor, first: int = 0, resid: Tensor | None = None) -> Tensor:
        """The states that the head reads, `[batch, pos, d_model]`, for tokens `[batch, pos]`.

        Args:
            first: The block to begin with.
            resid: The residual stream that this block reads, `[batch, pos, d_model]`; `None` for block
                0, which reads the embedding.
        """
        with self._segment(first, len(self.blocks), resid):
            return self._run(tokens).last_hidden_state

    def resid_entering(
        self, block: int, tokens: Tensor, first: int = 0, resid: Tensor | None = None
    ) -> Tensor:
        """The residual stream that a block reads, `[batch, pos, d_model]`.

        `block` may be the number of blocks, for the output of the last block. `first` is smaller than
        `block`; `first` and `resid` are as in `hidden`.
        """
        with self._segment(first, block, resid), outputs_of([self.blocks[block - 1]]) as outputs:
            self._run(tokens)
        return outputs[0]

    def _run(self, tokens: Tensor) -> Any:
        """The output of the backbone."""
        with searched_once(self._packed_rows):
            return self._backbone(input_ids=tokens, use_cache=False)

    @contextmanager
    def _segment(self, first: int, end: int, resid: Tensor | None) -> Iterator[None]:
        """Inside the `with` block, the backbone runs only the blocks from `first` to `end − 1`.

        Stand-ins replace the other blocks, because the backbone uses indices of blocks (for Gemma's
        masks). They return their input; the stand-in right before `first` returns `resid`.
        """
        tuples = self._structure.tuples
        blocks = [
            block
            if first <= index < end
            else Passing(block, tuples[index], resid if index == first - 1 else None)
            for index, block in enumerate(self.blocks)
        ]
        holder, name = self._blocks_at
        holder._modules[name] = nn.ModuleList(blocks)
        try:
            yield
        finally:
            holder._modules[name] = self.blocks

    def view(self) -> "LanguageModel":
        """A second model that shares the weights of this one, to which other adapters can be added."""
        shared = [*self.model.parameters(), *self.model.buffers(), *self.shards]
        copied = copy.deepcopy(self.model, {id(part): part for part in shared})
        view = LanguageModel(copied, self.__dict__.get("_structure"))
        view.shards = self.shards
        return view

    def divide(self, device: torch.device, processes: int) -> None:
        """Divide the weights of the blocks among processes; all of them must call this.

        The rest of the model moves to the device.
        """
        from sae_lora.models import sharding  # torch's FSDP takes a second to import

        self.shards = sharding.divide(self.blocks, device, processes)
        self.model.to(device)  # pyright: ignore[reportArgumentType]

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Inside the `with` block, the weights of a module are whole; all processes must enter it."""
        with ExitStack() as stack:
            if self.shards:
                from sae_lora.models.sharding import gathered

                for weight in module.parameters():
                    stack.enter_context(gathered(self.shards, weight))
            yield

    def recompute(self, first: int) -> None:
        """From block `first` on, keep only block inputs, and recompute the blocks in the backward pass.

        Hooks inside a block act in the recomputation as they did in the forward pass.
        """
        for block in self.blocks[first:]:
            block.forward = partial(_recomputed, block, block.forward)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., d_vocab]` of hidden states `[..., d_model]`.

        The forward pass of the transformers model computes them, with a stand-in for the backbone, so
        that soft-capping and scaling are those of transformers.
        """
        path, _, name = self._structure.backbone.rpartition(".")
        holder, backbone = self.model.get_submodule(path), self._backbone
        states = hidden.reshape(1, -1, hidden.shape[-1])
        holder._modules[name] = Given(backbone, states)
        try:
            # The stand-in does not read these tokens; some models ask for their shape.
            tokens = torch.zeros(states.shape[:-1], dtype=torch.long, device=states.device)
            logits = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            holder._modules[name] = backbone
        return logits.reshape(*hidden.shape[:-1], -1)

    def module_at(self, hookpoint: str) -> nn.Module:
        """The module whose output (the first, if it has several) is the activation at the hookpoint.

        Args:
            hookpoint: `blocks.{l}.hook_resid_post`, `blocks.{l}.hook_resid_pre` (the output of the
                previous block), `blocks.{l}.hook_attn_out` or `blocks.{l}.hook_mlp_out` (what attention
                or MLP adds to the residual stream), or the dotted path of a module.

        Raises:
            ConfigError: For a hookpoint that this model does not have. The message has the nearest one.
                It has the hook resid_post if no module of the block outputs what attention or MLP adds.
        """
        place = Place.named(hookpoint)
        if place is not None:
            if place.block >= len(self.blocks):
                last = len(self.blocks) - 1
                raise ConfigError(
                    "layer.index",
                    place.block,
                    f"a block from 0 to {last}",
                    nearest=min(place.block, last),
                )
            block = self.blocks[place.block]
            return self._adding_module(place) if place.is_inside else block
        modules = dict(self.model.named_modules())
        if hookpoint in modules:
            return modules[hookpoint]
        raise ConfigError(
            "hookpoint",
            hookpoint,
            f"blocks.{{l}}.{PLACES}, or the dotted path of a module",
            nearest_name(hookpoint, [resid_post(len(self.blocks) - 1), *modules]),
        )

    def name_at(self, hookpoint: str) -> str:
        """The dotted path, in the transformers model, of the module that `module_at` returns."""
        return self.name_of(self.module_at(hookpoint))

    def name_of(self, module: nn.Module) -> str:
        """The dotted path of a module in the transformers model."""
        return next(name for name, each in self.model.named_modules() if each is module)

    def _adding_module(self, place: Place) -> nn.Module:
        """The module whose output the block adds to the residual stream, found by its usual names."""
        block, hook = self.blocks[place.block], place.hook
        names = _ADDING[hook]
        if hasattr(block, _NORM_BEFORE_ADDING[Hook.mlp_out]):
            names = (_NORM_BEFORE_ADDING[hook],)
        for name in names:
            if isinstance(module := getattr(block, name, None), nn.Module):
                return module
        because = (
            f"block {place.block} of {type(self.model).__name__} has no module named "
            f"{' or '.join(names)} ({type(block).__name__})"
        )
        raise self._only_between_blocks(hook, because)

    def _only_between_blocks(self, hook: Hook, because: str) -> ConfigError:
        """The error that an SAE cannot be inside a block of this model."""
        usual = Hook.resid_post.name
        allowed = f"{usual}, or {Hook.resid_pre.name} from block 1 on"
        return ConfigError("layer.hook", hook.name, allowed, usual, because)

    @torch.no_grad()
    def check_additions(self, places: Iterable[Place]) -> None:
        """Check that blocks add the outputs at these places to the residual stream, up to rounding.

        All else that a block adds must be the output of another of its modules.

        Raises:
            ConfigError: If a block adds something else.
        """
        unchecked = set(places) - self._known_additions
        if not unchecked:
            return
        with ExitStack() as hooks:
            activations = {place: self._observed(place, hooks) for place in unchecked}
            self.hidden(torch.arange(4, device=self.device)[None])
        for place, values in activations.items():
            post, pre, added = (values.pop(name) for name in ("resid_post", "resid_pre", "asked"))
            others = [other for other in values.values() if other.shape == post.shape]
            # An upper bound of the rounding error of a sum of three, in any order.
            eps, size = torch.finfo(self.model.dtype).eps, post.abs() + pre.abs() + added.abs()
            rest = post - pre - added
            if not any(((rest - other).abs() <= eps * (size + other.abs())).all() for other in others):
                because = (
                    f"block {place.block} of {type(self.model).__name__} does not add exactly this "
                    "output and that of one other module to the residual stream"
                )
                raise self._only_between_blocks(place.hook, because)
        self._known_additions |= unchecked

    def _observed(self, place: Place, hooks: ExitStack) -> dict[str, Tensor]:
        """A dict that the next forward pass fills with activations of the block of a place.

        Its keys are resid_pre, resid_post, asked (the output at the place), and the names of the other
        modules of the block.
        """
        activations: dict[str, Tensor] = {}

        def take(name: str, value: Any) -> None:
            if isinstance(value, Tensor):  # a module may return something else
                activations[name] = value.to(torch.float64, copy=True)  # some blocks add in place

        def take_input(module: object, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            take("resid_pre", first_argument(positional, named))

        block = self.blocks[place.block]
        handle = block.register_forward_pre_hook(take_input, with_kwargs=True)
        hooks.callback(handle.remove)
        asked = self.module_at(str(place))
        others = {
            f"other {name}": module for name, module in block.named_children() if module is not asked
        }
        hooks.enter_context(observed({"asked": asked, "resid_post": block, **others}, take))
        return activations

    @property
    def _backbone(self) -> nn.Module:
        return self.model.get_submodule(self._structure.backbone)

    @cached_property
    def _structure(self) -> "_Structure":
        """Facts about the model that a forward pass of two tokens shows."""
        holder, _ = self._blocks_at
        path = next(name for name, module in self.model.named_modules() if module is holder)
        parts = path.split(".")
        around = [".".join(parts[: end + 1]) for end in range(len(parts))] if path else []
        called: list[str] = []
        outputs: dict[int, Any] = {}
        with ExitStack() as hooks, torch.no_grad():
            for name in around:
                handle = self.model.get_submodule(name).register_forward_pre_hook(
                    lambda *_, name=name: called.append(name)
                )
                hooks.callback(handle.remove)
            for index, block in enumerate(self.blocks):
                handle = block.register_forward_hook(
                    lambda *arguments, index=index: outputs.update({index: arguments[2]})
                )
                hooks.callback(handle.remove)
            self.model(
                input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False
            )
        if not called:
            raise self.unsupported("its blocks and its head are in one module")
        if len(outputs) < len(self.blocks):
            raise self.unsupported("a forward pass leaves out some of its blocks")
        lengths = [
            len(output) if isinstance(output, tuple | list) else None for output in outputs.values()
        ]
        return _Structure(called[0], lengths)

    def config_value(self, key: str) -> Any:
        """The value of a key of the model's config for text, or `None`."""
        return getattr(self.config, key, None)

    def _find_blocks(self) -> tuple[nn.Module, str]:
        """The module that contains the list of blocks, and the name of the list in it."""
        depth = stated(self.config_value)["n_blocks"]
        # In a model with several parts, the decoder comes first; in others it may be the head.
        for root in (self.model.get_decoder(), self.model):
            for module in root.modules():
                for name, child in module.named_children():
                    if isinstance(child, nn.ModuleList) and len(child) == depth:
                        return module, name
        raise self.unsupported(f"it has no list of {depth} blocks")

    def unsupported(self, because: str) -> UserError:
        """The error that this architecture is not supported."""
        return UserError(f"{type(self.model).__name__} is not supported: {because}")

    @contextmanager
    def supported(self, part: str = "") -> Iterator[None]:
        """Turn errors inside the block into one that names the architecture, and perhaps the part.

        Errors of every kind are possible: parts of a model run outside the conditions that transformers
        wrote them for.

        Raises:
            UserError: Replaces the error, which is its cause.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise self.unsupported(part + short_cause(error)) from error


class _Structure(NamedTuple):
    """The structure of a model as a forward pass shows it.

    Args:
        backbone: Dotted path of the outermost module around the blocks that the model calls with tokens.
        tuples: For each block, the length of the tuple that it returns; `None` if it returns a tensor.
    """

    backbone: str
    tuples: list[int | None]


@contextmanager
def observed(modules: Mapping[Key, nn.Module], take: Callable[[Key, Tensor], None]) -> Iterator[None]:
    """Inside the block, call `take` with the key and the output of each module that runs.

    If a module has several outputs, `take` gets the first. The output of a block is the residual stream
    `[batch, pos, d_model]` that the next block reads; inside `spliced`, that is after the SAE.
    """

    def hook(key: Key, output: Any) -> None:
        take(key, output[0] if isinstance(output, tuple | list) else output)

    with ExitStack() as hooks:
        for key, module in modules.items():
            handle = module.register_forward_hook(lambda *arguments, key=key: hook(key, arguments[2]))
            hooks.callback(handle.remove)
        yield


@contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """A list to which each forward pass appends the outputs of the modules, as in `observed`."""
    outputs: list[Tensor] = []
    with observed(dict(enumerate(modules)), lambda _, output: outputs.append(output)):
        yield outputs


_ADDING = {Hook.attn_out: ("self_attn", "attn", "attention"), Hook.mlp_out: ("mlp",)}
"""Names in transformers of modules whose output a block adds to the residual stream."""
_NORM_BEFORE_ADDING = {
    Hook.attn_out: "post_attention_layernorm",
    Hook.mlp_out: "post_feedforward_layernorm",
}
"""Norms of the outputs of attention and MLP, if a block has both (Gemma 2 and 3). In other models,
`post_attention_layernorm` is the norm before the MLP."""


def _recomputed(block: nn.Module, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **keywords)
    hooks = {module: module._forward_hooks.copy() for module in block.modules() if module is not block}
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _Hooked(hooks)),
        **keywords,
    )


class _Hooked:
    """Inside the `with` block, modules have the hooks of the forward pass. Recomputations enter it."""

    def __init__(self, forward_hooks: Mapping[nn.Module, Any]) -> None:
        self._forward_hooks = forward_hooks
        self._current_hooks: dict[nn.Module, Any] = {}

    def __enter__(self) -> None:
        self._current_hooks = {module: module._forward_hooks for module in self._forward_hooks}
        for module, hooks in self._forward_hooks.items():
            module._forward_hooks = hooks

    def __exit__(self, *_: object) -> None:
        for module, hooks in self._current_hooks.items():
            module._forward_hooks = hooks
