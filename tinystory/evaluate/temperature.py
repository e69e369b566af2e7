"""--temperature 0: choice of the temperature at which a student starts the interaction. The teacher
grades a few stories at each temperature, and the highest mean reward wins."""

from collections.abc import Mapping, Sequence
from typing import Any

from tinystory.config import InteractConfig
from tinystory.data.openings import Openings
from tinystory.evaluate.intervals import mean_of
from tinystory.rl.policy import Policy, RunState, rollout
from tinystory.rl.reward import differences, story_rewards
from tinystory.rl.start import begin_at
from tinystory.student.model import Student
from tinystory.teacher.grade import Grader

TEMPERATURES = (1.0, 0.8, 0.65, 0.5, 0.4)
STORIES = 32  # maximum number of stories per temperature
FIRST_INDEX = 3 * 10**9  # index of the first story; no other stories use these random numbers


def stories_per_temperature(config: InteractConfig) -> int:
    """Number of stories per temperature: with --grades, an eighth of them; at most STORIES."""
    eighth = config.grades // 8
    return min(eighth or STORIES, STORIES)


def trial_stories(config: InteractConfig, state: RunState) -> int:
    """Number of stories in the trial of temperatures; 0 if the run has no trial, or has begun."""
    if config.temperature or state.step:
        return 0
    return stories_per_temperature(config) * len(TEMPERATURES)


def choose_temperature(
    policy: Policy, reference: Student, openings: Openings, grader: Grader, state: RunState
) -> dict[str, Any]:
    """Facts for config.json: the best of TEMPERATURES, and the mean reward at each. Folds the best
    temperature into policy and reference. The words of the trial are counted in `state`."""
    config = policy.config
    count = stories_per_temperature(config)
    texts = [openings[index] for index in range(count)]
    rewards: dict[float, list[float | None]] = {}
    for temperature in TEMPERATURES:
        stories = rollout(policy, texts, FIRST_INDEX, temperature=temperature)
        grades = grader.grade_each([(story.opening, story.text) for story in stories])
        state.spend(stories, sum(grade.reply_words for grade in grades))
        scores = [grade.score for grade in grades]
        all_differences = differences([story.text for story in stories])
        rewards[temperature] = story_rewards(config, stories, scores, all_differences)
    best = best_temperature(rewards)
    begin_at(best, reference, policy)
    means = {str(key): round(mean_of(values) or 0.0, 3) for key, values in rewards.items()}
    print(f"temperature {best}; mean reward of {count} stories at each temperature: {means}")
    return {"temperature": best, "tried_temperatures": means}


def best_temperature(rewards: Mapping[float, Sequence[float | None]]) -> float:
    """The temperature with the highest mean reward; the first one if several are equal. rewards:
    temperature -> rewards of stories that continue the same openings."""
    return max(rewards, key=lambda temperature: mean_of(rewards[temperature]) or 0.0)
