"""Collapse, a runaway KL, exploding losses and scores without signal give one warning each; a
healthy run gives none."""

import math
import random

import pytest
import torch

from tinystory.evaluate.story_records import score_relations
from tinystory.run.collapse import FEW, WINDOW, CollapseDetector
from tinystory.student.generate import Story
from tinystory.teacher.callable import random_scores

HEALTHY = dict(distinct_4=0.85, story_clusters=40, length_mean=120.0, entropy=150.0, kl=1.5)
HEALTHY |= dict(reward_std=0.1, score_mean=5.0, score_mode=0.3, scored=100, score_length=0.2)
HEALTHY |= dict(score_logprob=0.4, policy_loss=-0.1, value_loss=0.2, grad_norm=0.5, skipped=0)


def run(steps: int = 30, **end) -> list[dict]:
    """Records that move in a line from a healthy start to `end`, with noise."""
    rng = random.Random(0)
    return [
        {"step": step + 1}
        | {
            name: (start + (end.get(name, start) - start) * step / (steps - 1))
            * rng.uniform(0.9, 1.1)
            for name, start in HEALTHY.items()
        }
        for step in range(steps)
    ]


def kinds(records, kl_target=2.0) -> set[str]:
    return {*CollapseDetector(records, kl_target).warnings}


def test_a_healthy_run_is_left_alone():
    assert kinds(run()) == set()
    assert (
        kinds(
            run(distinct_4=0.7, story_clusters=30, length_mean=140.0, entropy=100.0, grad_norm=3.0)
        )
        == set()
    )


@pytest.mark.parametrize(
    ("kind", "sentence", "advice", "end"),
    [
        ("collapse", "become alike", "--kl-coef", dict(distinct_4=0.35)),
        ("collapse", "few clusters", "--diversity", dict(story_clusters=2)),
        ("collapse", "shrink", "--kl-coef", dict(length_mean=30.0)),
        ("collapse", "entropy", "--kl-coef", dict(entropy=20.0)),
        ("collapse", "have the same reward", "--kl-coef", dict(reward_std=0.001)),
        ("kl", "the KL far exceeds its target", "--kl-horizon", dict(kl=12.0)),
        ("loss", "the value loss diverges", "--learning-rate", dict(value_loss=90.0)),
        ("loss", "the gradient diverges", "--grad-clip", dict(grad_norm=300.0)),
        ("loss", "every step skips minibatches", "--learning-rate", dict(skipped=1)),
        ("signal", "95% or more of the stories", "--teacher-prompt", dict(score_mode=1.1)),
        (
            "signal",
            "correlate neither with the length nor with the likelihood",
            "--calibrate",
            dict(score_length=0.0, score_logprob=0.0),
        ),
    ],
)
def test_each_sign_is_said_with_what_to_try(kind, sentence, advice, end):
    ((name, (step, warning)),) = CollapseDetector(run(**end), 2.0).warnings.items()
    assert name == kind and sentence in warning and advice in warning and WINDOW <= step <= 30
    assert warning.count(": ") == 1


def test_skipped_minibatches_are_said_however_many_stories_a_step_has():
    for scored in (100, 384):
        records = [dict(step=step, scored=scored, skipped=1) for step in range(1, 6)]
        assert kinds(records) == {"loss"}
        assert kinds([*records[:4], records[4] | {"skipped": 0}]) == set()


def test_a_warning_comes_at_the_first_step_that_gives_reason_and_only_once():
    records = run(16, distinct_4=0.2)
    watch = CollapseDetector(kl_target=2.0)
    news = [watch.add(record) for record in records]
    (step,) = [record["step"] for record, new in zip(records, news, strict=True) if new]
    assert 10 <= step < 16 and watch.warnings["collapse"][0] == step
    # what an earlier process said is not said again
    resumed = CollapseDetector(records[:step], 2.0)
    assert [resumed.add(record) for record in records[step:]] == [{}] * (16 - step)


def test_scores_that_are_all_the_same_for_some_steps_are_said():
    varied, flat = (
        dict(step=1, score_mean=5.0, score_mode=0.3),
        dict(step=1, score_mean=9.0, score_mode=1.0),
    )
    _, sentence = CollapseDetector([varied] * 3 + [flat] * WINDOW).warnings["signal"]
    assert sentence.startswith("all stories of the last 5 steps had the same score (9 in the last)")
    unknown = dict(step=1, score_mode=None)
    for records in (
        [flat] * (WINDOW - 1),
        [flat] * 4 + [varied] + [flat] * 4,
        [varied] * 9,
        [unknown] * 9,
    ):
        assert kinds(records) == set()


def test_a_loss_of_pretraining_that_rises_is_said():
    falling = [dict(step=step, loss=7 - step / 50) for step in range(200)]
    assert kinds(falling) == set() and kinds([*falling, *[dict(step=200, loss=6.5)] * 90]) == set()
    warnings = CollapseDetector([*falling, *[dict(step=200, loss=9.0)] * 90]).warnings
    assert warnings.keys() == {"loss"} and "the loss diverges (3.51 to 7.8" in warnings["loss"][1]


def test_batches_of_dull_text_and_of_stories_are_no_explosion():
    rng = random.Random(0)
    assert kinds(dict(step=step, loss=rng.choice([0.6, 2.6])) for step in range(2000)) == set()


def stories(count: int) -> list[Story]:
    """The correlations of their random scores with lengths and log-probabilities, which depend on no
    generator, are below 0.01."""
    lengths = [5 + 4 * i % 75 for i in range(count)]
    return [
        Story(
            i,
            "Once",
            f"a{i} " * n,
            torch.arange(1),
            torch.arange(n),
            torch.full((n,), -float(5 * i % 67)),
            torch.zeros(n),
            torch.zeros(n),
            "eos",
        )
        for i, n in enumerate(lengths)
    ]


def test_random_scores_are_told_from_those_that_follow_the_story():
    by_length = [
        score_relations(stories(n), [s.words / 80 for s in stories(n)]) for n in range(64, 69)
    ]
    assert all(r["score_length"] == pytest.approx(1) and r["scored"] >= 64 for r in by_length)
    by_chance = [
        score_relations(stories(n), random_scores("", [s.text for s in stories(n)]))
        for n in range(64, 69)
    ]
    assert kinds([dict(step=1, **relations) for relations in by_length]) == set()
    assert kinds([dict(step=1, **relations) for relations in by_chance]) == {"signal"}
    few = [dict(step=1, scored=FEW // WINDOW - 1, score_length=0.0, score_logprob=0.0)] * 9
    assert kinds(few) == set()  # too few to tell


def test_relations_that_are_undefined_are_none():
    for scores in ([None] * 3, [0.5] * 3, [None, None, 0.2]):
        relations = score_relations(stories(3), scores)
        assert relations["score_length"] is None and relations["score_logprob"] is None
    assert score_relations(stories(3), [0.1, None, 0.4])["scored"] == 2


def test_few_large_steps_are_enough_for_a_warning():
    collapsed = run(4, distinct_4=0.2)
    assert kinds([record | {"scored": 1020, "unscored": 4} for record in collapsed]) == {"collapse"}
    assert kinds([record | {"scored": 256} for record in collapsed]) == set()
    flat = [dict(step=1, score_mean=9.0, score_mode=1.0, scored=1024)]
    assert "of the last step had" in CollapseDetector(flat).warnings["signal"][1]


def test_a_short_run_and_missing_values_say_nothing():
    assert kinds(run(6, distinct_4=0.1)) == set()
    assert kinds([{"step": 1, "distinct_4": None, "kl": None}] * 30) == set()
    assert math.inf == CollapseDetector().kl_target


@pytest.mark.parametrize("judge", [None, [0.5, None, None, 0.4], [0.5, None, None, 0.6]])
def test_predicted_scores_that_hardly_distinguish_stories_are_said_unless_they_taught(judge):
    predicted = run()
    for record, r_squared in zip(predicted, [None, 0.4, 0.1, 0.05], strict=False):
        record["score_r_squared"] = r_squared
    for record, score in zip(predicted, judge or (), strict=False):
        record["held_out_judge"] = score
    warnings = CollapseDetector(predicted, 2.0).warnings
    if judge and judge[-1] > judge[0]:
        assert not warnings
    else:
        ((name, (step, warning)),) = warnings.items()
        assert (name, step) == ("predicted", 3)
        assert "distinguish stories (R-squared 0.10)" in warning


def test_a_judge_that_falls_while_the_reward_rises_is_said_once():
    def warnings(rewards, scores):
        records = run(len(rewards))
        for record, reward, score in zip(records, rewards, scores, strict=True):
            record |= {"held_out_reward": reward, "held_out_judge": score}
        return CollapseDetector(records).warnings

    step, sentence = warnings([0.4, 0.5, 0.6, 0.7], [0.5, 0.4, 0.3, 0.2])["judge"]
    assert step == 3 and "0.4 to 0.6" in sentence and "0.5 to 0.3" in sentence
    assert "judge" not in warnings([0.4, 0.5, 0.6, 0.7], [0.5, 0.4, 0.45, 0.4])
    assert "judge" not in warnings([0.4, 0.3, 0.4, 0.3], [0.5, 0.4, 0.3, 0.2])
    assert "judge" not in warnings([0.4, None, 0.5, 0.6], [0.5, None, None, 0.4])


def test_a_judge_can_disagree_with_a_teacher_that_grades_no_evaluation():
    records = run(4)
    for i, record in enumerate(records):
        record |= {
            "reward_mean": 0.4 + i / 10,
            "held_out_reward": None,
            "held_out_judge": 0.5 - i / 10,
        }
    step, sentence = CollapseDetector(records).warnings["judge"]
    assert step == 3 and "the reward rose (0.4 to 0.6)" in sentence


def test_one_step_far_beyond_the_kl_target_is_said_at_once():
    """As after the first update of a student with too high a learning rate."""
    records = [dict(step=1, kl=0.0), dict(step=2, kl=6.1)]
    step, warning = CollapseDetector(records, 2.0).warnings["kl"]
    assert step == 2 and "the KL far exceeds its target (6.1 nats per story, target 2)" in warning
    assert kinds([dict(step=1, kl=0.0), dict(step=2, kl=5.9)]) == set()


FIRST = dict(held_out_distinct_4=0.867, held_out_diversity_mean=0.9, held_out_story_clusters=30)
FIRST |= dict(held_out_style_story=0.92)


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        (dict(held_out_distinct_4=0.498), "the held-out stories become alike (0.867 to 0.498)"),
        (dict(held_out_diversity_mean=0.5), "become similar to one another (0.9 to 0.5)"),
        (dict(held_out_story_clusters=11), "few clusters of held-out stories are left (30 to 11)"),
        (
            dict(held_out_style_story=0.29),
            "fewer held-out texts are stories, not dull text (0.92 to 0.29)",
        ),
        (dict(held_out_distinct_4=0.6, held_out_style_story=0.7, held_out_diversity_mean=0.6), ""),
    ],
)
def test_the_last_evaluation_is_compared_with_the_one_before_training(last, sentence):
    records = [dict(step=0) | FIRST, dict(step=1, kl=0.1), dict(step=2) | FIRST | last]
    warnings = CollapseDetector(records).warnings
    if sentence:
        step, warning = warnings["collapse"]
        assert step == 2 and sentence in warning and "--kl-coef" in warning
    else:
        assert warnings == {}


def test_a_speed_that_falls_far_below_that_of_the_start_is_said():
    speeds = [3000.0] * WINDOW + [1000.0] * WINDOW
    records = [dict(step=step, tokens_per_s=speed) for step, speed in enumerate(speeds, 1)]
    assert kinds(records) == set()
    slow = [dict(step=2 * WINDOW + 1 + step, tokens_per_s=300.0) for step in range(WINDOW)]
    _, warning = CollapseDetector([*records, *slow]).warnings["speed"]
    assert "tokens per second fall (3e+03 to" in warning and "OMP_NUM_THREADS" in warning


def test_a_validation_loss_that_rises_is_said():
    losses = [7.0, None, 5.0, 5.9, None, 6.1, 8.85]
    records = [
        dict(step=step, words=1000 * step, val_loss=loss) for step, loss in enumerate(losses, 1)
    ]
    step, warning = CollapseDetector(records).warnings["validation"]
    assert step == 6 and "--words" in warning
    assert "its validation loss was 5 after 3,000 words and is 6.1 after 6,000" in warning
