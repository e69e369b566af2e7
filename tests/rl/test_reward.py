"""The reward: the paper's formula, and the difference from other stories."""

import numpy as np
import pytest
import torch
from conftest import AWKWARD
from hypothesis import given
from hypothesis import strategies as st

from tinystory.config import InteractConfig
from tinystory.config.presets import INTERACT_PRESETS
from tinystory.rl import ppo
from tinystory.rl.batch import collate
from tinystory.rl.reward import (
    differences,
    phrases,
    story_reward,
    story_rewards,
    word_ends,
    word_rewards,
)
from tinystory.student.generate import Story
from tinystory.teacher.grade import NOT_ASKED, Grade

PAPER = InteractConfig(**INTERACT_PRESETS["paper"])


def test_reward_is_the_papers():
    for difference, ended in ((0.0, False), (1.0, True)):  # neither matters
        assert story_reward(PAPER, 7 / 9, difference, 45, ended) == pytest.approx(
            (7 / 9 + 0.4 * 45 / 90) / 1.4
        )
        assert story_reward(PAPER, 1.0, difference, 90, ended) == 1.0
        assert story_reward(PAPER, 1.0, difference, 500, ended) == 1.0
        assert story_reward(PAPER, 0.0, difference, 0, ended) == 0.0


def test_sameness_and_a_cut_cost_a_part_of_the_reward():
    whole, half = (
        InteractConfig(length_weight=0.0, diversity=diversity, unfinished=0.5)
        for diversity in (1.0, 0.5)
    )
    assert story_reward(whole, 0.8, 0.25, 50, True) == pytest.approx(0.8 * 0.25)
    assert story_reward(half, 0.8, 0.25, 50, True) == pytest.approx(0.8 * 0.625)
    assert story_reward(whole, 0.8, 1.0, 50, False) == pytest.approx(0.4)
    long = story_reward(InteractConfig(length_weight=0.4, length_words=90), 0.8, 1.0, 90, True)
    assert long == pytest.approx(1.2 / 1.4)


unit = st.floats(0, 1)


@given(unit, unit, unit, st.integers(0, 300), st.booleans(), unit, unit)
def test_a_reward_is_from_0_to_1_and_rises_with_the_difference(
    score, low, high, words, ended, diversity, unfinished
):
    config = InteractConfig(
        diversity=diversity, unfinished=unfinished, length_weight=0.4, length_words=90
    )
    low, high = sorted((low, high))
    rewards = [story_reward(config, score, difference, words, ended) for difference in (low, high)]
    assert -1e-12 <= rewards[0] <= rewards[1] + 1e-12 <= 1 + 2e-12


@given(st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=30), st.integers(1, 9))
def test_stories_that_are_all_the_same_share_their_difference(words, n):
    assert differences([" ".join(words)] * n) == pytest.approx([1 / n] * n)


@given(st.lists(st.integers(4, 30), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_stories_that_share_no_phrase_are_wholly_different(lengths, random):
    stories = [
        " ".join(f"{chr(97 + i)}{random.randrange(5)}" for _ in range(n))
        for i, n in enumerate(lengths)
    ]
    assert differences(stories) == pytest.approx([1.0] * len(stories))


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "Tom", "Mia"]), max_size=12).map(" ".join), max_size=8
    )
)
def test_a_difference_does_not_depend_on_order_or_on_names(stories):
    result = differences(stories)
    assert all(0 <= each <= 1 for each in result)
    assert differences(stories[::-1]) == pytest.approx(result[::-1])
    assert differences([story.replace("Tom", "Peanut") for story in stories]) == pytest.approx(
        result
    )


def test_phrases_count_names_as_one_word_and_ignore_punctuation():
    expected = {("@", "had", "a", "big"), ("had", "a", "big", "ball")}
    assert phrases('Tom had a "big" ball.') == expected
    assert phrases("Tom had a big ball") == phrases("Mia had a big, ball!")
    assert phrases("too short here") == set()
    assert phrases("a b c", 2) == {("a", "b"), ("b", "c")}
    assert differences(["Tom saw a dog", "Mia saw a dog", "a cat sat down", "short"]) == [
        0.5,
        0.5,
        1.0,
        0.0,
    ]


def story_of(tokenizer, text, ended="eos", index=0):
    ids = tokenizer.encode(text)
    tokens = torch.tensor(ids + [tokenizer.eos] * (ended == "eos"))
    zeros = torch.zeros(len(tokens))
    opening = torch.tensor([tokenizer.eos])
    story_text = tokenizer.decode(ids).strip()
    return Story(index, "Once", story_text, opening, tokens, zeros, zeros, zeros, ended)


def test_the_score_of_a_word_is_a_reward_at_its_last_token(tokenizer):
    config = InteractConfig(init="x", diversity=0.5, length_weight=0.25, unfinished=0.8)
    stories = [
        story_of(tokenizer, " Tom ran. Mia saw a ball!"),
        story_of(tokenizer, " Ben sat", "length", 1),
        story_of(tokenizer, " A cat sat.", "eos", 2),
        story_of(tokenizer, " It ran.", "eos", 3),
    ]
    grades = [
        Grade(None, 0.6, by_word=(0, -0.4, 0, 0, 0, 0.3, 0.7)),
        Grade(None, 0.7, by_word=(0.1, 0.2, 0.4)),
        Grade(None, 0.5),
        NOT_ASKED,
    ]
    difference = [0.5, 1.0, 1.0, 1.0]
    rewards = story_rewards(config, stories, [0.6, 0.7, 0.5, 0.25], difference)
    batch = collate(stories, torch.device("cpu"))
    batch.ref_logprobs = batch.logprobs - 1.0
    whole = ppo.token_rewards(batch, torch.tensor(rewards), 0.1)
    batch.rewards = word_rewards(config, stories, grades, difference, tokenizer)
    by_word = ppo.token_rewards(batch, torch.tensor(rewards), 0.1)
    torch.testing.assert_close(batch.story_sums(by_word), batch.story_sums(whole))

    lengths = batch.lengths.tolist()
    first, second, *others = (by_word + 0.1).split(lengths)  # without the KL penalty
    place = int(first.nonzero()[0])
    assert tokenizer.decode(stories[0].tokens[: place + 1].tolist()) == " Tom ran."
    # with a difference of 0.5, a score counts three quarters
    assert first[place].item() == pytest.approx(-0.4 * 0.75 / 1.25)
    # the end token has the score of the end and the reward's other terms
    length = 0.25 * min(stories[0].words / config.length_words, 1)
    assert first[-2].item() == pytest.approx(0.3 * 0.75 / 1.25)
    assert first[-1].item() == pytest.approx((0.7 * 0.75 + length) / 1.25)
    assert first.nonzero()[1:].flatten().tolist() == [len(first) - 2, len(first) - 1]
    # a story that was cut off keeps a part of each word's reward
    assert second[second.nonzero()[0]].item() == pytest.approx(0.1 * 0.8 / 1.25)
    for one, reward in zip(others, rewards[2:], strict=True):
        assert one[:-1].eq(0).all() and one[-1].item() == pytest.approx(reward)
    # a part of the batch keeps its words
    part = batch.rows(np.array([1, 2]))
    expected = torch.cat(batch.rewards.split(lengths)[1:3])
    torch.testing.assert_close(part.rewards, expected)


pieces = [piece for piece in AWKWARD if piece != "\ufffd"] + ["Tom", "ran.", "“Look!”", "naïve"]


@given(st.lists(st.sampled_from(pieces), min_size=1, max_size=12), st.integers(0, 3))
def test_a_word_ends_at_the_first_token_after_which_the_story_contains_it(tokenizer, texts, cut):
    """Also where a token has a part of a character, several words, or white space alone."""
    story = story_of(tokenizer, "".join(texts), "length" if cut else "eos")
    if 0 < cut < len(story.tokens):  # within a character, perhaps
        story.tokens = story.tokens[:-cut]
        story.text = tokenizer.decode(story.tokens.tolist()).strip()
    last = len(story.tokens) - 1
    ends = word_ends(story, tokenizer)
    words = story.text.split()
    assert len(ends) == len(words)
    contained = []  # the characters after each token
    for token in range(last + 1):
        written = tokenizer.decode(story.tokens[: token + 1].tolist())
        contained.append("".join(written.split()))
    for count, end in enumerate(ends, 1):
        beginning = "".join(words[:count])
        if beginning.endswith("\ufffd"):  # half a character
            assert end == last
        else:
            assert contained[end].startswith(beginning)
            assert end == 0 or not contained[end - 1].startswith(beginning)
