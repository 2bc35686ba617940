"""Tokens per second and the time that is left, for durations that are known."""

from collections.abc import Iterator

import pytest

from sae_lora.train.pace import Pace

STEPS, PER_FILL, EVERY = 20, 8, 6
FILL, STEP, EVALUATION = 60.0, 2.0, 5.0


def test_a_step_that_compiles_is_not_like_the_others() -> None:
    pace = Pace()
    pace.is_unusual = True
    assert pace.note_step(100.0) == 100.0
    assert pace.step_seconds is None
    pace.note_step(2.0)
    assert pace.step_seconds == 2.0


def parts() -> Iterator[tuple[str, float]]:
    """The parts of a training in order, with their seconds; evaluations also before and after it."""
    yield "evaluation", EVALUATION
    for step in range(STEPS):
        if step % PER_FILL == 0:
            yield "fill", FILL
        yield "step", STEP
        if (step + 1) % EVERY == 0 or step + 1 == STEPS:
            yield "evaluation", EVALUATION


def test_the_time_left_is_exact_after_every_part() -> None:
    """Also in the last filling, which serves fewer steps."""
    pace, step, evaluated_at = Pace(PER_FILL), 0, 0
    remaining = sum(seconds for _, seconds in parts())
    for part, seconds in parts():
        remaining -= seconds
        match part:
            case "fill":
                if pace.step_seconds is not None:
                    halfway = pace.seconds_left(step, STEPS, evaluations(evaluated_at), filled=0.5)
                    assert halfway == pytest.approx(remaining + FILL / 2)
                pace.note_fill(step, seconds)
            case "step":
                pace.note_step(seconds)
                step += 1
            case _:
                pace.evaluation_seconds = seconds
                evaluated_at = step
        expected = pace.seconds_left(step, STEPS, evaluations(evaluated_at))
        assert expected == (None if step == 0 else pytest.approx(remaining))


def evaluations(evaluated_at: int) -> int:
    """Number of evaluations after this step."""
    return -(-(STEPS - evaluated_at) // EVERY)


@pytest.mark.case("C2")
def test_the_seconds_of_a_cycle_are_those_of_its_filling_and_its_steps() -> None:
    """Each step has the same part of the filling, so that the rate is the same in all of them."""
    pace = Pace(PER_FILL)
    pace.note_fill(0, FILL)
    seconds = [pace.note_step(STEP) for _ in range(PER_FILL)]
    assert sum(seconds) == pytest.approx(FILL + PER_FILL * STEP)
    assert set(seconds) == {pace.step_seconds}


def test_old_steps_are_forgotten() -> None:
    pace = Pace()
    for seconds in [20.0] * 3 + [1.0] * 40:
        pace.note_step(seconds)
    assert pace.step_seconds == pytest.approx(1.0)
