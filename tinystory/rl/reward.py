"""The reward of a story, computed from the teacher's score. PPO maximises the reward.

The score is multiplied by a diversity factor: how different the story is from the other stories of
the step (as in DARLING, arXiv 2509.02534). Then the length term of the paper is added. The reward
of a story that was cut off is multiplied by --unfinished."""

import codecs
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinystory.config import InteractConfig
from tinystory.data.tokenizer import Tokenizer
from tinystory.student.generate import Story
from tinystory.teacher.grade import Grade


def story_rewards(
    config: InteractConfig,
    stories: Sequence[Story],
    scores: Sequence[float | None],
    differences: Sequence[float],
) -> list[float | None]:
    """The reward of each story of a step; None for a story without a score. differences: those of
    all stories of the step."""
    rewards: list[float | None] = []
    for story, score, difference in zip(stories, scores, differences, strict=True):
        reward = None
        if score is not None:
            ended = story.ended == "eos"
            reward = story_reward(config, score, difference, story.words, ended)
        rewards.append(reward)
    return rewards


def story_reward(
    config: InteractConfig, score: float, difference: float, words: int, ended: bool
) -> float:
    """The reward of a story, 0..1: (score * (1 - diversity + diversity * difference) +
    length_weight * min(words / length_words, 1)) / (1 + length_weight), times `unfinished` if the
    story was cut off. score and difference are 0..1.

    The length term keeps stories from becoming shorter. With diversity 0 and unfinished 1, this is
    the reward of arXiv 2509.15714. words: number of whitespace-separated words that the student
    wrote."""
    quality = score * (1 - config.diversity + config.diversity * difference)
    length = min(words / config.length_words, 1.0)
    reward = (quality + config.length_weight * length) / (1 + config.length_weight)
    return reward if ended else reward * config.unfinished


def word_rewards(
    config: InteractConfig,
    stories: Sequence[Story],
    grades: Sequence[Grade],
    differences: Sequence[float],
    tokenizer: Tokenizer,
) -> Tensor:
    """Rewards that a teacher's scores of words move to the last tokens of the words, (n,) float32
    for the n tokens of the stories in order. They are taken from the last token of the story, so
    those of a story sum to 0, and its reward remains that of `story_rewards`.

    The score of the end stays at that last token, which is the end token of a story that ended. With
    it at the last word, one student stopped ending its stories (lab/results/english.md)."""
    rewards_of_each = []
    for story, grade, difference in zip(stories, grades, differences, strict=True):
        rewards = np.zeros(len(story.tokens))
        if grade.by_word:
            ended = story.ended == "eos"
            best, worst = (
                story_reward(config, score, difference, story.words, ended) for score in (1.0, 0.0)
            )
            by_word = (best - worst) * np.array(grade.by_word[:-1])  # linear in the score
            np.add.at(rewards, word_ends(story, tokenizer), by_word)
            rewards[-1] -= by_word.sum()
        rewards_of_each.append(rewards)
    return torch.from_numpy(np.concatenate(rewards_of_each)).float()


def word_ends(story: Story, tokenizer: Tokenizer) -> np.ndarray:
    """The index of the token with the last character of each word of the story, (words,) int64."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(tokenizer.token_bytes[id]) for id in story.tokens.tolist()]
    written = np.cumsum([len("".join(piece.split())) for piece in pieces])
    word_lengths = [len(word) for word in story.text.split()]
    ends = np.searchsorted(written, np.cumsum(word_lengths))
    # the last character may be half a character, which only the end of the story completes
    return np.minimum(ends, len(pieces) - 1)


def differences(stories: Sequence[str]) -> list[float]:
    """How different each story is from the others, 0..1: the mean of 1 / (number of stories that
    contain the phrase) over the distinct phrases of the story. 1 if the story shares no phrase; 0
    if the story is too short to contain a phrase."""
    phrases_of_each = [phrases(story) for story in stories]
    stories_with: Counter[tuple[str, ...]] = Counter()
    for distinct in phrases_of_each:
        stories_with.update(distinct)
    result = []
    for distinct in phrases_of_each:
        # fsum, because the order of a set differs between processes
        rarity = math.fsum(1 / stories_with[phrase] for phrase in distinct)
        result.append(rarity / len(distinct) if distinct else 0.0)
    return result


def phrases(story: str, n: int = 4) -> set[tuple[str, ...]]:
    """Distinct word n-grams of a story, in lower case and without punctuation. All capitalised
    words, names among them, count as one word: the same story with another name is not a different
    story."""
    words = []
    for word in story.split():
        is_capitalised = word[:1].isupper()
        words.append("@" if is_capitalised else word.lower().strip('.,;:!?"'))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
