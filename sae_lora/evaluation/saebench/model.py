"""A run's model and SAE as SAEBench knows such: hooks by TransformerLens's names, all in the config."""

import contextlib
import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM
from torch import Tensor

from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import Splice


class Model(HookedProxyLM):
    """A transformers model with one hook.

    Args:
        model: With or without adapters.
        tokenizer: The model's; changed.
        hookpoint: Where the SAE sits.
        name: What SAEBench is to call it.
    """

    def __init__(self, model: LanguageModel, tokenizer: Any, hookpoint: str, name: str) -> None:
        module = model.name_at(hookpoint)
        super().__init__(model.model, tokenizer, hook_names=[module])
        point = self.hook_dict.pop(module)
        point.name = hookpoint
        self.hook_dict = {hookpoint: point}
        self.mod_dict = {hookpoint: point}
        self.named_modules_dict = {hookpoint: self.named_modules_dict[module]}
        self.hookpoint = hookpoint
        self.cfg = SimpleNamespace(
            model_name=name, d_model=model.config.hidden_size, device=str(model.device)
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda one: one[1]))
        tokenizer.get_vocab = lambda: vocabulary  # its own comes in another order in each process

    def run_with_cache(self, *given: Any, **named: Any) -> Any:
        """Also of texts."""
        return super(HookedProxyLM, self).run_with_cache(*given, **named)

    def forward(self, tokens: Tensor | str | list[str], *given: Any, **named: Any) -> Any:
        """As a HookedTransformer's; where it is to stop behind a block, it stops behind the hook."""
        if not isinstance(tokens, Tensor):
            tokens = self.to_tokens(tokens)
        stops = named.get("stop_at_layer") is not None
        named["_names_filter"] = [self.hookpoint] if stops else None
        return super().forward(tokens.to(self.cfg.device), *given, **named)

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = True,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Tensor:
        """`[text, pos]`, each behind a BOS unless that is not wanted."""
        texts = [input] if isinstance(input, str) else input
        found = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        tokens = found["input_ids"].long()
        bos: Any = self.tokenizer.bos_token_id
        if prepend_bos is not False and bos is not None:
            tokens = torch.cat([torch.full_like(tokens[:, :1], bos), tokens], dim=1)
        return tokens.to(self.cfg.device) if move_to_device else tokens


@dataclass(frozen=True)
class Pair:
    """A model and one of the SAEs that belong to it."""

    subject: Subject
    """The run that both are of."""
    splice: Splice
    """The SAE at its place."""
    model: Model
    """The model."""
    sae: Any
    """A copy of the SAE. In its config is all that SAEBench looks for, and its decoder's rows are of
    length 1, as SAEBench has them."""

    @property
    def name(self) -> str:
        """What SAEBench is to call it."""
        return self.model.cfg.model_name


def pairs(subject: Subject, hookpoint: str) -> dict[Cell, Pair]:
    """The plain model with the SAE as it was, if it was, and the adapted one with the SAE as it is.

    Args:
        subject: The run.
        hookpoint: Where the SAE sits.
    """
    found = {}
    for cell in (Cell.spliced, Cell.student):
        for splice in subject.splices_of(cell):
            if splice.hookpoint == hookpoint:
                name = f"{subject.folder.path.name}-{cell}"
                tokenizer = copy.deepcopy(subject.adapted.tokenizer)
                model = Model(subject.model_of(cell), tokenizer, hookpoint, name)
                found[cell] = Pair(subject, splice, model, _described(splice, name, subject))
    return found


@torch.no_grad()
def read_the_same(pairs: dict[Cell, Pair]) -> bool:
    """Whether there are two with the same SAE, which reads the same in both models."""
    if len(pairs) < 2:
        return False
    before, after = pairs.values()
    if before.splice.sae is not after.splice.sae:
        return False
    first, second = (
        one.model.run_with_cache(one.subject.tokens[:2], stop_at_layer=one.splice.block + 1)[1]
        for one in (before, after)
    )
    return torch.equal(first[before.splice.hookpoint], second[after.splice.hookpoint])


def _described(splice: Splice, model_name: str, subject: Subject) -> Any:
    sae: Any = copy.deepcopy(getattr(splice.sae, "sae", splice.sae))
    with contextlib.suppress(NotImplementedError):
        sae.fold_W_dec_norm()
    about = sae.cfg.metadata
    about.model_name = model_name
    about.hook_name = splice.hookpoint
    about.hook_layer = splice.block
    about.hook_head_index = None
    about.context_size = subject.tokens.shape[1]
    about.prepend_bos = True
    about.dataset_trust_remote_code = False
    about.model_from_pretrained_kwargs = {}
    return sae
