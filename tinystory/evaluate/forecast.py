"""Forecast of the cost of a run's grades, before the run begins."""

from dataclasses import replace
from typing import Any

from tinystory.config import InteractConfig
from tinystory.config.presets import TEACHER_DEFAULTS
from tinystory.data.openings import Openings
from tinystory.evaluate.calibration import CHEAP, CHEAP_KINDS
from tinystory.evaluate.corruptions import DULL
from tinystory.evaluate.held_out import is_evaluated
from tinystory.evaluate.temperature import trial_stories
from tinystory.rl.policy import RunState
from tinystory.teacher.grade import Grader

# Options of a run with few grades (docs/teachers.md, "Few grades"), which the forecast of a run
# with all grades suggests.
FEW_GRADES: dict[str, Any] = {"grades": 64, "steps": 8, "eval_every": 0}


def print_forecast(
    config: InteractConfig, state: RunState, grader: Grader, openings: Openings
) -> None:
    """Print a forecast of the cost of all grades in the run and the evaluations, if the grader can
    make one. For comparison, also print the forecast without --grades; or, for a teacher at
    --teacher-url and a run without --grades, the forecast with FEW_GRADES."""
    opening = openings[0]
    count = stories_to_grade(config, state)
    forecast = grader.forecast(count, opening)
    if not forecast or not config.teacher_url:  # the built-in teacher costs a minute, not tokens
        return
    print(f"forecast: {forecast}")
    if config.grades:
        whole = stories_to_grade(replace(config, grades=0), state)
        print(f"without --grades: {grader.forecast(whole, opening)}")
        return
    few = stories_to_grade(replace(config, **FEW_GRADES), state)
    if not state.step and few < count:
        flags = " ".join(f"--{name.replace('_', '-')} {FEW_GRADES[name]}" for name in FEW_GRADES)
        print(f"with {flags}: {grader.forecast(few, opening)}")


def demo_stories(teacher_prompt: str) -> int:
    """Number of stories that a model grades in the demo, and of the texts by which the model is
    measured before it. teacher_prompt: the prompt; grades are given to all stories."""
    options = TEACHER_DEFAULTS | {"teacher_prompt": teacher_prompt}
    if teacher_prompt in ("", "grades"):
        options = {}
    config = InteractConfig(**options)
    known = CHEAP * len((*CHEAP_KINDS, DULL))
    return stories_to_grade(config, RunState(config.kl_coef)) + known


def stories_to_grade(config: InteractConfig, state: RunState) -> int:
    """Number of stories that the teacher will grade in the remaining steps, the evaluations and the
    trial of temperatures."""
    count = (config.steps - state.step) * config.stories_per_step
    if config.grades:
        count = config.grades - state.asked
    if config.eval_graded:
        steps = range(state.evaluated_before, config.steps + 1)
        evaluations = sum(is_evaluated(config, step) for step in steps)
        count += evaluations * config.eval_stories
    return count + trial_stories(config, state)
