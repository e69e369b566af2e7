"""From the teacher's score of a story to its reward, the number that PPO maximises.

A story earns its score, multiplied by how different it is from the other stories of its step (as DARLING does, arXiv
2509.02534), and the paper's length term; a story that is cut off keeps a part of that.
"""

from collections import Counter
from collections.abc import Sequence

from tinystory.config import InteractConfig
from tinystory.student.generate import Story


def story_rewards(
    config: InteractConfig, stories: Sequence[Story], scores: Sequence[float | None]
) -> list[float | None]:
    """The reward of each story of a step, None without a score. All of them count when it is compared with others."""
    return [
        None if score is None else story_reward(config, score, difference, story.words, story.ended == "eos")
        for story, score, difference in zip(stories, scores, differences([s.text for s in stories]), strict=True)
    ]


def story_reward(config: InteractConfig, score: float, difference: float, words: int, ended: bool) -> float:
    """(score * (1 - diversity + diversity * difference) + length_weight * words / length_words) / (1 + length_weight),
    times `unfinished` for a story that was cut off: 0..1.

    score, difference: 0..1. The length term, at most length_weight, keeps stories from shrinking (arXiv 2509.15714,
    whose reward this is with diversity 0 and unfinished 1). words: whitespace-separated words that the student wrote.
    """
    quality = score * (1 - config.diversity + config.diversity * difference)
    length = min(words / config.length_words, 1.0)
    reward = (quality + config.length_weight * length) / (1 + config.length_weight)
    return reward if ended else reward * config.unfinished


def differences(stories: Sequence[str]) -> list[float]:
    """How different each story is from the others, 0..1: the mean over its distinct phrases of 1 / (number of stories
    that contain the phrase). 1 if it shares none; 0 for a story too short to contain one."""
    grams = [phrases(story) for story in stories]
    counts = Counter(gram for distinct in grams for gram in distinct)
    return [sum(1 / counts[gram] for gram in distinct) / len(distinct) if distinct else 0.0 for distinct in grams]


def phrases(story: str, n: int = 4) -> set[tuple[str, ...]]:
    """The distinct n-grams of a story's words, in lower case and without punctuation. Capitalised words, names among
    them, count as one word: a story told again about someone else is not a different one."""
    words = ["@" if word[:1].isupper() else word.lower().strip('.,;:!?"') for word in story.split()]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
