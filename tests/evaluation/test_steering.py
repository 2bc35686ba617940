"""The suite `steering`: effects computed by hand, labels of texts, and halves without common texts."""

import dataclasses
import json
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sae_lora.common.console import no_report
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.files import as_json
from sae_lora.config.execution import EvaluationConfig
from sae_lora.config.schema import Config
from sae_lora.config.validate import check
from sae_lora.evaluation.steering.effects import DEPENDS_ON, Steering, best_strengths, steer
from sae_lora.evaluation.steering.models import SteeredModels, text_log_probability
from sae_lora.evaluation.steering.texts import Halves, Texts, residuals, texts_of
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Splice
from sae_lora.splice.positions import Special
from tests.support.coders import write_topk_sae
from tests.support.composing import composed
from tests.support.points import points_in, run_here

pytestmark = pytest.mark.slow  # many seconds in all

QUICK: dict[str, Any] = {
    "steering_max_harm": None,
    "resamples": 50,
    "steering_latents": 2,
    "steering_strengths": [0.5, 1.0],
    "steering_examples": 4,
}


class Line:
    """A language model of one block, the identity, whose final hidden states are scaled by a factor."""

    def __init__(self, embedding: Tensor, factor: float = 1.0) -> None:
        self.embedding, self.factor, self.block = embedding, factor, nn.Identity()
        self.config = type("Sizes", (), {"hidden_size": embedding.shape[1]})

    def hidden(self, tokens: Tensor, first: int = 0, resid: Tensor | None = None) -> Tensor:
        return self.factor * (self.resid_entering(1, tokens) if resid is None else resid)

    def resid_entering(self, block: int, tokens: Tensor) -> Tensor:
        return self.block(self.embedding[tokens])

    def module_at(self, hookpoint: str) -> nn.Module:
        assert hookpoint == "blocks.0.hook_resid_post"
        return self.block


class Planted:
    """An SAE with three latents: latent 0 is active only on token 1, latent 1 on every token, latent 2
    on no token. Latents 0 and 1 raise the logits of token 1 and of token 0.
    """

    def encode(self, x: Tensor) -> Tensor:
        first = x[..., 1].relu()
        return torch.stack([first, torch.ones_like(first), torch.zeros_like(first)], -1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        directions = torch.tensor([[0.0, 2.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
        return feature_acts @ directions + torch.tensor([-0.5, -1.0, 0.0])


BOS = 2
TEXTS = torch.tensor([[BOS, 1, 1, 1, 1], [BOS, 1, 1, 1, 1], [BOS, 0, 0, 0, 0], [BOS, 0, 0, 0, 0]])


class ByHand(Subject):
    """A run with this SAE and this model, with three tokens. The embedding of token 1 is (0, 1, 0), the
    others are zero. Logits are the residual stream, times 2 with adapters.
    """

    def __init__(self, *, keeps: bool = False, adapters: bool = True) -> None:
        embedding = torch.zeros(3, 3)
        embedding[1, 1] = 1
        self.model: Any = Line(embedding)
        self.with_adapters: Any = Line(embedding, 2.0) if adapters else self.model
        self.config = Config()
        self.device = torch.device("cpu")
        self.tokens = TEXTS.repeat(8, 1)
        self.special_ids = (BOS,)
        self.head = Head.linear(torch.eye(3))
        self.after = (Splice(0, Planted(), special=Special((BOS,) if keeps else ())),)
        self.before = self.after
        self.report_to(no_report)


def by_hand(strength: float, factor: float, *, positive: bool) -> float:
    """The effect on a token that follows the same token: logits are (0, z, 0), and steering raises z.

    The latent's typical activation is 1, and its decoder direction has norm 2.
    """
    plain, steered = factor * positive, factor * (positive + 2 * strength)
    of_logit = steered - plain if positive else 0.0
    return of_logit - (math.log(2 + math.exp(steered)) - math.log(2 + math.exp(plain)))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("cell", [Cell.base, Cell.adapted])
def test_effects_equal_those_computed_by_hand(cell: Cell, keeps: bool) -> None:
    subject = ByHand(keeps=keeps)
    config = EvaluationConfig(resamples=20, steering_strengths=[-1.0, 0.25, 0.75])
    result = steer(subject, config)
    factor = {Cell.base: 1.0, Cell.adapted: 2.0}[cell]
    (latent,) = result.latents
    assert latent.latent == 0
    assert (latent.activation, latent.push) == (1.0, 2.0)
    tuned = latent.cells[cell]
    assert tuned.strength == 0.75 and result.strengths == [0.25, 0.75, -1.0]
    # The first of four scored tokens follows BOS, where the plain logits are (0, 0, 0).
    after_bos = by_hand(0.75, factor, positive=False)
    of_logit = 2 * 0.75 * factor
    for positive, effect in ((True, tuned.effect.positive), (False, tuned.effect.negative)):
        first = 0.0 if keeps else after_bos + of_logit * positive
        expected = (3 * by_hand(0.75, factor, positive=positive) + first) / 4
        # All texts of a label are equal.
        assert dataclasses.astuple(effect) == pytest.approx((expected,) * 3, rel=1e-5)
    assert tuned.effect.positive.value > 0 > tuned.effect.negative.value
    assert tuned.positive[1] == pytest.approx(tuned.effect.positive.value, rel=1e-6)
    assert tuned.negative[1] == pytest.approx(tuned.effect.negative.value, rel=1e-6)
    assert tuned.positive[2] < 0 < tuned.positive[0] < tuned.positive[1]


def test_changes_are_differences_between_models() -> None:
    result = steer(ByHand(), EvaluationConfig(resamples=20, steering_strengths=[0.5]))
    change = result.changes["adapted over base"]
    assert list(result.changes) == ["adapted over base", "student over spliced"] and not result.absent
    for label in ("positive", "negative", "difference"):
        adapted, base = (getattr(result.cells[cell], label).value for cell in ("adapted", "base"))
        assert getattr(change, label).value == pytest.approx(adapted - base, rel=1e-9)
    # The SAE's reconstruction is (0.5·1 − 0.5, 2·x − 1, 0).
    spliced = result.cells["spliced"].negative.value
    expected = -(math.log(2 + math.exp(0.0)) - math.log(2 + math.exp(-1.0)))
    assert spliced == pytest.approx(expected, rel=1e-5)


def test_a_latent_makes_texts_that_show_it_likelier() -> None:
    """And it makes other texts less likely."""
    subject = ByHand()
    halves = texts_of(subject, subject.after[0], EvaluationConfig(steering_latents=[0]))
    steered = SteeredModels(subject, subject.after[0], halves)
    texts = halves.test
    (effects,) = steered.effects(Cell.base, texts, torch.full((1, len(texts)), 0.5))
    assert (effects[texts.positive] > 0.1).all() and (effects[~texts.positive] < -0.1).all()
    assert (texts.tokens[texts.positive, 1:] == 1).all()
    assert (texts.tokens[~texts.positive, 1:] == 0).all()


def test_the_strength_is_the_best_of_those_without_harm() -> None:
    """A stronger latent makes negative texts less likely; in this case positive texts too."""
    positive = torch.tensor([[0.1, -0.1], [0.0, -0.3], [-2.0, -0.2]])
    negative = torch.tensor([[0.0, 0.0], [-0.5, 0.0], [-4.0, 0.1]])
    curves = torch.stack([positive, negative])
    assert best_strengths(curves, None) == [2, 0]
    assert best_strengths(curves, 0.0) == [1, 0]
    assert best_strengths(curves, 0.25) == [1, 0]
    assert best_strengths(torch.zeros(2, 3, 1), None) == [0]


def test_a_latent_without_texts_of_both_labels_is_refused() -> None:
    subject = ByHand()
    with pytest.raises(ConfigError, match="it has 16 positive for validation, 0 negative") as refused:
        steer(subject, EvaluationConfig(steering_latents=[1]))
    assert refused.value.field == "evaluation.steering_latents"
    with pytest.raises(
        ConfigError, match="steering_latents = 2 cannot be used: it has 0 positive for validation"
    ):
        steer(subject, EvaluationConfig(steering_latents=[2]))
    subject.tokens = subject.tokens[:12]  # three of each label in each half
    with pytest.raises(ConfigError, match="4 positive and 4 negative texts in each half of 12 texts"):
        steer(subject, EvaluationConfig())


def test_log_probabilities_are_of_the_next_tokens() -> None:
    torch.manual_seed(0)
    head = Head.linear(torch.randn(11, 5))
    hidden, tokens = torch.randn(4, 7, 5), torch.randint(0, 11, (4, 7))
    lengths = torch.tensor([7, 4, 2, 5])
    scores = text_log_probability(head, hidden, tokens, lengths)
    for row, length in enumerate(lengths.tolist()):
        logits = head.logits(hidden[row, : length - 1]).double()
        expected = -cross_entropy(logits, tokens[row, 1:length], reduction="sum")
        assert float(scores[row]) == pytest.approx(float(expected), rel=1e-5)
    # The first token is context and is not scored.
    tokens[:, 0] = (tokens[:, 0] + 1) % 11
    assert torch.equal(text_log_probability(head, hidden, tokens, lengths), scores)


def test_log_probabilities_by_hand() -> None:
    """Two tokens. The second is e times as likely at the first position, and e² times at the next."""
    head = Head.linear(torch.eye(2))
    hidden = torch.tensor([[[0.0, 1.0], [0.0, 2.0], [9.0, 0.0]]])
    score = text_log_probability(head, hidden, torch.tensor([[0, 1, 0]]), torch.tensor([3]))
    e = math.e
    assert float(score) == pytest.approx(math.log(e / (1 + e)) + math.log(1 / (1 + e * e)), rel=1e-6)


PLACES = ("blocks.1.hook_attn_out", "blocks.3.hook_mlp_out", "blocks.5.hook_resid_post")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    home = tmp_path_factory.mktemp("outputs")
    for hookpoint in PLACES:
        write_topk_sae(home / f"at_{hookpoint.split('.')[1]}", hookpoint, k=8)
    text = home / "text"
    text.mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        (text / f"{path.stem}.txt").write_bytes(path.read_bytes())
    small = (
        *("data=text_files", f"data.files={text}/*.txt", "data.validation_share=0.5"),
        *("data.context_length=32", "data.validation_tokens=2048", "train.train_tokens=256"),
    )
    several = ("sae=disk", f"sae.path='{home}/at_{{block}}'", "layer=every_nth", "layer.every=2")
    point = points_in(home)
    runs = {
        "lora": point(*small),
        "several": point(*small, *several, "lora.blocks=all", "train.eval_each_sae=false"),
        "sae_finetune": point(*small, "method=sae_finetune"),
    }
    return {name: Subject(run_here(run)[0]) for name, run in runs.items()}


@pytest.fixture(scope="module")
def lora(subjects: dict[str, Subject]) -> Subject:
    return subjects["lora"]


@pytest.fixture(scope="module")
def halves(lora: Subject) -> Halves:
    return texts_of(lora, lora.after[0], EvaluationConfig(steering_latents=3, steering_examples=4))


def rows(texts: Texts) -> set[tuple[int, ...]]:
    return {
        tuple(tokens[:length].tolist())
        for tokens, length in zip(texts.tokens, texts.lengths, strict=True)
    }


def test_strength_zero_has_no_effect(lora: Subject, halves: Halves) -> None:
    steered = SteeredModels(lora, lora.after[0], halves)
    assert lora.cells == [Cell.base, Cell.spliced, Cell.student, Cell.adapted]
    for cell in lora.cells:
        strengths = torch.tensor([0.0, 1.0])[:, None].expand(-1, len(halves.test))
        at_zero, at_one = steered.effects(cell, halves.test, strengths)
        assert (at_zero == 0).all()
        assert (at_one != 0).all()


@pytest.mark.parametrize(
    ("name", "sae"), [("lora", 0), ("several", 0), ("several", 1), ("several", 2), ("sae_finetune", 0)]
)
def test_sharing_the_blocks_before_the_sae_does_not_change_effects(
    name: str, sae: int, subjects: dict[str, Subject]
) -> None:
    """Compared to complete forward passes with the test's own hooks."""
    subject = subjects[name]
    splice = subject.after[sae]
    halves = texts_of(subject, splice, EvaluationConfig(steering_latents=2, steering_examples=4))
    steered = SteeredModels(subject, splice, halves)
    texts = halves.test
    strength = 0.7
    kept = splice.special.positions(texts.tokens)[..., None]
    latents = torch.tensor(halves.latents)[texts.which]

    def pushing(module: object, arguments: object, output: Any) -> Any:
        resid = output[0] if isinstance(output, tuple) else output
        pushed = resid + (strength * steered.pushes[texts.which][:, None]).masked_fill(kept, 0)
        return (pushed, *output[1:]) if isinstance(output, tuple) else pushed

    def raising(sae: Any) -> Any:
        def encode(x: Tensor) -> Tensor:
            code = sae.encode(x)
            for text, latent in enumerate(latents):
                code[text, :, latent] += strength * steered.activations[texts.which[text]]
            return code

        return type("Raising", (), {"encode": staticmethod(encode), "decode": sae.decode})

    for cell in subject.cells:
        splices = subject.splices_of(cell)
        plain = subject.hidden(cell, texts.tokens)
        if splices:
            instead = tuple(
                each._replace(sae=raising(each.sae)) if each.place == splice.place else each
                for each in splices
            )
            moved = subject.hidden(cell, texts.tokens, instead=instead)
        else:
            hooked = subject.model_of(cell).module_at(splice.hookpoint)
            handle = hooked.register_forward_hook(pushing)
            moved = subject.hidden(cell, texts.tokens)
            handle.remove()
        score, moved_score = (
            text_log_probability(subject.head, hidden, texts.tokens, texts.lengths)
            for hidden in (plain, moved)
        )
        (effects,) = steered.effects(cell, texts, torch.full((1, len(texts)), strength))
        assert torch.allclose(effects, moved_score - score, atol=2e-3), cell
        assert effects.abs().max() > 0.01


def test_the_added_vector_is_the_decoder_direction(lora: Subject, halves: Halves) -> None:
    splice = lora.after[0]
    steered = SteeredModels(lora, splice, halves)
    decoder = splice.sae.W_dec[halves.latents]  # pyright: ignore[reportAttributeAccessIssue]
    expected = steered.activations[:, None] * decoder
    assert torch.allclose(steered.pushes, expected, rtol=1e-3, atol=1e-4)
    assert (steered.activations > 0).all()


def test_texts_are_labelled_by_activation_and_halves_share_none(lora: Subject, halves: Halves) -> None:
    splice = lora.after[0]
    assert len(set(halves.latents)) == 3
    for texts in (halves.validation, halves.test):
        for chunk, resid, kept in residuals(lora, splice, texts.tokens):
            code = splice.sae.encode(resid).masked_fill(kept[..., None], 0)
            for code_of, which, positive in zip(
                code, texts.which[chunk], texts.positive[chunk], strict=True
            ):
                assert bool((code_of[:, halves.latents[which]] > 0).any()) == bool(positive)
        for group in texts.groups:
            assert group.sum(-1).tolist() == [4, 4]
    assert rows(halves.validation).isdisjoint(rows(halves.test))


def test_the_choice_of_latents_is_reproducible_and_ordered(lora: Subject, halves: Halves) -> None:
    again = texts_of(lora, lora.after[0], EvaluationConfig(steering_latents=1))
    assert again.latents == halves.latents[:1]
    named = texts_of(
        lora, lora.after[0], EvaluationConfig(steering_latents=halves.latents[::-1], steering_examples=4)
    )
    assert named.latents == halves.latents[::-1]
    assert rows(named.test) == rows(halves.test)


def test_padding_has_no_effect(lora: Subject, halves: Halves) -> None:
    steered = SteeredModels(lora, lora.after[0], halves)
    texts = halves.test
    shorter = texts.tokens.clone()
    shorter[:, 9:] = 5
    lengths = torch.full_like(texts.lengths, 9)
    padded = Texts(shorter, lengths, texts.which, texts.positive)
    without_padding = Texts(texts.tokens[:, :9], lengths, texts.which, texts.positive)
    ones = torch.ones(1, len(lengths))
    for cell in lora.cells:
        effects, expected = (steered.effects(cell, each, ones) for each in (padded, without_padding))
        assert torch.allclose(effects, expected, rtol=1e-3, atol=1e-3)


def test_all_results_of_a_run(lora: Subject) -> None:
    result = steer(lora, EvaluationConfig(**QUICK))
    assert result == steer(lora, EvaluationConfig(**QUICK))
    as_json(dataclasses.asdict(result))  # raises for NaN
    assert list(result.cells) == ["base", "spliced", "student", "adapted"] and not result.absent
    _check_consistent(result)


def _check_consistent(result: Steering) -> None:
    assert result.source == "held out"
    for latent in result.latents:
        for cell, tuned in latent.cells.items():
            effects = zip(tuned.positive, tuned.negative, strict=True)
            differences = [positive - negative for positive, negative in effects]
            assert tuned.strength == result.strengths[differences.index(max(differences))], cell
            positive, negative, difference = dataclasses.astuple(tuned.effect)
            assert difference[0] == pytest.approx(positive[0] - negative[0])
            assert difference[1] <= difference[0] <= difference[2]
    for cell, effect in result.cells.items():
        differences = [latent.cells[cell].effect.difference.value for latent in result.latents]
        mean = np.array(differences, dtype=float).mean()
        assert effect.difference.value == pytest.approx(mean)


def test_a_run_without_adapters_has_no_adapted_cell(subjects: dict[str, Subject]) -> None:
    result = steer(subjects["sae_finetune"], EvaluationConfig(**QUICK))
    assert list(result.cells) == ["base", "spliced", "student"]
    assert list(result.absent) == ["adapted"] and "no adapters" in result.absent["adapted"]
    assert list(result.changes) == ["student over spliced"]
    _check_consistent(result)


def test_the_block_of_the_sae(subjects: dict[str, Subject]) -> None:
    several = subjects["several"]
    options = QUICK | {"steering_strengths": [0.5]}
    default, chosen = (
        steer(several, EvaluationConfig(**options, steering_block=block)) for block in (None, 3)
    )
    assert (default.hookpoint, chosen.hookpoint) == PLACES[:2]
    with pytest.raises(ConfigError, match=r"nearest valid: evaluation\.steering_block=5"):
        steer(several, EvaluationConfig(steering_block=7))


def write(path: Path, lines: Sequence[Any]) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def row(latent: Any, text: Any, label: Any) -> dict[str, Any]:
    return {"latent": latent, "text": text, "label": label}


def test_texts_come_from_a_file(lora: Subject, halves: Halves, tmp_path: Path) -> None:
    """Held-out texts of both labels are written into a file and read from it."""
    latent, tokenizer = halves.latents[0], lora.adapted.tokenizer
    texts = halves.test
    lines = [
        row(latent, tokenizer.decode(texts.tokens[place], skip_special_tokens=True), label)
        for label, mask in zip(("positive", "negative"), texts.groups[0], strict=True)
        for place in mask.nonzero()[:3, 0]
    ]
    file = write(tmp_path / "texts.jsonl", [*lines, "", lines[0]])  # a repeated line counts once
    config = EvaluationConfig(**(QUICK | {"steering_texts": file}))
    from_file = texts_of(lora, lora.after[0], config)
    assert from_file.latents == [latent]
    assert rows(from_file.validation).isdisjoint(rows(from_file.test))
    assert [len(half.tokens) for half in (from_file.validation, from_file.test)] == [4, 2]
    assert (from_file.test.tokens[:, 0] == tokenizer.bos_token_id).all()
    result = steer(lora, config)
    assert result.source == file
    (steered,) = result.latents
    assert (steered.latent, steered.positive_texts, steered.negative_texts) == (latent, 1, 1)


def labelled(latent: Any = 3, texts: str = "abcdefgh") -> list[dict[str, Any]]:
    """A text for each letter, negative and positive in turn."""
    return [
        row(latent, f"import {letter}", "positive" if number % 2 else "negative")
        for number, letter in enumerate(texts)
    ]


FILES: dict[str, tuple[Sequence[Any], str]] = {
    "only one label": ([row(3, text, "positive") for text in "abcd"], "has 0 negative texts"),
    "too few": (labelled(texts="abc"), "latent 3 has 1 positive texts"),
    "another label": (
        [row(3, "a b", "maybe")],
        "line 1: `label` is 'maybe'; it must be one of positive, negative",
    ),
    "a latent too far": (labelled(1024), "`latent` is 1024; it must be from 0 to 1023"),
    "no latent": ([{"text": "a", "label": "positive"}], "line 1: `latent` is None"),
    "no text": ([*labelled(), row(3, 7, "positive")], "line 9: `text` is 7"),
    "no JSON": ([*labelled(), "{"], "line 9: not valid JSON"),
    "a list": (["[1]"], "line 1: `latent` is None"),
    "both labels": ([row(3, "a b", "positive"), row(3, "a b", "negative")], "also has the other label"),
    "nothing": ([], "contains no text"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_used(
    name: str, lora: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, message = FILES[name]
    monkeypatch.setattr(Subject, "hidden", _unwanted)
    with pytest.raises(UserError, match=message):
        steer(lora, EvaluationConfig(steering_texts=write(tmp_path / "texts.jsonl", lines)))


def _unwanted(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("something is computed before the request is checked")


def test_missing_latents_blocks_and_files_are_refused_before_anything_is_computed(
    lora: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Subject, "hidden", _unwanted)
    with pytest.raises(ConfigError, match=r"nearest valid: evaluation\.steering_latents=1023"):
        steer(lora, EvaluationConfig(steering_latents=[5, 1024]))
    with pytest.raises(ConfigError, match=r"nearest valid: evaluation\.steering_block=3"):
        steer(lora, EvaluationConfig(steering_block=5))
    with pytest.raises(UserError, match="cannot be read"):
        steer(lora, EvaluationConfig(steering_texts=str(tmp_path / "none.jsonl")))
    file = write(tmp_path / "texts.jsonl", labelled())
    with pytest.raises(UserError, match="latent 4 has 0 positive texts"):
        steer(lora, EvaluationConfig(steering_texts=file, steering_latents=[4]))


WRONG: dict[str, list[Any]] = {
    "steering_latents": [0, [], [3, 3], [-1], "most", [1.5], True],
    "steering_strengths": [[], [1.0, 1.0], [math.inf]],
    "steering_block": [-1],
    "steering_max_harm": [-0.1, math.nan],
    "steering_examples": [0],
    "steering_text_tokens": [1],
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_work(name: str) -> None:
    config = composed()
    check(config)
    for value in WRONG[name]:
        changed = dataclasses.replace(config.evaluation, **{name: value})
        with pytest.raises(ConfigError) as refused:
            check(dataclasses.replace(config, evaluation=changed))
        assert refused.value.field == f"evaluation.{name}"


def test_valid_settings() -> None:
    config = composed("evaluation.steering_latents=[3,17]", "evaluation.steering_strengths=[0,-1,2.5]")
    assert config.evaluation.steering_latents == [3, 17]
    check(config)
    assert set(DEPENDS_ON) <= {field.name for field in dataclasses.fields(EvaluationConfig)}
