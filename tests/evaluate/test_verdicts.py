"""What the differences between a run and its controls say."""

import random
from collections import Counter

import pytest
import torch
from conftest import tiny_stories

from tinystory.config import InteractConfig
from tinystory.evaluate.control import Comparison, difference, verdict
from tinystory.evaluate.recorded_scores import RecordedScores, reordered
from tinystory.evaluate.validation import best_temperature_bits
from tinystory.report.control import sentence
from tinystory.run.errors import UserError
from tinystory.student import checkpoint
from tinystory.teacher.grade import Submission


def test_scores_in_random_order_are_a_function_of_the_key():
    scores = [0.1, None, 0.2, 0.3, None, 0.4, 0.5, 0.6]
    one, same, other = (reordered(scores, "shuffled", key) for key in ("a", "a", "b"))
    assert one == same != other
    assert Counter(one) == Counter(scores)
    assert [row for row, score in enumerate(one) if score is None] == [1, 4]


def test_every_story_gets_every_score_equally_often():
    """A permutation that never left a score in its place would say something about the story."""
    orders = [reordered([0.0, 0.5, 1.0], "shuffled", str(key)) for key in range(600)]
    for row in range(3):
        counts = Counter(order[row] for order in orders)
        assert set(counts) == {0.0, 0.5, 1.0} and min(counts.values()) > 130  # 5.5 deviations


def test_a_step_with_another_number_of_graded_stories_is_refused():
    config = InteractConfig(control=["run", "shuffled"], stories_per_step=4)
    grader = RecordedScores("shuffled", [[0.1, 0.2]], config)
    submissions = [Submission("Once", "story", row) for row in range(3)]
    with pytest.raises(UserError, match="2 graded stories, and the control has 3"):
        grader.grades(submissions)


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [
        (0.3, 0.2, "more than its control"),
        (-0.3, 0.2, "less than its control"),
        (0.1, 0.2, "as its control"),
        (0.1, 0.35, "not told apart at this size"),
    ],
)
def test_a_verdict_is_a_function_of_the_interval(mean, half, said):
    assert verdict(mean, half, small=0.4) == said


def test_without_other_trainings_there_is_an_interval_over_openings_and_no_verdict():
    rows = [[0.0, gain, 0.0] for gain in (0.2, 0.4, 0.6)]
    alone = difference(rows, [0.0, 0.1])
    assert alone.verdict == "" and alone.half == pytest.approx(1.959964 * 0.2 / 3**0.5)


@pytest.mark.parametrize("controls", [1, 3])
def test_the_level_of_a_verdict_is_as_stated(controls):
    """Trainings that differ by chance: of 2000 verdicts 5 % say more or less, within five standard
    deviations, with three controls and with one beside three others."""
    rng = random.Random(0)
    wrong = 0
    for _ in range(2000):
        run, *trainings = (rng.gauss(0, 1) for _ in range(4))
        compared = trainings if controls == 3 else [rng.gauss(0, 1)]
        rows = [[0.0, run, *compared], [1e-3, run, *compared]]
        wrong += "than" in difference(rows, trainings).verdict
    assert abs(wrong - 100) < 50


def comparison(control, run=0.74):
    """Five stories per student; those of the run differ."""

    def measures(mean, spread=0.0):
        return {"reward": [mean - spread] * 4 + [mean + 4 * spread], "words": [9.0] * 5}

    controls = [measures(control)]
    return Comparison("shuffled", 5, measures(0.5), measures(run, 0.02), controls, controls)


def test_the_sentence_splits_the_gain():
    assert sentence(comparison(0.53)) == (
        "Of the gain of 0.240 in mean reward, 0.210 ± 0.039 comes from the teacher’s scores; 0.030 comes with the "
        "same scores in random order."
    )
    assert "gained nothing in mean reward (-0.100)" in sentence(comparison(0.5, run=0.4))


def test_bits_per_byte_do_not_depend_on_a_scale_of_the_logits(place):
    student, tokenizer, _ = checkpoint.load(checkpoint.newest(place / "p"))
    texts = tiny_stories(12)
    temperature, bits = best_temperature_bits(student, tokenizer, texts)
    assert 0.3 < temperature < 1.9, "so that both searches end within the range"
    with torch.no_grad():
        student.divide_logits(0.5)
    doubled, same_bits = best_temperature_bits(student, tokenizer, texts)
    assert doubled == pytest.approx(2 * temperature, rel=0.01)
    assert same_bits == pytest.approx(bits, rel=1e-3)
