"""Texts to measure steering on: texts that show a latent and texts that do not, in two halves."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_lora.common.errors import ConfigError, UserError, listed
from sae_lora.config.execution import SHORTEST_TEXT, EvaluationConfig
from sae_lora.data.documents import Document
from sae_lora.data.packing import convention_of, tokenised
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.splice.hooks import Splice
from sae_lora.splice.mlp_input import Stream, streamed

_FEWEST = 4
"""Number of positive and of negative texts in each half that a latent needs to be chosen."""
_LABELS = {"positive": True, "negative": False}
_HALVES = ("validation", "test")


@dataclass(frozen=True)
class Texts:
    """Texts of several latents. A text that two latents use occurs twice."""

    tokens: Tensor
    """Padded at the end, `[text, pos]`."""
    lengths: Tensor
    """Number of tokens of each text, without padding, `[text]`."""
    which: Tensor
    """Latent of each text, as an index into `Halves.latents`, `[text]`."""
    positive: Tensor
    """True for texts that show the latent, `[text]`."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def groups(self) -> Tensor:
        """Masks of the texts of each latent with each label, positive first, `[latent, label, text]`."""
        of_latent = self.which == torch.arange(int(self.which.max()) + 1)[:, None]
        return torch.stack([of_latent & self.positive, of_latent & ~self.positive], dim=1)

    @property
    def scored(self) -> Tensor:
        """Number of scored tokens of each text, `[text]`: all except the first."""
        return self.lengths - 1


class Halves(NamedTuple):
    """Indices of latents to steer with, and texts to steer on."""

    latents: list[int]
    validation: Texts
    """Texts on which strengths are chosen."""
    test: Texts
    """Texts on which effects are measured."""


class _Example(NamedTuple):
    place: int
    tokens: Tensor
    positive: bool


def texts_of(subject: Subject, splice: Splice, config: EvaluationConfig) -> Halves:
    """Collect the texts that `evaluation.steering_…` asks for.

    Raises:
        ConfigError: For a latent that the SAE does not have, or a latent without texts of both labels.
        UserError: If the file of texts cannot be used.
    """
    with torch.no_grad():
        zeros = torch.zeros(1, subject.model.config.hidden_size, device=subject.device)
        d_sae = splice.sae.encode(zeros).shape[-1]
    requested = config.steering_latents if isinstance(config.steering_latents, list) else None
    for latent in requested or []:
        if latent >= d_sae:
            raise ConfigError(
                "evaluation.steering_latents",
                latent,
                f"latents from 0 to {d_sae - 1} of the SAE at {splice.hookpoint}",
                nearest=d_sae - 1,
            )
    if config.steering_texts is not None:
        return _from_file(Path(config.steering_texts).expanduser(), subject, requested, d_sae)
    return _held_out(subject, splice, requested, config)


def residuals(
    subject: Subject, splice: Splice, tokens: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Input of an SAE in the plain model without any SAE, for tokens `[text, pos]`.

    Yields:
        A slice of the texts; their residuals `[batch, pos, d_model]`; a mask `[batch, pos]` of positions
        that keep their activation.
    """
    model = subject.model_of(Cell.base)
    read: list[Tensor] = []
    stream = Stream(splice.hookpoint, splice.reads)
    for rows in subject.slices(tokens):
        batch = tokens[rows].to(subject.device)
        with streamed(model, [stream], lambda stream, value: read.append(stream.inputs(value))):
            subject.hidden(Cell.base, batch)
        resid = read.pop()
        yield rows, resid, splice.special.positions(batch, resid)


def _held_out(
    subject: Subject, splice: Splice, requested: Sequence[int] | None, config: EvaluationConfig
) -> Halves:
    """Beginnings of held-out sequences, labelled by activation.

    A text is positive for a latent if the latent's peak on it is at least half of its highest activation
    on any text, and negative if the latent is not active on it. Every second sequence is for validation,
    the others are for the test.
    """
    tokens = subject.tokens[: config.sequences, : config.steering_text_tokens]
    peaks = _peaks(subject, splice, tokens)
    strong = (peaks > 0) & (peaks >= peaks.amax(0) / 2)
    silent = peaks <= 0
    halves = [torch.arange(len(tokens)) % 2 == half for half in range(len(_HALVES))]
    counts = torch.stack([label[half].sum(0) for half in halves for label in (strong, silent)])
    latents = (
        _most_selective(peaks, strong, counts, config.steering_latents)
        if requested is None
        else requested
    )
    texts = []
    for half in halves:
        examples: list[_Example] = []
        for place, latent in enumerate(latents):
            positive = (strong[:, latent] & half).nonzero()[:, 0]
            order = peaks[positive, latent].argsort(descending=True, stable=True)
            negative = (silent[:, latent] & half).nonzero()[:, 0]
            if not len(positive) or not len(negative):
                raise _no_texts(latent, counts[:, latent], len(tokens))
            for row in positive[order[: config.steering_examples]]:
                examples.append(_Example(place, tokens[row], True))
            number = min(len(negative), config.steering_examples)
            for row in negative[torch.arange(number) * len(negative) // number]:  # evenly spaced
                examples.append(_Example(place, tokens[row], False))
        texts.append(_texts(examples))
    return Halves(list(latents), *texts)


def _peaks(subject: Subject, splice: Splice, tokens: Tensor) -> Tensor:
    """Highest activation of each latent on each text, `[text, d_sae]`, on the CPU."""
    peaks = []
    with torch.no_grad():
        for _, resid, kept in residuals(subject, splice, tokens):
            latents = splice.sae.encode(resid).masked_fill(kept[..., None], 0)
            peaks.append(latents.amax(1).float().cpu())
    return torch.cat(peaks)


def _most_selective(peaks: Tensor, strong: Tensor, counts: Tensor, most: int) -> list[int]:
    """Latents with the largest Welch's t between their peaks on positive and on negative texts.

    Peaks on negative texts are zero. `peaks` are `[text, d_sae]`, `strong` is a mask of the positive
    texts in the same shape, `counts` `[4, d_sae]` are the numbers of texts of each half and label. At
    most `most` latents are chosen.
    """
    enough = counts.amin(0) >= _FEWEST
    if not enough.any():
        raise ConfigError(
            "evaluation.steering_latents",
            most,
            "a list of latents. More held-out text (data.validation_tokens), another "
            "evaluation.steering_text_tokens or labelled texts (evaluation.steering_texts) may help",
            because=f"no latent has {_FEWEST} positive and {_FEWEST} negative texts in each half of "
            f"{len(peaks)} texts",
        )
    texts = strong.sum(0)
    mean = (peaks * strong).sum(0) / texts
    spread = ((peaks - mean).square() * strong).sum(0) / (texts - 1)
    t = mean / (spread / texts).sqrt().clamp(min=1e-6 * mean.abs())
    order = t.where(enough, torch.tensor(-torch.inf)).argsort(descending=True, stable=True)
    return order[: min(most, int(enough.sum()))].tolist()


def _no_texts(latent: int, counts: Tensor, texts: int) -> ConfigError:
    """The error for a requested latent that lacks held-out texts of one label."""
    names = [f"{label} for {half}" for half in _HALVES for label in _LABELS]
    available = listed(f"{count} {name}" for count, name in zip(counts.tolist(), names, strict=True))
    return ConfigError(
        "evaluation.steering_latents",
        latent,
        "a latent with positive and negative texts in both halves; or evaluation.steering_texts",
        because=f"it has {available}, among {texts} held-out texts",
    )


def _texts(examples: Sequence[_Example]) -> Texts:
    return Texts(
        pad_sequence([example.tokens for example in examples], batch_first=True),
        torch.tensor([len(example.tokens) for example in examples]),
        torch.tensor([example.place for example in examples]),
        torch.tensor([example.positive for example in examples]),
    )


def _from_file(path: Path, subject: Subject, requested: Sequence[int] | None, d_sae: int) -> Halves:
    """Texts of a file; every second text of each latent and label is for validation."""
    labels = _labels(path, d_sae)
    latents = list(requested or dict.fromkeys(latent for latent, _ in labels))
    halves: tuple[list[_Example], list[_Example]] = ([], [])
    for (place, latent), (label, positive) in itertools.product(enumerate(latents), _LABELS.items()):
        documents = [
            Document(f"latent {latent}", text)
            for (of_latent, text), is_positive in labels.items()
            if (of_latent, is_positive) == (latent, positive)
        ]
        if len(documents) < len(_HALVES):
            raise UserError(
                f"evaluation.steering_texts = {str(path)!r}: latent {latent} has {len(documents)} "
                f"{label} texts; it needs two, one for validation and one for the test"
            )
        examples = [_Example(place, ids, positive) for ids in _tokenised(path, documents, subject)]
        halves[0].extend(examples[::2])
        halves[1].extend(examples[1::2])
    return Halves(latents, *map(_texts, halves))


def _labels(path: Path, d_sae: int) -> dict[tuple[int, str], bool]:
    """Labels by latent and text, true for positive; a repeated text counts once."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluation.steering_texts = {str(path)!r} cannot be read: {error}") from error
    labels: dict[tuple[int, str], bool] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        latent, text, positive = _row(line, f"{path}, line {number}", d_sae)
        if labels.setdefault((latent, text), positive) != positive:
            raise UserError(
                f"{path}, line {number}: this text of latent {latent} also has the other label"
            )
    if not labels:
        raise UserError(f"evaluation.steering_texts = {str(path)!r} contains no text")
    return labels


def _row(line: str, where: str, d_sae: int) -> tuple[int, str, bool]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from error
    fields = row if isinstance(row, dict) else {}
    latent, text, label = (fields.get(name) for name in ("latent", "text", "label"))
    if not isinstance(latent, int) or isinstance(latent, bool) or not 0 <= latent < d_sae:
        raise UserError(f"{where}: `latent` is {latent!r}; it must be from 0 to {d_sae - 1}")
    if not isinstance(text, str) or not text:
        raise UserError(f"{where}: `text` is {text!r}; it must be a text that is not empty")
    if not isinstance(label, str) or label not in _LABELS:
        raise UserError(f"{where}: `label` is {label!r}; it must be one of {listed(_LABELS)}")
    return latent, text, _LABELS[label]


def _tokenised(path: Path, documents: Sequence[Document], subject: Subject) -> Iterator[Tensor]:
    """Tokens of each text, with BOS if the model has one, cut to the length of the run's sequences."""
    tokenizer = subject.adapted.tokenizer
    bos = convention_of(tokenizer, subject.config.data.bos).bos
    head = [] if bos is None else [bos]
    for document, ids in tokenised(documents, tokenizer):
        tokens = (head + ids)[: subject.config.data.context_length]
        if len(tokens) < SHORTEST_TEXT:
            raise UserError(
                f"{path}: the text {document.text!r} of {document.key} is a single token; the model "
                "needs at least one token before it"
            )
        yield torch.tensor(tokens)
