"""From the teacher's score of a story to its reward, the number that PPO maximises.

A story earns its score, multiplied by how different it is from the other stories of its step (as DARLING does, arXiv
2509.02534), and the paper's length term; a story that is cut off keeps a part of that.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tinystory.config import InteractConfig

if TYPE_CHECKING:  # reports need no torch
    from tinystory.student.generate import Story


def story_rewards(
    config: InteractConfig, stories: Sequence["Story"], scores: Sequence[float | None]
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


def best_of_n(values: Sequence[Any], count: int) -> list[int]:
    """The index of the largest of values[i::count], for each i below count; None, no score, is less than any."""
    groups = (range(i, len(values), count) for i in range(count))
    return [max(group, key=lambda i: (values[i] is not None, values[i])) for group in groups]


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


def cluster_sizes(texts: Sequence[str], threshold: float = 0.12) -> list[int]:
    """Sizes of the clusters of near-duplicate stories (`cluster_ids`), largest first."""
    return sorted(Counter(cluster_ids(texts, threshold)).values(), reverse=True)


def cluster_ids(texts: Sequence[str], threshold: float = 0.12) -> list[int]:
    """The cluster of each text, numbered from 0 by first appearance. A text joins the first cluster with whose founder
    it shares more than `threshold` of their word 3-grams (Jaccard; capitalised words count as one word), or founds one.
    """
    ids: list[int] = []
    sizes: list[int] = []  # of the founders, in 3-grams
    founders: dict[tuple[str, ...], list[int]] = {}  # by 3-gram
    for text in texts:
        grams = phrases(text, 3)
        shared = Counter(founder for gram in grams for founder in founders.get(gram, ()))
        near = [i for i, count in shared.items() if count > threshold * (len(grams) + sizes[i] - count)]
        ids.append(min(near, default=len(sizes)))
        if not near:
            for gram in grams:
                founders.setdefault(gram, []).append(len(sizes))
            sizes.append(len(grams))
    return ids
