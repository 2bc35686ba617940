"""The suite `latents`: whether the latents of an SAE mean after training what they meant before it."""

import math
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.config.execution import EvaluationConfig
from sae_lora.evaluation.bootstrap import Interval
from sae_lora.evaluation.latents.activations import CONTEXTS, Activations, Recorder
from sae_lora.evaluation.latents.effects import cosines, derivative, directions, gram, promoted
from sae_lora.evaluation.subject import Cell, Subject

DEPENDS_ON = ("latents_effect_tokens",)
"""The keys of `evaluation` that the suite depends on."""
FILE = "latents.safetensors"
"""The measures of every latent, in the run's `evaluation/`."""
_TURNED = math.cos(math.radians(30))
_LIVE = 10
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
    norm_ratio: float
    """Median of the norms of the effects, after / before."""
    correlation: Interval
    """Mean correlation of activations, token by token."""
    overlap: Interval
    """Mean Jaccard index of the most active tokens."""
    density_ratio: float
    """Median of the densities, after / before."""
    activation_ratio: float
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


def evaluate(subject: Subject, config: EvaluationConfig) -> Latents:
    """Measure the latents of each SAE of a run on its held-out text.

    Raises:
        UserError: If the run has trained new SAEs, or the head of the model is no matrix.
    """
    if not subject.before:
        raise UserError("the suite latents compares latents before and after a run; its SAEs are new")
    matrix = subject.head.matrix
    if matrix is None:
        raise UserError("the suite latents needs a model whose head is a matrix")
    activations = _activations(subject)
    count = max(1, config.latents_effect_tokens // subject.tokens.shape[1])
    text = subject.tokens[:count]
    results, arrays = {}, {}
    products = gram(matrix)
    for name, seen in activations.items():
        effects = [
            _effects(subject, cell, name, text, seen.d_sae) for cell in (Cell.spliced, Cell.student)
        ]
        of_latent = _of_latents(seen, effects, products, matrix)
        arrays |= {f"{name}/{key}": value.cpu().contiguous() for key, value in of_latent.items()}
        results[name] = _summarised(seen, of_latent, effects, products)
    subject.folder.evaluation.mkdir(exist_ok=True)
    file = subject.folder.evaluation / FILE
    part = file.with_suffix(".part")
    save_file(arrays, part)
    part.replace(file)
    tokens = max(seen.tokens for seen in activations.values())
    return Latents(tokens, text.numel(), results)


@torch.no_grad()
def _activations(subject: Subject) -> dict[str, Activations]:
    """Activations of the latents of each SAE, at positions that it replaces."""
    sums: dict[str, Activations] = {}
    for tokens in subject.batches():
        latents = [_latents(subject, cell, tokens) for cell in (Cell.spliced, Cell.student)]
        for splice in subject.after:
            counted = ~splice.special.positions(tokens)
            before, after = (each[splice.hookpoint][counted] for each in latents)
            if splice.hookpoint not in sums:
                sums[splice.hookpoint] = Activations(before.shape[-1], tokens.device)
            sums[splice.hookpoint].add(before, after)
    return sums


def _latents(subject: Subject, cell: Cell, tokens: Tensor) -> dict[str, Tensor]:
    recorders = {splice.hookpoint: Recorder(splice.sae) for splice in subject.splices_of(cell)}
    splices = tuple(
        splice._replace(sae=recorders[splice.hookpoint]) for splice in subject.splices_of(cell)
    )
    subject.hidden(cell, tokens, instead=splices)
    return {name: recorder.taken() for name, recorder in recorders.items()}


class _Effects:
    """Effects of the latents of an SAE in a cell."""

    def __init__(self, derivatives: Tensor, decoder: Tensor) -> None:
        self._derivatives, self._decoder = derivatives, decoder

    def resampled(self, times: Tensor) -> Tensor:
        """The effects `[latent, d_model]`, with each sequence this number of times, `[sequence]`."""
        mean = torch.einsum("s,ski->ki", times, self._derivatives) / times.sum()
        return self._decoder @ mean.T

    @property
    def sequences(self) -> int:
        return len(self._derivatives)


def _effects(subject: Subject, cell: Cell, name: str, text: Tensor, d_sae: int) -> _Effects:
    model, splices = subject.model_of(cell), subject.splices_of(cell)
    (splice,) = (each for each in splices if each.hookpoint == name)
    parts = []
    for rows in subject.slices(text):
        tokens = text[rows].to(subject.device)
        counted = ~splice.special.positions(tokens)
        parts.append(derivative(model, splices, name, tokens, counted))
    return _Effects(torch.cat(parts), directions(splice.sae, d_sae, subject.device))


def _of_latents(
    seen: Activations, effects: list[_Effects], products: Tensor, matrix: Tensor
) -> dict[str, Tensor]:
    """The measures of every latent."""
    ones = torch.ones(effects[0].sequences, device=matrix.device)
    before, after = (each.resampled(ones) for each in effects)
    cosine, ratio = cosines(before, after, products)
    measures = {
        "density": seen.density,
        "mean_activation": seen.mean,
        "correlation": seen.correlation,
        "overlap": seen.overlap,
        "cosine": cosine,
        "norm_ratio": ratio,
    }
    arrays = {name: values.float() for name, values in measures.items()}
    arrays |= {"top_activations": seen.top.float(), "top_tokens": seen.places}
    for name, effect in (("before", before), ("after", after)):
        ids, values = promoted(effect, matrix)
        arrays |= {f"promoted_{name}": ids.int(), f"promoted_logits_{name}": values}
    return arrays


def _summarised(
    seen: Activations, of_latent: dict[str, Tensor], effects: list[_Effects], products: Tensor
) -> Change:
    live = (seen.active >= _LIVE).all(0)
    chosen = {name: of_latent[name][..., live].double() for name in ("cosine", "overlap", "correlation")}
    same = _shared(of_latent["promoted_before"][0, live], of_latent["promoted_after"][0, live])
    top = seen.places[:, :, live]
    kept = _shared(top[0].T, top[1].T) * CONTEXTS
    ratios = (seen.density, seen.mean)
    density, activation = ((each[1] / each[0])[live].median().item() for each in ratios)
    return Change(
        latents=len(live),
        live=int(live.sum()),
        turned=_turned(effects, products, live),
        contexts_changed=_mean((kept < CONTEXTS / 2).double()),
        cosine=_mean(chosen["cosine"]),
        norm_ratio=of_latent["norm_ratio"][live].median().item(),
        correlation=_mean(chosen["correlation"]),
        overlap=_mean(chosen["overlap"]),
        density_ratio=density,
        activation_ratio=activation,
        promoted=_mean(same),
    )


def _shared(first: Tensor, second: Tensor) -> Tensor:
    """The share of the entries of each row of `first` that are in this row of `second`."""
    return (first[:, :, None] == second[:, None, :]).any(-1).double().mean(-1)


def _turned(effects: list[_Effects], products: Tensor, live: Tensor) -> Interval:
    """The share of latents that turned, with an interval from resamples of the sequences."""
    sequences = effects[0].sequences
    generator = torch.Generator().manual_seed(0)
    shares = []
    for number in range(_RESAMPLES + 1):
        times = torch.ones(sequences)
        if number > 0:
            drawn = torch.randint(0, sequences, (sequences,), generator=generator)
            times = torch.bincount(drawn, minlength=sequences).float()
        before, after = (each.resampled(times.to(live.device))[live] for each in effects)
        cosine, _ = cosines(before, after, products)
        shares.append(float((cosine < _TURNED).double().mean()))
    bounds = torch.tensor(shares[1:]).quantile(torch.tensor([0.025, 0.975]))
    return Interval(shares[0], float(bounds[0]), float(bounds[1]))


def _mean(values: Tensor) -> Interval:
    """The mean over latents, with a 95% interval from the normal distribution."""
    values = values[values.isfinite()]
    mean = float(values.mean())
    margin = 1.96 * float(values.std()) / math.sqrt(max(1, len(values)))
    return Interval(mean, mean - margin, mean + margin)
