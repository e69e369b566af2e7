"""Changes of train_interact.py for runs of lab/recipes.py. The name of a change precedes the options
of a run: `no model: --grades 64`. Each change is a context in which train_interact.py behaves
differently in one point. A control of train_interact.py (--control) is named in the same way:
`shuffled: --grades 64` is the control of the run `--grades 64`."""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor

import train_interact
from lab.reader import Reader, Stories, one_line
from tinystory.config import InteractConfig
from tinystory.config.control import CONTROLS
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.corruptions import split_sentences
from tinystory.rl import ppo, score_model
from tinystory.rl.batch import Batch
from tinystory.rl.policy import Policy
from tinystory.rl.reward import story_reward, story_rewards
from tinystory.rl.score_model import ScoreModel
from tinystory.run.errors import UserError
from tinystory.student.generate import Story
from tinystory.teacher import callable


@contextlib.contextmanager
def random_choice() -> Iterator[None]:
    """The stories to grade are drawn at random, instead of the most informative ones."""

    def choose(model: ScoreModel, features: Tensor, count: int) -> list[int]:
        generator = random.Random(f"random choice {len(model.scores)} {float(features.sum())}")
        return sorted(generator.sample(range(len(features)), count))

    with patch.object(ScoreModel, "choose", choose):
        yield


@contextlib.contextmanager
def no_model() -> Iterator[None]:
    """No scores are predicted: PPO learns only from the graded stories."""

    def without_predictions(
        model: object, features: object, stories: object, scores: list[float | None], sent: object
    ) -> tuple[list[float | None], dict]:
        return scores, {}

    with patch.object(score_model, "with_predictions", without_predictions):
        yield


@contextlib.contextmanager
def by_sentence() -> Iterator[None]:
    """With `--reward lab/two_judges.py`, the reader's part of a story's reward is given at the last
    token of each sentence, as the sentence's part of the coherence, and not at the end of the story.
    The story's reward is the same."""
    from lab import two_judges  # loads the reader

    coherences: dict[tuple[str, str], np.ndarray] = {}  # parts, by opening and story
    # by the story's index in the run: the end of each sentence, in bytes without spaces, and the
    # sentence's part of the reward
    parts_of: dict[int, list[tuple[int, float]]] = {}
    parts_of_coherence = Reader.by_sentence
    step = ppo.step
    token_rewards = ppo.token_rewards

    def read(reader: Reader, stories: Stories) -> list[np.ndarray]:
        parts = parts_of_coherence(reader, stories)
        coherences.update(zip(stories, parts, strict=True))
        return parts

    def rewards_of(
        config: InteractConfig,
        stories: Sequence[Story],
        scores: Sequence[float | None],
        differences: Sequence[float],
    ) -> list[float | None]:
        if not coherences:
            raise UserError(
                "'by sentence' changes --reward lab/two_judges.py: give it, by this name"
            )
        parts_of.clear()
        for story, difference in zip(stories, differences, strict=True):
            ended = story.ended == "eos"
            best, worst = (
                story_reward(config, score, difference, story.words, ended) for score in (1.0, 0.0)
            )
            # half of the score is the reader's, which rises by 1 from NO_COHERENCE to 0
            scale = (best - worst) / 2 / -two_judges.NO_COHERENCE
            parts = scale * coherences.get((story.opening, story.text), np.zeros(0))
            sentences = split_sentences(one_line(story.text))
            lengths = [len("".join(sentence.split()).encode()) for sentence in sentences]
            ends = itertools.accumulate(lengths)
            # the reader cuts a long story, so it may have fewer sentences
            parts_of[story.index] = list(zip(ends, parts.tolist(), strict=False))
        coherences.clear()
        return story_rewards(config, stories, scores, differences)

    def rewards_by_sentence(
        tokenizer: Tokenizer, batch: Batch, rewards: Tensor, kl_coef: float
    ) -> Tensor:
        by_token = token_rewards(batch, rewards, kl_coef)
        stops = batch.lengths.cumsum()
        for index, length, stop in zip(batch.indices, batch.lengths, stops, strict=True):
            start = stop - length
            pieces = [tokenizer.token_bytes[id] for id in batch.tokens[start:stop].tolist()]
            written = np.cumsum([len(b"".join(piece.split())) for piece in pieces])
            for end, part in parts_of[index]:
                last = min(int(np.searchsorted(written, end)), length - 1)
                by_token[start + last] += part
                by_token[stop - 1] -= part
        return by_token

    def step_by_sentence(policy: Policy, *arguments: Any) -> dict[str, float]:
        with patch.object(ppo, "token_rewards", partial(rewards_by_sentence, policy.tokenizer)):
            return step(policy, *arguments)

    with (
        patch.dict(callable.CONTROLS, {"lab/two_judges.py": two_judges.score}),
        patch.object(Reader, "by_sentence", read),
        patch.object(train_interact, "story_rewards", rewards_of),
        patch.object(ppo, "step", step_by_sentence),
    ):
        yield


CHANGES: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "random choice": random_choice,
    "no model": no_model,
    "by sentence": by_sentence,
}


def split(text: str) -> tuple[str, str]:
    """The control or change and the options of `NAME: OPTIONS`. Without a colon before the options,
    the name is "". Raises UserError for an unknown name."""
    before, colon, after = text.partition(":")
    if not colon or before.lstrip().startswith("-"):
        return "", text
    names = [*CONTROLS, *filter(None, CHANGES)]
    if before not in names:
        known = ", ".join(names)
        raise UserError(f"--options {text!r}: {before!r} is not a control: give one of {known}")
    return before, after
