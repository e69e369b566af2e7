"""Collapse and scores without signal are said, health is not."""

import random

import pytest

from tinystory.rl.collapse import WINDOW, scores_without_signal, signs_of_collapse, warnings

HEALTHY = dict(distinct_4=0.85, story_clusters=40, length_mean=120.0, entropy=150.0, kl=1.5, reward_std=0.1)


def run(steps: int = 30, **end) -> list[dict]:
    """Records that move in a line from a healthy start to `end`, with noise."""
    rng = random.Random(0)
    return [
        {
            name: (start + (end.get(name, start) - start) * step / (steps - 1)) * rng.uniform(0.9, 1.1)
            for name, start in HEALTHY.items()
        }
        for step in range(steps)
    ]


def test_a_healthy_run_is_left_alone():
    assert signs_of_collapse(run(), 2.0) == ""
    assert signs_of_collapse(run(distinct_4=0.7, story_clusters=30, length_mean=140.0, entropy=100.0), 2.0) == ""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (dict(distinct_4=0.35), "grow alike"),
        (dict(story_clusters=2), "few clusters"),
        (dict(length_mean=30.0), "shrink"),
        (dict(entropy=20.0), "entropy"),
        (dict(kl=12.0), "KL runs away"),
        (dict(reward_std=0.001), "have the same reward"),
    ],
)
def test_each_sign_is_said_with_what_to_try(end, said):
    signs = signs_of_collapse(run(**end), 2.0)
    assert said in signs and "--kl-coef" in signs and signs.count(":") == 1


def test_scores_that_are_all_the_same_for_some_steps_are_said_with_what_to_try():
    told, flat = dict(score_mean=5.0, score_std=1.2), dict(score_mean=9.0, score_std=0.0)
    assert "--teacher-prompt" in scores_without_signal([told] * 3 + [flat] * WINDOW)
    for records in ([flat] * (WINDOW - 1), [flat] * 9 + [told], [told] * 9, [dict(score_std=None)] * 9, [{}] * 9):
        assert scores_without_signal(records) == ""
    assert warnings([flat] * WINDOW, 2.0, 64).keys() == {"signal"}
    assert warnings(run(kl=12.0), 2.0, 64).keys() == {"collapse"}


def test_few_large_steps_are_enough_for_a_warning():
    collapsed = run(4, distinct_4=0.2)
    assert warnings(collapsed, 2.0, 1024).keys() == {"collapse"} and warnings(collapsed, 2.0, 256) == {}
    flat = [dict(score_mean=9.0, score_std=0.0)]
    assert "of the last step had" in warnings(flat, 2.0, 1024)["signal"] and warnings(flat, 2.0, 512) == {}


def test_a_short_run_and_missing_values_say_nothing():
    assert signs_of_collapse(run(6, distinct_4=0.1), 2.0) == ""
    assert signs_of_collapse([{"distinct_4": None}] * 30, 2.0) == ""
