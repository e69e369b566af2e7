"""--temperature 0: the temperature at which a student begins to interact, chosen by the rewards of a
few stories to training openings, which the teacher grades."""

import functools
from collections.abc import Mapping, Sequence

from tinystory.config import InteractConfig
from tinystory.data.openings import Openings
from tinystory.evaluate.intervals import mean_of
from tinystory.rl.policy import Policy, RunState, rollout
from tinystory.rl.reward import story_rewards
from tinystory.rl.start import begin_at
from tinystory.run import distributed
from tinystory.student.model import Student
from tinystory.teacher.grade import Grader

TEMPERATURES = (1.0, 0.8, 0.65, 0.5, 0.4)
STORIES = 32  # at most, at each
FIRST_INDEX = 3 * 10**9  # of these stories: no other stories draw these random numbers


def stories_per_temperature(config: InteractConfig) -> int:
    eighth = config.grades // 8
    return min(eighth or STORIES, STORIES)


def trial_stories(config: InteractConfig, state: RunState) -> int:
    """Stories of the trial of temperatures that is still to come."""
    if config.temperature or state.step:
        return 0
    return stories_per_temperature(config) * len(TEMPERATURES)


def choose_temperature(
    policy: Policy, reference: Student, openings: Openings, grader: Grader, state: RunState
) -> dict[str, float]:
    """Have policy and reference begin at the `best_temperature` of TEMPERATURES, which becomes
    --temperature. Returns the mean reward at each. The words count in state."""
    config = policy.config
    count = stories_per_temperature(config)
    texts = [openings[index] for index in range(count)]
    rewards: dict[float, list[float | None]] = {}
    for temperature in TEMPERATURES:
        stories = rollout(policy, texts, FIRST_INDEX, lambda story: None, temperature)
        pairs = [(story.opening, story.text) for story in stories]
        grades = distributed.rank0_value(functools.partial(grader.grade_each, pairs))
        state.spend(stories, sum(grade.reply_words for grade in grades))
        scores = [grade.score for grade in grades]
        rewards[temperature] = story_rewards(config, stories, scores)
    config.temperature = best_temperature(rewards)
    begin_at(config.temperature, reference, policy)
    means = {str(key): round(mean_of(values) or 0.0, 3) for key, values in rewards.items()}
    print(f"temperature {config.temperature}; mean reward of {count} stories at each: {means}")
    return means


def best_temperature(rewards: Mapping[float, Sequence[float | None]]) -> float:
    """The temperature with the highest mean reward; of equal ones, the first. rewards: of stories to
    the same openings at each temperature."""
    return max(rewards, key=lambda temperature: mean_of(rewards[temperature]) or 0.0)
