"""A run's budget, from the numbers that a grader reports."""

import math

import pytest

from tinystory.config import InteractConfig
from tinystory.data.openings import Openings
from tinystory.rl.budget import Budget
from tinystory.rl.policy import RunState
from tinystory.run.errors import UserError


def budget(affordable=10**6, **options) -> Budget:
    config = InteractConfig(stories_per_step=6, eval_stories=4, max_new_tokens=10, **options)
    openings = Openings(["Once upon a time"], seed=0)
    affords = lambda stories: stories <= affordable  # noqa: E731
    return Budget(config, openings, {"a": 10, "b": 20}, 3, affords, math.inf)


@pytest.mark.parametrize(
    "limit, flag", [(dict(affordable=14), "--budget-cost"), (dict(budget_words_out=140), "word")]
)
def test_as_many_evaluations_count_for_the_cost_as_for_the_words(limit, flag):
    # a step of 6, and evaluations of 4 before and after it
    budget(**limit).require_first_step(RunState(0.1), trial=0)
    less = {name: value - 1 for name, value in limit.items()}
    with pytest.raises(UserError, match=flag):
        budget(**less).require_first_step(RunState(0.1), trial=0)
    # a later step has one evaluation after it
    assert budget(**less).exhausted(RunState(0.1)) == ""


def test_openings_and_the_longest_replies_count_as_words_in():
    state = RunState(0.1, words_in=100)
    assert budget(budget_words=100 + 4 + 3 * 10).exhausted(state) == ""
    assert "the word budget" in budget(budget_words=100 + 4 + 3 * 10 - 1).exhausted(state)


def test_a_milestone_is_passed_once():
    assert budget().passed(9, 10) == ["a"]
    assert budget().passed(10, 19) == []
    assert budget().passed(0, 25) == ["a", "b"]
