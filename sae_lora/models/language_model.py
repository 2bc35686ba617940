"""Language models through transformers: loaded, and taken apart into backbone, blocks and head."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from sae_lora.common.errors import ConfigError, UserError, nearest_name
from sae_lora.config.enums import Hook
from sae_lora.models.hookpoints import PLACES, Place, resid_post

Key = TypeVar("Key")


class LanguageModel:
    """A causal LM taken apart where this project needs it: backbone, blocks and head.

    Args:
        model: The transformers model. It is frozen and put in evaluation mode.

    Raises:
        UserError: For an architecture whose blocks cannot be told apart.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False).eval()
        self.config: Any = model.config.get_text_config()
        self._blocks_at = self._find_blocks()
        self.blocks: nn.ModuleList = getattr(*self._blocks_at)
        self._known_additions: set[int] = set()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden(self, tokens: Tensor, first: int = 0, resid: Tensor | None = None) -> Tensor:
        """The states that the head reads, `[batch, pos, d_model]`, of tokens `[batch, pos]`.

        Args:
            first: The block to begin with.
            resid: The residual stream that this block reads, `[batch, pos, d_model]`; `None` where
                it is the first of all.
        """
        with self._segment(first, len(self.blocks), resid):
            return self._backbone(input_ids=tokens, use_cache=False).last_hidden_state

    def resid_entering(
        self, block: int, tokens: Tensor, first: int = 0, resid: Tensor | None = None
    ) -> Tensor:
        """The residual stream that a block reads, `[batch, pos, d_model]`.

        For the output of the last block, `block` is one more. `first` comes before `block`; it and the
        other arguments are as for `hidden`.
        """
        with outputs_of([self.blocks[block - 1]]) as outputs, self._segment(first, block, resid):
            self._backbone(input_ids=tokens, use_cache=False)
        return outputs[0]

    @contextmanager
    def _segment(self, first: int, end: int, resid: Tensor | None) -> Iterator[None]:
        """Inside the `with` block, the backbone's blocks are those from `first` to before `end`.

        The others keep their places, because the backbone looks things up by index (Gemma's masks), and
        pass on their input; the one before `first` passes on `resid`.
        """
        before = [_Passing(resid if block == first - 1 else None) for block in range(first)]
        blocks = [*before, *self.blocks[first:end], *(_Passing() for _ in self.blocks[end:])]
        holder, name = self._blocks_at
        holder._modules[name] = nn.ModuleList(blocks)
        try:
            yield
        finally:
            holder._modules[name] = self.blocks

    def view(self) -> "LanguageModel":
        """The same model once more, for adapters of its own: its weights are shared, not copied."""
        shared = [*self.model.parameters(), *self.model.buffers()]
        return LanguageModel(copy.deepcopy(self.model, {id(tensor): tensor for tensor in shared}))

    def recompute(self, first: int) -> None:
        """From this block on, keep only the input of each block for the backward pass.

        Hooks inside a block act again there as they did in the forward pass.
        """
        for block in self.blocks[first:]:
            block.forward = partial(_recomputed, block, block.forward)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., d_vocab]` of hidden states `[..., d_model]`.

        The model's own forward pass computes them, with its backbone replaced by the given states,
        so that soft-capping and scaling are those of transformers.
        """
        name = self.model.base_model_prefix
        backbone = self.model._modules[name]
        self.model._modules[name] = _Given(hidden.reshape(1, -1, hidden.shape[-1]))
        try:
            logits = self.model(input_ids=None, use_cache=False).logits
        finally:
            self.model._modules[name] = backbone
        return logits.reshape(*hidden.shape[:-1], -1)

    def module_at(self, hookpoint: str) -> nn.Module:
        """The module whose output, or the first of whose outputs, the hookpoint names.

        Args:
            hookpoint: `blocks.{l}.hook_resid_post`, `blocks.{l}.hook_resid_pre` (the output of the
                block before), `blocks.{l}.hook_attn_out` or `blocks.{l}.hook_mlp_out` (their additions
                to the residual stream), or a dotted module path.

        Raises:
            ConfigError: For a hookpoint that this model does not have; names near ones.
            UserError: For an architecture in which no module gives a block's addition.
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
            return self._adding(block, place.hook) if place.is_inside else block
        modules = dict(self.model.named_modules())
        if hookpoint in modules:
            return modules[hookpoint]
        raise ConfigError(
            "hookpoint",
            hookpoint,
            f"blocks.{{l}}.{PLACES}, or a module's dotted path",
            nearest_name(hookpoint, [resid_post(len(self.blocks) - 1), *modules]),
        )

    def name_at(self, hookpoint: str) -> str:
        """The dotted path, in the transformers model, of the module that `module_at` finds."""
        wanted = self.module_at(hookpoint)
        return next(name for name, module in self.model.named_modules() if module is wanted)

    def _adding(self, block: nn.Module, hook: Hook) -> nn.Module:
        """The module of a block whose output is added to the residual stream, by its usual name."""
        names = _ADDING[hook]
        if hasattr(block, _NORM_BEFORE_ADDING[Hook.mlp_out]):
            names = (_NORM_BEFORE_ADDING[hook],)
        for name in names:
            if isinstance(module := getattr(block, name, None), nn.Module):
                return module
        raise UserError(
            f"{type(self.model).__name__}: no SAE can sit at {hook.name} of a {type(block).__name__}, "
            f"which has no {' or '.join(names)}"
        )

    @torch.no_grad()
    def check_additions(self, blocks: Iterable[int]) -> None:
        """Check that these blocks add `attn_out` + `mlp_out` to the residual stream, up to rounding.

        Raises:
            UserError: For an architecture in which they add something else.
        """
        wanted = set(blocks) - self._known_additions
        if not wanted:
            return
        with ExitStack() as hooks:
            seen = {block: self._observed(block, hooks) for block in wanted}
            self.hidden(torch.arange(4, device=self.device)[None])
        for block, values in seen.items():
            # No sum of three, in whatever order, is rounded by more than this.
            rounding = torch.finfo(self.model.dtype).eps * sum(value.abs() for value in values.values())
            added = values["attn_out"] + values["mlp_out"]
            if not ((values["resid_post"] - values["resid_pre"] - added).abs() <= rounding).all():
                raise UserError(
                    f"{type(self.model).__name__}: SAEs can sit at resid_post alone: what block {block} "
                    "adds to the residual stream is something else than what its attention and its MLP "
                    "put out"
                )
        self._known_additions |= wanted

    def _observed(self, block: int, hooks: ExitStack) -> dict[str, Tensor]:
        """The activations of a block in the next forward pass, by name of the hook."""
        seen: dict[str, Tensor] = {}

        def take(name: str, value: Tensor) -> None:
            seen[name] = value.double()

        def take_input(module: object, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            take("resid_pre", given[0] if given else named["hidden_states"])

        handle = self.blocks[block].register_forward_pre_hook(take_input, with_kwargs=True)
        hooks.callback(handle.remove)
        adding = (Hook.attn_out, Hook.mlp_out, Hook.resid_post)
        parts = {hook.name: self.module_at(str(Place(block, hook))) for hook in adding}
        hooks.enter_context(observed(parts, take))
        return seen

    @property
    def _backbone(self) -> nn.Module:
        return getattr(self.model, self.model.base_model_prefix)

    def _find_blocks(self) -> tuple[nn.Module, str]:
        """The module that holds the list of blocks, and the list's name there."""
        depth = self.config.num_hidden_layers
        for module in self.model.get_decoder().modules():
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == depth:
                    return module, name
        raise UserError(f"{type(self.model).__name__}: found no list of its {depth} blocks")

    def check_parts(self) -> None:
        """Check that backbone, blocks and head together are the model.

        Raises:
            UserError: For an architecture in which they are not.
        """
        probe = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        half = len(self.blocks) // 2
        with torch.no_grad():
            whole = self.model(input_ids=probe, use_cache=False).logits
            resid = self.resid_entering(half, probe) if half else None
            parts = self.logits(self.hidden(probe, half, resid))
        if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3):
            raise UserError(
                f"{type(self.model).__name__}: its logits depend on more than one block's output, or "
                "than its last hidden state"
            )


@contextmanager
def observed(modules: Mapping[Key, nn.Module], take: Callable[[Key, Tensor], None]) -> Iterator[None]:
    """Inside the block, each pass of a module gives its key and its output, or the first of several.

    A block's output is the residual stream after it, `[batch, pos, d_model]`, as the next block reads
    it: inside `spliced`, after the SAE.
    """

    def hook(key: Key, output: Any) -> None:
        take(key, output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for key, module in modules.items():
            handle = module.register_forward_hook(lambda *given, key=key: hook(key, given[2]))
            hooks.callback(handle.remove)
        yield


@contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """A list to which a forward pass adds the output of each module, as `observed` gives it."""
    outputs: list[Tensor] = []
    with observed(dict(enumerate(modules)), lambda _, output: outputs.append(output)):
        yield outputs


_ADDING = {Hook.attn_out: ("self_attn", "attn", "attention"), Hook.mlp_out: ("mlp",)}
"""Names in transformers of the modules whose output a block adds to the residual stream."""
_NORM_BEFORE_ADDING = {
    Hook.attn_out: "post_attention_layernorm",
    Hook.mlp_out: "post_feedforward_layernorm",
}
"""The norms in between, where both exist (Gemma 2 and 3). Elsewhere the first alone is the norm before
the MLP."""


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
    """Inside the `with` block, the modules have their earlier hooks; entered in each backward pass."""

    def __init__(self, before: Mapping[nn.Module, Any]) -> None:
        self._before = before
        self._now: dict[nn.Module, Any] = {}

    def __enter__(self) -> None:
        self._now = {module: module._forward_hooks for module in self._before}
        for module, hooks in self._before.items():
            module._forward_hooks = hooks

    def __exit__(self, *_: object) -> None:
        for module, hooks in self._now.items():
            module._forward_hooks = hooks


class _Passing(nn.Module):
    """Stands in for a block: passes on its input, or the given states."""

    def __init__(self, given: Tensor | None = None) -> None:
        super().__init__()
        self.given = given

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self.given is None else self.given


class _Given(nn.Module):
    """Stands in for a backbone: returns the hidden states it was given."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> "_GivenOutput":
        return _GivenOutput(last_hidden_state=self.hidden)  # pyright: ignore[reportArgumentType]


class _GivenOutput(BaseModelOutputWithPast):
    """A backbone's output with nothing but the hidden states in it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
