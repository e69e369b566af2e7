"""From the teacher's score of a story to its reward, which PPO maximises.

The score is multiplied by how different the story is from the others of its step (as in DARLING,
arXiv 2509.02534), and the paper's length term is added. A story that is cut off keeps a part of the
sum."""

from collections import Counter
from collections.abc import Sequence

from tinystory.config import InteractConfig
from tinystory.student.generate import Story


def story_rewards(
    config: InteractConfig, stories: Sequence[Story], scores: Sequence[float | None]
) -> list[float | None]:
    """The reward of each story of a step, None without a score. Stories without a score count in
    `differences`."""
    return [
        None
        if score is None
        else story_reward(config, score, difference, story.words, story.ended == "eos")
        for story, score, difference in zip(
            stories, scores, differences([s.text for s in stories]), strict=True
        )
    ]


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
    grams = [phrases(story) for story in stories]
    counts = Counter(gram for distinct in grams for gram in distinct)
    return [
        sum(1 / counts[gram] for gram in distinct) / len(distinct) if distinct else 0.0
        for distinct in grams
    ]


def phrases(story: str, n: int = 4) -> set[tuple[str, ...]]:
    """Distinct word n-grams, in lower case and without punctuation. Capitalised words, names among
    them, count as one word: a story told again about someone else is not a different one."""
    words = ["@" if word[:1].isupper() else word.lower().strip('.,;:!?"') for word in story.split()]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
