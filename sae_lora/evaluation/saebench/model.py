"""A run's model and SAE in the form that SAEBench expects, with TransformerLens's names."""

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
    """A transformers model with one hook, at an SAE's hookpoint. Changes the tokenizer in place."""

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
        # The tokenizer lists its vocabulary in an order that differs between processes.
        vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
        tokenizer.get_vocab = lambda: vocabulary

    def run_with_cache(self, *arguments: Any, **keywords: Any) -> Any:
        """Run on tokens or, unlike `HookedProxyLM`, on texts."""
        return super(HookedProxyLM, self).run_with_cache(*arguments, **keywords)

    def forward(self, tokens: Tensor | str | list[str], *arguments: Any, **keywords: Any) -> Any:
        """Forward pass as in a HookedTransformer; with `stop_at_layer`, it stops after the hook."""
        if not isinstance(tokens, Tensor):
            tokens = self.to_tokens(tokens)
        stops = keywords.get("stop_at_layer") is not None
        keywords["_names_filter"] = [self.hookpoint] if stops else None
        return super().forward(tokens.to(self.cfg.device), *arguments, **keywords)

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = True,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Tensor:
        """Tokens `[text, pos]`, with BOS first unless `prepend_bos` is false."""
        texts = [input] if isinstance(input, str) else input
        encoded = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        tokens = encoded["input_ids"].long()
        bos: Any = self.tokenizer.bos_token_id
        if prepend_bos is not False and bos is not None:
            tokens = torch.cat([torch.full_like(tokens[:, :1], bos), tokens], dim=1)
        return tokens.to(self.cfg.device) if move_to_device else tokens


@dataclass(frozen=True)
class Pair:
    """A model of a run and one of its SAEs."""

    name: str
    """Name of the model in SAEBench."""
    subject: Subject
    splice: Splice
    model: Model
    sae: Any
    """A copy of the SAE with the config that SAEBench expects, and decoder rows of length 1."""


def pairs(subject: Subject, hookpoint: str) -> dict[Cell, Pair]:
    """The plain model with the SAE before the run, if it existed, and the adapted model with the SAE
    after the run."""
    by_cell = {}
    for cell in (Cell.spliced, Cell.student):
        for splice in subject.splices_of(cell):
            if splice.hookpoint == hookpoint:
                name = f"{subject.folder.path.name}-{cell}"
                tokenizer = subject.padding_tokenizer()
                model = Model(subject.model_of(cell), tokenizer, hookpoint, name)
                by_cell[cell] = Pair(name, subject, splice, model, _described(splice, name, subject))
    return by_cell


@torch.no_grad()
def have_same_input(pairs: dict[Cell, Pair]) -> bool:
    """True if two models have the same SAE and it reads the same activations in both."""
    if len(pairs) < 2:
        return False
    untrained, trained = pairs.values()
    if untrained.splice.sae is not trained.splice.sae:
        return False
    first, second = (
        pair.model.run_with_cache(pair.subject.tokens[:2], stop_at_layer=pair.splice.block + 1)[1]
        for pair in (untrained, trained)
    )
    return torch.equal(first[untrained.splice.hookpoint], second[trained.splice.hookpoint])


def _described(splice: Splice, model_name: str, subject: Subject) -> Any:
    sae: Any = copy.deepcopy(getattr(splice.sae, "sae", splice.sae))
    with contextlib.suppress(NotImplementedError):
        sae.fold_W_dec_norm()
    metadata = sae.cfg.metadata
    metadata.model_name = model_name
    metadata.hook_name = splice.hookpoint
    metadata.hook_layer = splice.block
    metadata.hook_head_index = None
    metadata.context_size = subject.tokens.shape[1]
    metadata.prepend_bos = True
    metadata.dataset_trust_remote_code = False
    metadata.model_from_pretrained_kwargs = {}
    return sae
