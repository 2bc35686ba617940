"""Stages as text, and their lines where the output is no terminal."""

from itertools import pairwise

import pytest

from sae_lora.common.console import PROGRESS_MARK, Spacing, stage_display, stage_text
from tests.support.clock import Clock


@pytest.mark.parametrize(
    ("stage", "done", "total", "text"),
    [
        ("loading model", 0, 0, "loading model"),
        ("evaluating", 0, 1, "evaluating"),
        ("evaluating", 3, 16, "evaluating 3/16"),
        ("tokenising", 400, 1000, "tokenising 40%"),
    ],
)
def test_a_stage_is_shown_with_its_share_done(stage: str, done: int, total: int, text: str) -> None:
    assert stage_text(stage, done, total) == text


def test_lines_are_ten_seconds_apart_and_later_rarer() -> None:
    clock = Clock()
    spacing = Spacing(clock)
    times = []
    for second in range(1, 36_000):
        clock.advance(1)
        if spacing.is_due():
            spacing.restart()
            times.append(second)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == gaps[0] == 10
    assert gaps == sorted(gaps)
    assert gaps[-1] > 300
    assert len(times) < 300  # in ten hours


def test_a_new_stage_has_a_line_at_once_and_a_repeated_one_only_in_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    with stage_display(announced=["training"], clock=clock) as show:
        show("evaluating", 0, 4)
        for _ in range(2):  # a quick stage that alternates with another one
            clock.advance(4)
            show("training", 3, 9)
            show("evaluating", 1, 4)
        assert capsys.readouterr().out == f"{PROGRESS_MARK}evaluating 0/4\n"
        clock.advance(4)
        show("evaluating", 2, 4, "loss 0.5", seconds_left=61)
        show("evaluating", 3, 4)
    assert capsys.readouterr().out == f"{PROGRESS_MARK}evaluating 2/4  loss 0.5  ETA 1 min 01 s\n"
