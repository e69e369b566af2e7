"""From the teacher's score of a story to its reward, which PPO maximises.

The score is multiplied by how different the story is from the others of its step (as in DARLING,
arXiv 2509.02534), and the paper's length term is added. A story that is cut off keeps a part of the
sum."""

import math
from collections import Counter
from collections.abc import Sequence

from tinystory.config import InteractConfig
from tinystory.student.generate import Story


def story_rewards(
    config: InteractConfig, stories: Sequence[Story], scores: Sequence[float | None]
) -> list[float | None]:
    """The reward of each story of a step, None without a score. Stories without a score count in
    `differences`."""
    rewards: list[float | None] = []
    all_differences = differences([story.text for story in stories])
    for story, score, difference in zip(stories, scores, all_differences, strict=True):
        reward = None
        if score is not None:
            ended = story.ended == "eos"
            reward = story_reward(config, score, difference, story.words, ended)
        rewards.append(reward)
    return rewards


def story_reward(
    config: InteractConfig, score: float, difference: float, words: int, ended: bool
) -> float:
    """(score * (1 - diversity + diversity * difference) + length_weight * min(words / length_words,
    1)) / (1 + length_weight), times `unfinished` if the story was cut off; score, difference and
    reward are 0..1.

    The length term keeps stories from shrinking (arXiv 2509.15714, whose reward this is with
    diversity 0 and unfinished 1). words: whitespace-separated words that the student wrote."""
    quality = score * (1 - config.diversity + config.diversity * difference)
    length = min(words / config.length_words, 1.0)
    reward = (quality + config.length_weight * length) / (1 + config.length_weight)
    return reward if ended else reward * config.unfinished


def differences(stories: Sequence[str]) -> list[float]:
    """How different each story is, 0..1: the mean over its distinct phrases of 1 / (number of
    stories that contain the phrase). 1 if it shares none; 0 if it is too short to contain one."""
    phrases_of_each = [phrases(story) for story in stories]
    stories_with: Counter[tuple[str, ...]] = Counter()
    for distinct in phrases_of_each:
        stories_with.update(distinct)
    result = []
    for distinct in phrases_of_each:
        # fsum: the order of a set is another one in each process.
        rarity = math.fsum(1 / stories_with[phrase] for phrase in distinct)
        result.append(rarity / len(distinct) if distinct else 0.0)
    return result


def phrases(story: str, n: int = 4) -> set[tuple[str, ...]]:
    """Distinct word n-grams, in lower case and without punctuation. Capitalised words, names among
    them, count as one word: a story told again about someone else is not a different one."""
    words = []
    for word in story.split():
        is_capitalised = word[:1].isupper()
        words.append("@" if is_capitalised else word.lower().strip('.,;:!?"'))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
