"""What the grades of a run will take, before it begins, and the budget that must hold them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tinystory.config import InteractConfig
from tinystory.data.openings import Openings
from tinystory.evaluate.held_out import is_evaluated
from tinystory.evaluate.temperature import trial_stories
from tinystory.rl.budget import Budget
from tinystory.rl.policy import RunState
from tinystory.run import distributed
from tinystory.teacher.grade import Grader

# Options of a run with few grades, which the forecast of one with all names: docs/teachers.md, "Few
# grades".
FEW_GRADES: dict[str, Any] = {"grades": 64, "steps": 8, "eval_every": 0}


def open_budget(
    config: InteractConfig,
    state: RunState,
    openings: Openings,
    milestones: Mapping[str, int],
    grader: Grader,
) -> Budget:
    """The run's limits. Prints what its grades will take, and raises UserError if a new run cannot
    afford a step."""
    print_forecast(config, state, grader, openings)
    budget = Budget(config, openings, milestones, grader.most_words, grader.affords)
    trial = trial_stories(config, state)
    distributed.rank0_value(lambda: budget.require_first_step(state, trial))
    return budget


def print_forecast(
    config: InteractConfig, state: RunState, grader: Grader, openings: Openings
) -> None:
    """What the grades of the run and its evaluations will take, if the grader knows; then what they
    would without --grades, or, of a teacher at --teacher-url that is asked for all, with
    FEW_GRADES."""
    opening = openings[0]
    count = stories_to_grade(config, state)
    forecast = grader.forecast(count, opening)
    if not forecast:
        return
    print(f"forecast: {forecast}")
    if config.grades:
        whole = stories_to_grade(replace(config, grades=0), state)
        print(f"without --grades: {grader.forecast(whole, opening)}")
        return
    few = stories_to_grade(replace(config, **FEW_GRADES), state)
    if config.teacher_url and not state.step and few < count:
        flags = " ".join(f"--{name.replace('_', '-')} {FEW_GRADES[name]}" for name in FEW_GRADES)
        print(f"with {flags}: {grader.forecast(few, opening)}")


def stories_to_grade(config: InteractConfig, state: RunState) -> int:
    """Stories that the teacher will grade: of the steps left, of evaluations, and of the trial of
    temperatures."""
    count = (config.steps - state.step) * config.stories_per_step
    if config.grades:
        count = config.grades - state.asked
    if config.eval_graded:
        first = state.evaluated + 1
        evaluations = sum(is_evaluated(config, step) for step in range(first, config.steps + 1))
        count += evaluations * config.eval_stories
    return count + trial_stories(config, state)
