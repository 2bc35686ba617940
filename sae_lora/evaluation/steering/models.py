"""A run's models with a latent added to each text, and the log-probability that they give the text.

Models without the SAE (base, adapted): the latent's mean contribution to the reconstruction on its
positive texts, times the strength, is added to the residual stream. This is the latent's decoder
direction, scaled by its typical activation. Models with the SAE (spliced, student): the latent's typical
activation, times the strength, is added to its activation. The amount is the same before and after the
run, even if the run has trained the SAE. The latent is added at every position except those whose
activation the SAE keeps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.evaluation.steering.texts import Halves, Texts, residuals
from sae_lora.evaluation.subject import Cell, Replacement, Subject
from sae_lora.saes.loading import IdentitySAE
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Coder, Splice, decoded, reconstructed, spliced
from sae_lora.splice.kl import log_probabilities
from sae_lora.train.evaluator import NO_LABEL, next_tokens

_LOGITS_AT_ONCE = 2**22


class _SteeredSAE:
    """An SAE that adds amounts `[batch]` to the activations of latents `[batch]`, one per text."""

    def __init__(self, sae: Coder, latents: Tensor, amounts: Tensor) -> None:
        self._sae, self._latents, self._amounts = sae, latents, amounts

    def encode(self, x: Tensor) -> Tensor:
        code = self._sae.encode(x).clone()
        texts = torch.arange(len(code), device=code.device)
        code[texts, :, self._latents] += self._amounts[:, None].to(code.dtype)
        return code

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self._sae.decode(feature_acts)

    def decode_with(self, feature_acts: Tensor, x: Tensor) -> Tensor:
        return decoded(self._sae, feature_acts, x)


class SteeredModels:
    """A run's models, with a latent of one SAE added to each text.

    Raises:
        UserError: For a latent that is not active on any of its positive validation texts.
    """

    def __init__(self, subject: Subject, splice: Splice, halves: Halves) -> None:
        self._subject = subject
        self._splice = splice
        self._latents = torch.tensor(halves.latents, device=subject.device)
        self.activations, self.pushes = _typical_activations(subject, splice, halves)
        """Typical activation of each latent, `[latent]`, and its contribution to the residual stream,
        `[latent, d_model]`."""

    @torch.no_grad()
    def effects(self, cell: Cell, texts: Texts, strengths: Tensor) -> Tensor:
        """Change of the log-probability of each text in nats, `[strength, text]` in float64.

        `strengths` are the strengths of each text's latent, `[strength, text]`.
        """
        effects = []
        for rows in self._subject.slices(texts.tokens):
            tokens = texts.tokens[rows].to(self._subject.device)
            which = texts.which[rows].to(self._subject.device)
            hidden = self._hidden(cell, tokens, which, strengths[:, rows].to(self._subject.device))
            plain, *steered = (
                text_log_probability(self._subject.head, states, tokens, texts.lengths[rows])
                for states in hidden
            )
            effects.append(torch.stack(steered) - plain)
        return torch.cat(effects, dim=1)

    def _hidden(self, cell: Cell, tokens: Tensor, which: Tensor, strengths: Tensor) -> Iterator[Tensor]:
        """Inputs of the head, `[text, pos, d_model]`: first without steering, then at each strength.

        The part of the model before the SAE is computed once for all of them.
        """
        subject, place = self._subject, self._splice.place
        model, splices = subject.model_of(cell), subject.splices_of(cell)
        elsewhere = [splice for splice in splices if splice.place != place]
        earlier = [splice for splice in elsewhere if splice.block < place.begins]
        later = [splice for splice in elsewhere if splice.block >= place.begins]
        resid = None
        if place.begins:
            with spliced(model, earlier, tokens):
                resid = model.resid_entering(place.begins, tokens)
        sae = next((splice.sae for splice in splices if splice.place == place), None)
        plain = IdentitySAE().eval() if sae is None else sae
        for coder in (plain, *(self._coder(sae, which, amounts) for amounts in strengths)):
            steered = self._splice._replace(sae=coder)
            if sae is None:  # the activation itself, with what is added to it
                steered = steered._replace(reads=None)
            inside = [steered] if place.is_inside else []
            entering = resid
            if not place.is_inside:
                assert resid is not None  # a block's output enters the next one
                entering = reconstructed(steered, resid, tokens)
            with spliced(model, inside + later, tokens):
                hidden = model.hidden(tokens, place.begins, entering)
            yield hidden

    def _coder(self, sae: Coder | None, which: Tensor, strengths: Tensor) -> Coder:
        """The coder at the SAE's place, for the latent and the strength of each text, `[text]`."""
        if sae is None:
            added = (strengths[:, None] * self.pushes[which])[:, None]
            return Replacement(lambda resid: resid + added)
        return _SteeredSAE(sae, self._latents[which], strengths * self.activations[which])


@torch.no_grad()
def _typical_activations(subject: Subject, splice: Splice, halves: Halves) -> tuple[Tensor, Tensor]:
    """Mean activation of each latent, `[latent]`, and mean contribution to the reconstruction,
    `[latent, d_model]`, over the tokens of its positive validation texts on which it is active.

    The contribution is the reconstruction minus the one without the latent, which works for every kind
    of decoder.
    """
    texts = halves.validation
    number, d_model = len(halves.latents), subject.model.config.hidden_size
    tokens = torch.zeros(number, device=subject.device)
    activations = torch.zeros(number, device=subject.device)
    pushes = torch.zeros(number, d_model, device=subject.device)
    positions = torch.arange(texts.tokens.shape[1])
    for rows, resid, kept in residuals(subject, splice, texts.tokens):
        positive = (positions < texts.lengths[rows, None]) & texts.positive[rows, None]
        read = positive.to(subject.device) & ~kept
        if not read.any():
            continue
        which = texts.which[rows].to(subject.device)[:, None].expand_as(read)[read]
        latents = torch.tensor(halves.latents, device=subject.device)[which]
        code = splice.sae.encode(resid[read])
        values = code.gather(-1, latents[:, None])
        without = code.scatter(-1, latents[:, None], 0)
        added = (splice.sae.decode(code) - splice.sae.decode(without)).float()
        active = values[:, 0] > 0
        tokens.index_add_(0, which[active], torch.ones_like(tokens[which[active]]))
        activations.index_add_(0, which[active], values[active, 0].float())
        pushes.index_add_(0, which[active], added[active])
    for latent, count in zip(halves.latents, tokens.tolist(), strict=True):
        if count == 0:
            raise UserError(
                f"latent {latent} at {splice.hookpoint} is not active on any token of its positive "
                "validation texts, so its typical activation is unknown"
            )
    return activations / tokens, pushes / tokens[:, None]


def text_log_probability(head: Head, hidden: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Log-probability of each text in nats, given its first token, `[text]` in float64 on the CPU.

    `hidden` is the head's input, `[text, pos, d_model]`; tokens are `[text, pos]`. `lengths`, `[text]`,
    excludes padding.
    """
    labels = next_tokens(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    beyond = positions >= lengths.to(tokens.device)[:, None] - 1
    labels = labels.masked_fill(beyond, NO_LABEL).flatten()
    at_once = max(1, _LOGITS_AT_ONCE // head.d_vocab)
    scores = []
    for states, following in zip(
        hidden.flatten(0, 1).split(at_once), labels.split(at_once), strict=True
    ):
        log_p = log_probabilities(head.logits(states))
        scores.append(log_p.gather(-1, following.clamp(min=0)[:, None])[:, 0])
    sums = torch.cat(scores).double().masked_fill(labels == NO_LABEL, 0)
    return sums.reshape(tokens.shape).sum(1).cpu()
