"""The reward: the paper's formula, and the difference from other stories."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystory.config import InteractConfig
from tinystory.config.presets import INTERACT_PRESETS
from tinystory.rl.reward import differences, phrases, story_reward

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
