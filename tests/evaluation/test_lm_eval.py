"""Scores of lm-evaluation-harness equal a direct computation with our models and SAEs."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval.evaluator
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from torch import Tensor

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import Suite
from sae_lora.config.execution import EvaluationConfig
from sae_lora.config.schema import DataConfig
from sae_lora.data.documents import in_validation
from sae_lora.evaluation import lm_eval as harness
from sae_lora.evaluation import run_suites, suite_records
from sae_lora.evaluation.lm_eval import Tasks, paired_error
from sae_lora.evaluation.subject import Cell, Replacement, Subject
from sae_lora.evaluation.tasks import FOLDER
from sae_lora.evaluation.tasks.reading import rows
from sae_lora.models import loading
from sae_lora.records.folder import RunFolder
from sae_lora.saes.loading import IdentitySAE
from scripts import cut_tasks
from tests.support.hub import Hub, serving
from tests.support.points import points_in, run_here

pytestmark = pytest.mark.slow  # many seconds in all

SHIPPED = ["tiny_continuation", "tiny_generation"]
LIMIT = 8
CONFIG = EvaluationConfig(tasks=SHIPPED, task_limit=LIMIT, task_batch_size=4, resamples=50)


@pytest.fixture(scope="module", autouse=True)
def no_environment() -> Iterator[None]:
    """The harness would ask pip for the installed packages each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    (run,) = run_here(points_in(tmp_path_factory.mktemp("outputs"))("train.lr=0.05"))
    return run


@pytest.fixture(scope="module")
def subject(folder: RunFolder) -> Subject:
    return Subject(folder)


@pytest.fixture(scope="module")
def scores(subject: Subject) -> Tasks:
    return harness.score(subject, CONFIG)


def first_rows(task: str) -> list[dict[str, Any]]:
    """The first rows of a task."""
    return list(rows(f"{task}.jsonl")["test"])[:LIMIT]


def logits(subject: Subject, cell: Cell, tokens: Tensor) -> Tensor:
    """Logits `[pos, d_vocab]` of a text `[pos]`."""
    sae, adapters = cell in (Cell.spliced, Cell.student), cell in (Cell.adapted, Cell.student)
    return subject.adapted.logits(tokens[None], sae=sae, adapters=adapters)[0]


def log_likelihoods(subject: Subject, cell: Cell, row: dict[str, Any]) -> list[float]:
    """Log-likelihood of each choice after the text."""
    sums = []
    for choice in row["choices"]:
        text, whole = (
            subject.adapted.tokenizer(string, return_tensors="pt").input_ids[0]
            for string in (row["text"], f"{row['text']} {choice}")
        )
        assert torch.equal(whole[: len(text)], text)
        log_probs = logits(subject, cell, whole)[len(text) - 1 : -1].log_softmax(-1)
        sums.append(float(log_probs.gather(-1, whole[len(text) :, None]).sum()))
    return sums


def greedy(subject: Subject, cell: Cell, row: dict[str, Any]) -> str:
    """The continuation of a text up to the end of the name, generated greedily without a cache."""
    task = yaml.load((FOLDER / "tiny_generation.yaml").read_text(), _Loader)
    tokens = subject.adapted.tokenizer(row["text"], return_tensors="pt").input_ids[0]
    start = len(tokens)
    for _ in range(task["generation_kwargs"]["max_gen_toks"]):
        tokens = torch.cat([tokens, logits(subject, cell, tokens)[-1:].argmax(-1)])
    stop = "|".join(map(re.escape, task["generation_kwargs"]["until"]))
    return re.split(stop, subject.adapted.tokenizer.decode(tokens[start:]))[0]


class _Loader(yaml.SafeLoader):
    """Loader of a task's file that reads functions as their names."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.mark.parametrize("cell", list(Cell))
@torch.no_grad()
def test_scores_equal_those_of_our_model(cell: Cell, subject: Subject, scores: Tasks) -> None:
    """Our log-likelihoods are of whole texts, one by one."""
    result = scores.scores["tiny_continuation"].cells[cell]
    right, right_by_length = [], []
    for row in first_rows("tiny_continuation"):
        sums = log_likelihoods(subject, cell, row)
        means = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        right.append(sums.index(max(sums)) == row["answer"])
        right_by_length.append(means.index(max(means)) == row["answer"])
    assert result["acc"].value == pytest.approx(sum(right) / LIMIT)
    assert result["acc_norm"].value == pytest.approx(sum(right_by_length) / LIMIT)


@pytest.mark.parametrize("cell", [Cell.base, Cell.student])
@torch.no_grad()
def test_generated_texts_equal_those_of_our_model(cell: Cell, subject: Subject, scores: Tasks) -> None:
    """Our texts are generated token by token; the harness uses a cache and batches of prompts."""
    config = dataclasses.replace(CONFIG, tasks=SHIPPED[1:])
    with subject.in_place(cell) as model:
        results = harness._results(model, subject.padding_tokenizer(), config)
    written = [sample["filtered_resps"][0] for sample in results["samples"][SHIPPED[1]]]
    expected = [greedy(subject, cell, row) for row in first_rows(SHIPPED[1])]
    assert written == expected
    right = [text == row["answer"] for text, row in zip(expected, first_rows(SHIPPED[1]), strict=True)]
    result = scores.scores[SHIPPED[1]].cells[cell]["exact_match"]
    assert result.value == pytest.approx(sum(right) / LIMIT)


def test_the_fields_of_scores(scores: Tasks) -> None:
    assert list(scores.scores) == SHIPPED
    for name, task in scores.scores.items():
        assert (task.documents, task.few_shot, task.version) == (LIMIT, 0, "1.0"), name
        assert list(task.cells) == ["base", "spliced", "student", "adapted"]
        assert all(task.higher_is_better[metric] for metric in task.cells["base"])
        for cell, metrics in task.cells.items():
            for metric, score in metrics.items():
                base = task.cells["base"][metric]
                if cell == "base":
                    assert score.over_base is None
                    continue
                assert score.over_base == pytest.approx(score.value - base.value)
                assert score.over_base_stderr is not None
    # The models have different scores.
    values = {cell: str(scores.scores[SHIPPED[0]].cells[cell]) for cell in Cell}
    assert len(set(values.values())) > 1


def test_an_sae_that_changes_nothing_changes_no_score(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = tuple(splice._replace(sae=IdentitySAE()) for splice in subject.after)
    monkeypatch.setattr(subject, "before", same)
    monkeypatch.setattr(subject, "after", same)
    result = harness.score(subject, dataclasses.replace(CONFIG, task_limit=4))
    for task in result.scores.values():
        for metric, base in task.cells["base"].items():
            spliced = task.cells["spliced"][metric]
            assert (spliced.value, spliced.stderr) == (base.value, base.stderr)
            assert (spliced.over_base, spliced.over_base_stderr) == (0, 0)
        assert task.cells["student"] == task.cells["adapted"]


def test_the_suite_is_reproducible_and_recorded(folder: RunFolder, scores: Tasks) -> None:
    """Another subject gives the same results. A recorded suite is not run again."""
    config = dataclasses.replace(CONFIG, tasks=SHIPPED[:1])
    assert run_suites.evaluate(folder, [Suite.tasks], config) == []
    record = suite_records.read(folder, Suite.tasks)
    assert record is not None
    expected = json.loads(json.dumps(dataclasses.asdict(scores.scores[SHIPPED[0]])))
    assert record.results["scores"] == {SHIPPED[0]: expected}
    assert record.settings["tasks"] == SHIPPED[:1] and record.settings["task_limit"] == LIMIT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", lambda *_: pytest.fail("a model is loaded"))
        assert run_suites.evaluate(folder, [Suite.tasks], config) == []


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loading a model fails the test, and the cache of data sets is empty."""
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    harness._check.cache_clear()


@pytest.fixture
def few_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped tasks, a task whose data set is not in the cache, and a group of it and another."""
    shutil.copytree(FOLDER, tmp_path / "tasks")
    elsewhere = {"task": "elsewhere", "dataset_path": "org/nothing", "test_split": "test"}
    group = {"group": "several", "task": ["elsewhere", SHIPPED[0]]}
    for name, entry in (("elsewhere", elsewhere), ("several", group)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.dump(entry))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr(harness, "_manager_of", lambda all_tasks: manager)


def refused(folder: RunFolder, tasks: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which the suite refuses these tasks."""
    config = EvaluationConfig(tasks=tasks)
    assert run_suites.evaluate(folder, [Suite.tasks], config) == [Suite.tasks]
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("no_model", "few_tasks")
@pytest.mark.parametrize("name", ["elsewhere", "several"])
def test_a_data_set_that_is_not_cached_is_named(
    name: str, folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(folder, [SHIPPED[0], name], capsys)
    assert message.startswith(f"skipped tasks of {folder.path.name}: ")
    assert f"evaluation.tasks = '{name}' cannot be loaded: the hub cannot be reached" in message
    assert "data sets: org/nothing on a machine" in message
    assert f"TaskManager().load(['{name}'])" in message


@pytest.mark.usefixtures("no_model", "few_tasks")
@pytest.mark.parametrize(
    ("tasks", "got", "nearest"),
    [
        (["tiny_continuations"], "tiny_continuations", SHIPPED[0]),
        ([*SHIPPED, SHIPPED[0]], SHIPPED[0], None),
    ],
)
def test_unknown_and_repeated_tasks_are_refused(
    tasks: list[str],
    got: str,
    nearest: str | None,
    folder: RunFolder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigError) as error:
        harness.check(EvaluationConfig(tasks=tasks))
    assert (error.value.field, error.value.got) == ("evaluation.tasks", got)
    assert error.value.nearest == nearest
    assert f"evaluation.tasks = '{got}' cannot be used" in refused(folder, tasks, capsys)


@pytest.mark.usefixtures("no_model")
def test_the_default_benchmarks_are_known_and_their_missing_data_sets_are_named(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(folder, EvaluationConfig().tasks, capsys)
    assert "data sets: Rowan/hellaswag, cais/mmlu, truthfulqa/truthful_qa" in message
    assert "TaskManager().load(['mmlu', 'hellaswag', 'truthfulqa_mc2'])" in message
    assert "nearest valid: evaluation.tasks=hellaswag" in refused(folder, [*SHIPPED, "helaswag"], capsys)


def test_without_the_harness_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setattr(harness, "_manager_of", harness._manager_of.__wrapped__)
    harness._check.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'sae_lora\[downstream\]'"):
        harness.check(EvaluationConfig(tasks=["piqa"]))


@pytest.mark.parametrize("cell", list(Cell))
@torch.no_grad()
def test_cells_are_the_same_as_in_other_suites(
    cell: Cell, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SAEs before the run are different here; special tokens keep their activation."""
    halving = Replacement(lambda resid: resid / 2)
    splices = tuple(splice._replace(sae=halving) for splice in subject.after)
    monkeypatch.setattr(subject, "before", splices)
    tokens = subject.tokens[:2]
    expected = subject.head.logits(subject.hidden(cell, tokens).flatten(0, 1))
    with subject.in_place(cell) as model:
        result = model(tokens).logits.flatten(0, 1)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_groups_are_compared_document_by_document(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness aggregates tasks of a group, under names of its own."""
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "tiny_continuation.yaml").read_text()
    (tmp_path / "more.yaml").write_text(text.replace("task: tiny_continuation", "task: more"))
    group = {
        "group": "both",
        "task": ["tiny_continuation", "more"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "both.yaml").write_text(yaml.dump(group))
    monkeypatch.setattr(harness, "FOLDER", tmp_path)
    monkeypatch.setattr(harness, "_manager_of", harness._manager_of.__wrapped__)
    monkeypatch.setattr(Subject, "cells", [Cell.base, Cell.spliced])
    result = harness.score(subject, dataclasses.replace(CONFIG, tasks=["both"], task_limit=6)).scores

    whole, part = result["both"], result[result["both"].subtasks[0]]
    assert len(whole.subtasks) == 2
    assert (whole.documents, part.documents, whole.few_shot) == (12, 6, 0)
    of_group, of_task = whole.cells["spliced"]["acc"], part.cells["spliced"]["acc"]
    assert of_group.value == pytest.approx(of_task.value)
    assert of_group.over_base == pytest.approx(of_task.over_base)
    assert of_group.over_base_stderr is not None
    assert of_task.over_base_stderr is not None
    # The same six documents twice: sums of squares double, degrees of freedom are 11 and 5.
    expected = of_task.over_base_stderr * (5 / 11) ** 0.5
    assert of_group.over_base_stderr == pytest.approx(expected)


def test_paired_errors() -> None:
    # Differences 1, 0, 0, 1 around 0.5: their variance is 1/3, and the variance of their mean 1/12.
    assert paired_error([1, 1, 0, 1], [0, 1, 0, 0]) == pytest.approx((1 / 12) ** 0.5)
    assert paired_error([0.2, 0.4], [0.2, 0.4]) == 0
    assert paired_error([1], [0]) is None


@pytest.mark.parametrize("task", SHIPPED)
def test_shipped_tasks_are_from_held_out_files(task: str) -> None:
    examples = list(rows(f"{task}.jsonl")["test"])
    assert len(examples) > 100
    assert len({row["document"] for row in examples[:20]}) > 8
    for row in examples:
        assert in_validation(row["document"], DataConfig().validation_share)
        assert len(row["text"]) <= cut_tasks.LONGEST_TEXT
        if task == "tiny_continuation":
            assert len(set(row["choices"])) == cut_tasks.CHOICES
            assert 0 <= row["answer"] < cut_tasks.CHOICES
        else:
            assert re.search(rf"\b{row['answer']}\b", row["text"])


def test_cutting_rows_is_reproducible(tmp_path: Path) -> None:
    """Each row is a part of its document."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        cut_tasks.make(tmp_path / name)
    texts = {document.key: document.text for document in cut_tasks.held_out()}
    for task in SHIPPED:
        file = f"{task}.jsonl"
        assert (tmp_path / "first" / file).read_text() == (tmp_path / "second" / file).read_text()
        for line in (tmp_path / "first" / file).read_text().splitlines():
            row = json.loads(line)
            is_choice = task == "tiny_continuation"
            end = f" {row['choices'][row['answer']]}" if is_choice else row["answer"]
            assert row["text"] + end in texts[row["document"]]


OF_THREE = """
import sys
from lm_eval.tasks._index import TaskIndex
from sae_lora.cli import main

files_in = TaskIndex._iter_yaml_files
TaskIndex._iter_yaml_files = staticmethod(
    lambda root: [file for name in ("hellaswag", "mmlu", "truthfulqa") for file in files_in(root / name)]
)
sys.exit(main())
"""
"""The command, with an index of only these benchmarks: that of all takes many seconds."""


def test_published_benchmarks(folder: RunFolder, published: Hub, tmp_path: Path) -> None:
    """The harness's own tasks read and score some documents of each, in the layout of the hub."""
    copy = RunFolder(tmp_path / "run")
    shutil.copytree(folder.path, copy.path, ignore=shutil.ignore_patterns("evaluation"))
    tasks = "hellaswag,truthfulqa_mc2,mmlu_anatomy"
    command = ["evaluate", str(copy.path), "--suite", "tasks", "--set", f"tasks=[{tasks}]"]
    process = subprocess.run(
        [sys.executable, "-c", OF_THREE, *command],
        env=os.environ
        | {"HF_HOME": str(published.root / "home"), "HF_HUB_OFFLINE": "0"}
        | {"HF_ENDPOINT": published.address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    record = suite_records.read(copy, Suite.tasks)
    assert record is not None
    scores = record.results["scores"]
    assert {name: task["documents"] for name, task in scores.items()} == dict.fromkeys(scores, 3)
    assert list(scores) == tasks.split(",")
    for task in scores.values():
        assert set(task["cells"]) == set(Cell)
        assert all(0 <= cell["acc"]["value"] <= 1 for cell in task["cells"].values())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a few documents of three data sets, in their published layouts."""
    root = tmp_path_factory.mktemp("hub")
    sets = root / "datasets"
    for split in ("train", "validation"):
        _write(sets / f"Rowan/hellaswag/data/{split}-00000-of-00001.parquet", [HELLASWAG] * 3)
    questions = sets / "truthfulqa/truthful_qa"
    _write(questions / "multiple_choice/validation-00000-of-00001.parquet", [TRUTHFULQA] * 3)
    _describe(questions, "multiple_choice", "validation")
    subjects = sets / "cais/mmlu"
    for split in ("test", "dev"):
        _write(subjects / f"anatomy/{split}-00000-of-00001.parquet", [MMLU] * 3)
    _describe(subjects, "anatomy", "test", "dev")
    with serving(root) as hub:
        yield hub


HELLASWAG = {
    "activity_label": "Sorting",
    "ctx_a": "A list is read.",
    "ctx_b": "it",
    "ctx": "A list is read. it",
    "endings": ["is sorted.", "is a tree [title] of names.", "sings.", "is lost."],
    "label": "0",
}
TRUTHFULQA = {
    "question": "What does len return?",
    "mc1_targets": {"choices": ["a number", "a list"], "labels": [1, 0]},
    "mc2_targets": {"choices": ["a number", "an int", "a list"], "labels": [1, 1, 0]},
}
MMLU = {"question": "Which is a bone?", "choices": ["femur", "list", "tuple", "dict"], "answer": 0}


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def _describe(repository: Path, config: str, *splits: str) -> None:
    files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
    about = {"configs": [{"config_name": config, "data_files": files}]}
    (repository / "README.md").write_text(f"---\n{yaml.dump(about)}---\n")


@pytest.mark.case("B4")
def test_a_padding_token_that_the_model_lacks_has_no_effect(
    subject: Subject, scores: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Any = copy.deepcopy(subject.adapted.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    assert tokenizer.pad_token_id >= subject.model.config.vocab_size
    monkeypatch.setattr(subject.adapted, "tokenizer", tokenizer)
    assert harness.score(subject, CONFIG) == scores


@pytest.mark.case("B4")
def test_a_token_of_a_prompt_that_the_model_lacks_is_refused(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Any = subject.adapted.tokenizer
    beyond = subject.model.config.vocab_size + 5
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    token = max(vocabulary, key=first_rows("tiny_continuation")[0]["text"].count)
    vocabulary[token] = beyond
    changed = copy.deepcopy(tokenizer)
    changed._tokenizer = Tokenizer.from_str(json.dumps(content))
    monkeypatch.setattr(subject.adapted, "tokenizer", changed)
    message = rf"does not fit the model: it gives token {beyond} \({re.escape(repr(token))}\)"
    with pytest.raises(UserError, match=message):
        harness.score(subject, CONFIG)
    with pytest.raises(UserError, match=message):  # the texts of any other suite
        subject.hidden(Cell.adapted, torch.tensor([[1, beyond]]))
