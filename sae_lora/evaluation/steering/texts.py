"""Texts that latents are steered on: with what a latent stands for and without, in two halves."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lora.common.errors import ConfigError, UserError, listed
from sae_lora.config.evaluation import SHORTEST_TEXT, EvaluationConfig
from sae_lora.data.documents import Document
from sae_lora.data.packing import convention_of, tokenised
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.splice.hooks import Splice

FEWEST = 4
"""Texts of a latent in each half, positive and as many negative, without which it is not chosen."""
_LABELS = {"positive": True, "negative": False}
_HALVES = ("validation", "test")


@dataclass(frozen=True)
class Texts:
    """Texts of several latents. One that is a text of two latents stands here twice.

    Args:
        tokens: Padded at the end, `[text, pos]`.
        lengths: Tokens of each that are its own, `[text]`.
        which: Of which latent each is a text, by its place among those steered, `[text]`.
        positive: Whether it has what the latent stands for (true), `[text]`.
    """

    tokens: Tensor
    lengths: Tensor
    which: Tensor
    positive: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def of(self, place: int, *, positive: bool) -> Tensor:
        """Which texts `[text]` (true) are those of one latent with this label."""
        return (self.which == place) & (self.positive == positive)

    @property
    def scored(self) -> Tensor:
        """Tokens of each that have one before them, `[text]`."""
        return self.lengths - 1


class Halves(NamedTuple):
    """What is steered with, and on what.

    Args:
        latents: Indices of the latents.
        validation: Texts on which strengths are chosen.
        test: Others, on which effects are measured.
    """

    latents: list[int]
    validation: Texts
    test: Texts


class _Example(NamedTuple):
    latent: int
    tokens: Tensor
    positive: bool


def texts_of(subject: Subject, splice: Splice, config: EvaluationConfig) -> Halves:
    """The texts that `evaluation.steering_…` asks for.

    Args:
        subject: The run.
        splice: The SAE.
        config: Which latents and texts.

    Raises:
        ConfigError: For a latent that the SAE does not have, or one without texts of both kinds.
        UserError: Where the file of texts cannot be used.
    """
    d_sae = _d_sae(subject, splice)
    wanted = config.steering_latents if isinstance(config.steering_latents, list) else None
    for latent in wanted or []:
        if latent >= d_sae:
            raise ConfigError(
                "evaluation.steering_latents",
                latent,
                f"latents from 0 to {d_sae - 1}, those of the SAE at {splice.hookpoint}",
                nearest=d_sae - 1,
            )
    if config.steering_texts is not None:
        return _from_file(Path(config.steering_texts).expanduser(), subject, wanted, d_sae)
    return _held_out(subject, splice, wanted, config)


def _d_sae(subject: Subject, splice: Splice) -> int:
    with torch.no_grad():
        d_model = subject.model.config.hidden_size
        return splice.sae.encode(torch.zeros(1, d_model, device=subject.device)).shape[-1]


class Through:
    """An SAE in form alone: it puts back what it reads, and shows it."""

    def __init__(self) -> None:
        self.resid: Tensor | None = None
        """What it has read last, `[batch, pos, d_model]`."""

    def encode(self, x: Tensor) -> Tensor:
        """What it reads."""
        self.resid = x
        return x

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The same again."""
        return feature_acts


def residuals(
    subject: Subject, splice: Splice, tokens: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """What an SAE reads in the plain model, without any SAE in place.

    Args:
        subject: The run.
        splice: The SAE.
        tokens: `[text, pos]`.

    Yields:
        Which texts; their residuals `[batch, pos, d_model]`; the positions `[batch, pos]` (true) that
        the SAE leaves as they are.
    """
    through = Through()
    instead = (splice._replace(sae=through),)
    for rows in batches(subject, tokens):
        batch = tokens[rows].to(subject.device)
        subject.hidden(Cell.base, batch, instead=instead)
        assert through.resid is not None
        kept = subject.kept_positions(batch, instead)
        yield rows, through.resid, torch.zeros_like(batch, dtype=torch.bool) if kept is None else kept


def batches(subject: Subject, tokens: Tensor) -> Iterator[slice]:
    """Rows of `[text, pos]` that go through the model at once."""
    at_once = max(1, subject.config.train.eval_batch_tokens // tokens.shape[1])
    for start in range(0, len(tokens), at_once):
        yield slice(start, start + at_once)


def _held_out(
    subject: Subject, splice: Splice, wanted: Sequence[int] | None, config: EvaluationConfig
) -> Halves:
    """The beginnings of held-out sequences, told apart by activation.

    A latent's positive texts are those on which it reaches at least half of the highest activation that
    it has on any; where it is not active at all, they are negative. Every other sequence is for
    validation, whatever the latent.
    """
    tokens = subject.tokens[: config.sequences, : config.steering_text_tokens]
    peaks = _peaks(subject, splice, tokens)
    strong = (peaks > 0) & (peaks >= peaks.amax(0) / 2)
    quiet = peaks <= 0
    halves = [torch.arange(len(tokens)) % 2 == half for half in range(len(_HALVES))]
    counts = torch.stack([label[half].sum(0) for half in halves for label in (strong, quiet)])
    latents = _sharpest(peaks, strong, counts, config.steering_latents) if wanted is None else wanted
    found = []
    for half in halves:
        examples: list[_Example] = []
        for latent in latents:
            heights = peaks[:, latent]
            active = (strong[:, latent] & half).nonzero()[:, 0]
            order = heights[active].argsort(descending=True, stable=True)
            silent = (quiet[:, latent] & half).nonzero()[:, 0]
            if not len(active) or not len(silent):
                raise _no_texts(latent, counts[:, latent], len(tokens))
            for row in active[order[: config.steering_examples]]:
                examples.append(_Example(latent, tokens[row], True))
            for row in silent[_spread(len(silent), config.steering_examples)]:
                examples.append(_Example(latent, tokens[row], False))
        found.append(_texts(examples, latents))
    return Halves(list(latents), *found)


def _peaks(subject: Subject, splice: Splice, tokens: Tensor) -> Tensor:
    """The highest activation of each latent on each text, `[text, d_sae]`, on the CPU."""
    found = []
    with torch.no_grad():
        for _, resid, kept in residuals(subject, splice, tokens):
            latents = splice.sae.encode(resid).masked_fill(kept[..., None], 0)
            found.append(latents.amax(1).float().cpu())
    return torch.cat(found)


def _sharpest(peaks: Tensor, strong: Tensor, counts: Tensor, most: int) -> list[int]:
    """The latents whose peaks on positive and on negative texts lie apart furthest for their spread.

    That is Welch's t between the two; on negative texts all peaks are zero.

    Args:
        peaks: `[text, d_sae]`.
        strong: Which of the texts are positive, `[text, d_sae]`.
        counts: Texts of each half and label, `[4, d_sae]`.
        most: Latents wanted.
    """
    enough = counts.amin(0) >= FEWEST
    if not enough.any():
        raise ConfigError(
            "evaluation.steering_latents",
            most,
            "a list of latents, here: none is active on some texts and silent on others often enough to "
            f"be chosen ({FEWEST} of each kind in each half of {len(peaks)} texts). More held-out text "
            "(data.validation_tokens) or another evaluation.steering_text_tokens may help, and "
            "evaluation.steering_texts takes labelled text",
        )
    texts = strong.sum(0)
    mean = (peaks * strong).sum(0) / texts
    spread = ((peaks - mean).square() * strong).sum(0) / (texts - 1)
    t = mean / (spread / texts).sqrt().clamp(min=1e-6 * mean.abs())
    order = t.where(enough, torch.tensor(-torch.inf)).argsort(descending=True, stable=True)
    return order[: min(most, int(enough.sum()))].tolist()


def _no_texts(latent: int, counts: Tensor, texts: int) -> ConfigError:
    """Why a latent that was asked for cannot be steered on held-out text."""
    names = [f"{label} for {half}" for half in _HALVES for label in _LABELS]
    found = listed(f"{count} {name}" for count, name in zip(counts.tolist(), names, strict=True))
    return ConfigError(
        "evaluation.steering_latents",
        latent,
        "a latent with positive and negative texts in both halves; or evaluation.steering_texts",
        because=f"of {texts} held-out texts it has {found}",
    )


def _spread(available: int, most: int) -> Tensor:
    """As many places as wanted, evenly spread over those that there are."""
    number = min(available, most)
    return torch.arange(number) * available // number


def _texts(examples: Sequence[_Example], latents: Sequence[int]) -> Texts:
    lengths = torch.tensor([len(one.tokens) for one in examples])
    tokens = torch.zeros(len(examples), int(lengths.max()), dtype=torch.long)
    for row, one in enumerate(examples):
        tokens[row, : len(one.tokens)] = one.tokens
    return Texts(
        tokens,
        lengths,
        torch.tensor([latents.index(one.latent) for one in examples]),
        torch.tensor([one.positive for one in examples]),
    )


def _from_file(path: Path, subject: Subject, wanted: Sequence[int] | None, d_sae: int) -> Halves:
    """The texts of a file; of each latent and label every other one is for validation."""
    labels = _labelled(path, d_sae)
    latents = list(wanted or dict.fromkeys(latent for latent, _ in labels))
    for latent in latents:
        for label, positive in _LABELS.items():
            number = sum(one == (latent, positive) for one in _kinds(labels))
            if number < len(_HALVES):
                raise UserError(
                    f"evaluation.steering_texts = {str(path)!r}: latent {latent} has {number} {label} "
                    "texts there; it needs two, one to choose the strength on and one to measure on"
                )
    used = {key: positive for key, positive in labels.items() if key[0] in latents}
    examples = _tokenised(path, used, subject)
    halves: tuple[list[_Example], list[_Example]] = ([], [])
    for latent in latents:
        for positive in _LABELS.values():
            own = [one for one in examples if one.latent == latent and one.positive == positive]
            halves[0].extend(own[::2])
            halves[1].extend(own[1::2])
    return Halves(latents, *(_texts(half, latents) for half in halves))


_Labelled = dict[tuple[int, str], bool]
"""Whether a text is positive, by latent and text: one that stands twice would be in both halves."""


def _kinds(labels: _Labelled) -> Iterator[tuple[int, bool]]:
    for (latent, _), positive in labels.items():
        yield latent, positive


def _labelled(path: Path, d_sae: int) -> _Labelled:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluation.steering_texts = {str(path)!r} cannot be read: {error}") from error
    labels: _Labelled = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        latent, text, positive = _row(line, f"{path}, line {number}", d_sae)
        if labels.setdefault((latent, text), positive) != positive:
            raise UserError(
                f"{path}, line {number}: this text of latent {latent} has the other label too"
            )
    if not labels:
        raise UserError(f"evaluation.steering_texts = {str(path)!r}: there is no text in it")
    return labels


def _row(line: str, where: str, d_sae: int) -> tuple[int, str, bool]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no JSON: {error}") from error
    latent, text, label = (
        (row.get("latent"), row.get("text"), row.get("label")) if isinstance(row, dict) else (None,) * 3
    )
    if not isinstance(latent, int) or isinstance(latent, bool) or not 0 <= latent < d_sae:
        raise UserError(f"{where}: `latent` is {latent!r}; it may be from 0 to {d_sae - 1}")
    if not isinstance(text, str) or not text:
        raise UserError(f"{where}: `text` is {text!r}; it may be any text")
    if not isinstance(label, str) or label not in _LABELS:
        raise UserError(f"{where}: `label` is {label!r}; it may be {listed(_LABELS)}")
    return latent, text, _LABELS[label]


def _tokenised(path: Path, labels: _Labelled, subject: Subject) -> list[_Example]:
    """With the model's own beginning, and no longer than the run's sequences."""
    tokenizer = subject.adapted.tokenizer
    bos = convention_of(tokenizer).bos
    head = [] if bos is None else [bos]
    documents = [Document(str(latent), text) for latent, text in labels]
    examples = []
    for (document, ids), positive in zip(tokenised(documents, tokenizer), labels.values(), strict=True):
        tokens = (head + ids)[: subject.config.data.context_length]
        if len(tokens) < SHORTEST_TEXT:
            raise UserError(
                f"{path}: the text {document.text!r} of latent {document.key} is a single token, which "
                "has none before it to be predicted from"
            )
        examples.append(_Example(int(document.key), torch.tensor(tokens), positive))
    return examples
