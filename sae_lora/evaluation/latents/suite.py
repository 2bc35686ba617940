"""The suite `latents`: whether the latents of an SAE mean after training what they meant before it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.config.enums import SAEFamily
from sae_lora.config.execution import EvaluationConfig
from sae_lora.evaluation.bootstrap import Interval
from sae_lora.evaluation.latents import pages
from sae_lora.evaluation.latents.activations import CONTEXTS, Activations, Recorder
from sae_lora.evaluation.latents.contexts import Contexts
from sae_lora.evaluation.latents.effects import (
    cosines,
    derivative,
    directions,
    gram,
    promoted,
    slopes,
)
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.records.folder import RunFolder
from sae_lora.splice.trunk import Splices

DEPENDS_ON = ("latents_effect_tokens", "latents_pages")
"""The keys of `evaluation` that the suite depends on."""
FILE = "latents.safetensors"
"""The measures of every latent, in the run's `evaluation/`."""
_CELLS = (Cell.spliced, Cell.student)
TURNED = math.cos(math.radians(30))
"""An effect has turned if its cosine with the earlier one is less than this."""
LIVE = 10
"""A latent is summarised if it is active on this number of tokens before and after."""
_RESAMPLES = 100


@dataclass(frozen=True)
class Change:
    """Changes of the latents of an SAE, from the plain model (`spliced`) to the student.

    Shares and means over the latents that are active on ten tokens or more in both. Their 95% intervals
    are over latents; that of `turned` is over the sequences of the text.
    """

    latents: int
    """Number of latents of the SAE."""
    live: int
    """Number of latents that are summarised."""
    turned: Interval
    """Share of latents whose effect on the logits turned by more than 30°."""
    contexts_changed: Interval
    """Share of latents with more than half of their 20 most active tokens changed."""
    cosine: Interval
    """Mean cosine of the effects before and after."""
    norm_ratio: float | None
    """Median of the norms of the effects, after / before."""
    correlation: Interval
    """Mean correlation of activations, token by token."""
    overlap: Interval
    """Mean Jaccard index of the most active tokens."""
    density_ratio: float | None
    """Median of the densities, after / before."""
    activation_ratio: float | None
    """Median of the mean activations where active, after / before."""
    promoted: Interval
    """Mean share of the ten tokens that a latent promotes most that are the same."""


@dataclass(frozen=True)
class Latents:
    """The suite `latents`. The measures of every latent are in `evaluation/latents.safetensors`."""

    tokens: int
    """Held-out tokens on which activations are compared."""
    effect_tokens: int
    """Held-out tokens on which effects are measured: the first ones."""
    saes: dict[str, Change]
    """By hookpoint."""


def check(config: EvaluationConfig, folder: RunFolder) -> None:
    """Refuse a run whose latents have no state before it; nothing is loaded yet.

    Raises:
        UserError: If the run has trained new SAEs.
    """
    if folder.read_config()["sae"]["family"] == SAEFamily.new.name:
        raise UserError("the suite latents compares latents before and after a run; its SAEs are new")


def evaluate(subject: Subject, config: EvaluationConfig) -> Latents:
    """Measure the latents of each SAE of a run on its held-out text, and write the pages about them.

    Raises:
        UserError: If the head of the model is no matrix.
    """
    matrix = subject.head.matrix
    if matrix is None:
        raise UserError("the suite latents needs a model whose head is a matrix")
    activations = _activations(subject)
    decoders = [_decoders(subject, cell, activations) for cell in _CELLS]
    contexts = _contexts(subject, activations, decoders)
    count = max(1, config.latents_effect_tokens // subject.tokens.shape[1])
    text = subject.tokens[:count]
    products = gram(matrix)
    results: dict[str, Change] = {}
    arrays = {"tokens": subject.tokens.int(), "head_products": products.bfloat16()}
    for name, seen in activations.items():
        effects = [
            _Effects(_derivatives(subject, cell, name, text), of_cell[name])
            for cell, of_cell in zip(_CELLS, decoders, strict=True)
        ]
        of_latent = _of_latents(seen, effects, products, matrix) | contexts[name]
        results[name] = _summarised(seen, of_latent, effects, products)
        of_latent["derivative_after"] = effects[1].derivatives.mean(0).bfloat16()
        arrays |= {f"{name}/{key}": value for key, value in of_latent.items()}
    arrays = {name: values.cpu().contiguous() for name, values in arrays.items()}
    subject.begin("latents: writing")
    subject.folder.evaluation.mkdir(exist_ok=True)
    file = subject.folder.evaluation / FILE
    part = file.with_suffix(".part")
    save_file(arrays, part)
    part.replace(file)
    if config.latents_pages:
        pages.write(subject.folder, arrays, results, subject.adapted.tokenizer)
    tokens = max(seen.tokens for seen in activations.values())
    return Latents(tokens, text.numel(), results)


@torch.no_grad()
def _activations(subject: Subject) -> dict[str, Activations]:
    """Activations of the latents of each SAE, at positions that it replaces."""
    subject.begin("latents: activations")
    sums: dict[str, Activations] = {}
    for first, tokens in _batches(subject, subject.tokens):
        places = torch.arange(first, first + tokens.numel(), device=tokens.device).view_as(tokens)
        latents = []
        for cell in _CELLS:
            recorders, splices = _recorded(subject, cell)
            subject.hidden(cell, tokens, instead=splices)
            latents.append({name: recorder.taken() for name, recorder in recorders.items()})
        for splice in subject.after:
            counted = ~splice.special.positions(tokens)
            before, after = (each[splice.hookpoint][counted] for each in latents)
            if splice.hookpoint not in sums:
                sums[splice.hookpoint] = Activations(before.shape[-1], tokens.device)
            sums[splice.hookpoint].add(places[counted], before, after)
    return sums


def _batches(subject: Subject, text: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Batches of text `[sequence, pos]` on the device, each with the place of its first token."""
    for rows in subject.slices(text):
        yield rows.start * text.shape[1], text[rows].to(subject.device)


def _recorded(subject: Subject, cell: Cell) -> tuple[dict[str, Recorder], Splices]:
    """The SAEs of a cell that keep their latents, by hookpoint and as splices."""
    recorders = {splice.hookpoint: Recorder(splice.sae) for splice in subject.splices_of(cell)}
    splices = (splice._replace(sae=recorders[splice.hookpoint]) for splice in subject.splices_of(cell))
    return recorders, tuple(splices)


def _decoders(subject: Subject, cell: Cell, activations: Mapping[str, Activations]) -> dict[str, Tensor]:
    """The directions of the latents of each SAE in a cell, `[d_sae, d_model]`."""
    return {
        splice.hookpoint: directions(splice.sae, activations[splice.hookpoint].d_sae, subject.device)
        for splice in subject.splices_of(cell)
    }


def _contexts(
    subject: Subject,
    activations: Mapping[str, Activations],
    decoders: Sequence[Mapping[str, Tensor]],
) -> dict[str, dict[str, Tensor]]:
    """Contexts, histograms and the effect of ablation of the latents of each SAE.

    `ablation` is the rise of the CE, summed over all later tokens, if a latent is set to zero at one
    token: in nats, to first order, and as a mean over the tokens on which the latent is active.
    """
    subject.begin("latents: contexts")
    contexts = {name: Contexts(seen) for name, seen in activations.items()}
    rises = {name: torch.zeros_like(seen.active) for name, seen in activations.items()}
    for first, tokens in _batches(subject, subject.tokens):
        for number, cell in enumerate(_CELLS):
            recorders, splices = _recorded(subject, cell)
            gradients = slopes(subject.model_of(cell), subject.head, splices, tokens)
            for splice in splices:
                name = splice.hookpoint
                counted = ~splice.special.positions(tokens)
                latents = recorders[name].taken().detach()
                contexts[name].add(number, first, latents, counted)
                slope = gradients[name][counted].float() @ decoders[number][name].T
                rises[name][number] -= (latents[counted] * slope).sum(0)
    return {
        name: {
            "context_activations": contexts[name].activations,
            "histogram": contexts[name].histogram.int(),
            "ablation": (rises[name] / seen.active.clamp(min=1)).float(),
        }
        for name, seen in activations.items()
    }


@dataclass(frozen=True)
class _Effects:
    """Effects of the latents of an SAE in a cell."""

    derivatives: Tensor
    """`derivative` of each sequence, `[sequence, d_model, d_model]`."""
    decoder: Tensor
    """`[d_sae, d_model]`."""

    def resampled(self, times: Tensor) -> Tensor:
        """The effects `[latent, d_model]`, with each sequence this number of times, `[sequence]`."""
        mean = torch.einsum("s,ski->ki", times, self.derivatives) / times.sum()
        return self.decoder @ mean.T


def _derivatives(subject: Subject, cell: Cell, name: str, text: Tensor) -> Tensor:
    subject.begin(f"latents: effects, {cell.value}")
    model, splices = subject.model_of(cell), subject.splices_of(cell)
    (splice,) = (each for each in splices if each.hookpoint == name)
    parts = []
    for _, tokens in _batches(subject, text):
        counted = ~splice.special.positions(tokens)
        parts.append(derivative(model, splices, name, tokens, counted))
    return torch.cat(parts).float()


def _of_latents(
    seen: Activations, effects: Sequence[_Effects], products: Tensor, matrix: Tensor
) -> dict[str, Tensor]:
    """The measures of every latent; the first axis of those with two values is before, after."""
    ones = torch.ones(len(effects[0].derivatives), device=matrix.device)
    each = [of_cell.resampled(ones) for of_cell in effects]
    cosine, ratio = cosines(each[0], each[1], products)
    measures = {
        "active": seen.active,
        "density": seen.density,
        "mean_activation": seen.mean,
        "highest": seen.highest,
        "correlation": seen.correlation,
        "overlap": seen.overlap,
        "cosine": cosine,
        "norm_ratio": ratio,
        "top_activations": seen.top,
    }
    ids, values, histogram, bounds = map(
        torch.stack, zip(*(promoted(effect, matrix) for effect in each), strict=True)
    )
    return {name: values.float() for name, values in measures.items()} | {
        "top_tokens": seen.places.int(),
        "promoted": ids.int(),
        "promoted_logits": values,
        "logit_histogram": histogram.int(),
        "logit_bounds": bounds,
    }


def _summarised(
    seen: Activations, of_latent: dict[str, Tensor], effects: Sequence[_Effects], products: Tensor
) -> Change:
    live = (seen.active >= LIVE).all(0)
    chosen = {name: of_latent[name][..., live].double() for name in ("cosine", "overlap", "correlation")}
    raised = of_latent["promoted"][:, 0, live]
    top = seen.places[:, :, live]
    kept = shared(top[0].T, top[1].T) * CONTEXTS
    ratios = (seen.density, seen.mean)
    density, activation = (_median((each[1] / each[0])[live]) for each in ratios)
    return Change(
        latents=len(live),
        live=int(live.sum()),
        turned=_turned(effects, products, live),
        contexts_changed=_mean((kept < CONTEXTS / 2).double()),
        cosine=_mean(chosen["cosine"]),
        norm_ratio=_median(of_latent["norm_ratio"][live]),
        correlation=_mean(chosen["correlation"]),
        overlap=_mean(chosen["overlap"]),
        density_ratio=density,
        activation_ratio=activation,
        promoted=_mean(shared(raised[0], raised[1])),
    )


def shared(first: Tensor, second: Tensor) -> Tensor:
    """The share of the entries of each row of `first` that are in this row of `second`."""
    return (first[:, :, None] == second[:, None, :]).any(-1).double().mean(-1)


def _turned(effects: Sequence[_Effects], products: Tensor, live: Tensor) -> Interval:
    """The share of latents that turned, with an interval from resamples of the sequences."""
    if not live.any():
        return Interval(None, None, None)
    sequences = len(effects[0].derivatives)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for number in range(_RESAMPLES + 1):
        times = torch.ones(sequences)
        if number > 0:
            drawn = torch.randint(0, sequences, (sequences,), generator=generator)
            times = torch.bincount(drawn, minlength=sequences).float()
        before, after = (each.resampled(times.to(live.device))[live] for each in effects)
        cosine, _ = cosines(before, after, products)
        shares.append(float((cosine < TURNED).double().mean()))
    bounds = torch.tensor(shares[1:]).quantile(torch.tensor([0.025, 0.975]))
    return Interval(shares[0], float(bounds[0]), float(bounds[1]))


def _mean(values: Tensor) -> Interval:
    """The mean over latents, with a 95% interval from the normal distribution."""
    values = values[values.isfinite()]
    if len(values) < 2:
        return Interval(float(values) if len(values) else None, None, None)
    mean = float(values.mean())
    margin = 1.96 * float(values.std()) / math.sqrt(len(values))
    return Interval(mean, mean - margin, mean + margin)


def _median(values: Tensor) -> float | None:
    return values.median().item() if len(values) else None
