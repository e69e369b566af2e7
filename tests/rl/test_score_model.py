"""The model of the teacher's scores: what it predicts, when it does not, and that it is what
scikit-learn would fit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinystory.config import FEWEST_GRADED
from tinystory.rl import score_model
from tinystory.rl.batch import Reference
from tinystory.rl.score_model import (
    PENALTIES,
    ScoreModel,
    leave_one_out_ridge,
    sent_to_teacher,
    story_features,
    with_predictions,
)
from tinystory.student.generate import Story


def made_up(n, seed=0, width=12):
    """Features and scores that are linear in them, with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator)
    direction = torch.linspace(0.05, 0, width)
    return x, (0.5 + x @ direction + 0.01 * torch.randn(n, generator=generator)).double().clamp(
        0, 1
    )


def test_the_stories_sent_depend_on_the_seed_and_the_step():
    chosen = [sent_to_teacher(768, 128, seed, step) for seed, step in [(0, 0), (0, 1), (1, 0)]]
    assert all(
        len(set(rows)) == 128 and rows == sorted(rows) and rows[0] >= 0 and rows[-1] < 768
        for rows in chosen
    )
    assert chosen[0] == sent_to_teacher(768, 128, 0, 0) and len({*map(tuple, chosen)}) == 3
    assert sent_to_teacher(5, 0, 0, 0) == [0, 1, 2, 3, 4]


def test_a_story_is_seen_alone():
    logprobs, states = -torch.rand(48), torch.randn(48, 4)
    both = story_features(logprobs, states, [30, 18], [True, False])
    assert both.shape == (2, 2 * 4 + 15) and both.dtype == torch.float32 and both.isfinite().all()
    assert torch.equal(both[1:], story_features(logprobs[30:], states[30:], [18], [False]))
    assert story_features(logprobs[:1], states[:1], [1], [True]).isfinite().all()


def test_scores_that_follow_the_features_are_predicted():
    model, (x, y) = ScoreModel(), made_up(200)
    assert model.learn(x[:100], y[:100].tolist()) is None
    r_squared = model.learn(x[100:], y[100:].tolist())
    assert 0.9 < r_squared < 1
    assert torch.equal(model.features, x) and torch.equal(model.scores, y)


def test_scores_that_have_nothing_to_do_with_the_features_are_not():
    model, (x, y) = ScoreModel(), made_up(64)
    model.learn(x, torch.rand(64, generator=torch.Generator().manual_seed(1)).tolist())
    assert model.learn(x, y.tolist()) < 0.2


def test_nothing_is_predicted_of_a_few_grades_or_measured_of_one_score():
    model, (x, y) = ScoreModel(), made_up(40)
    assert (
        model.learn(x[: FEWEST_GRADED - 1], y[: FEWEST_GRADED - 1].tolist()) is None
        and model.predict(x) is None
    )
    assert model.learn(x[:1], [0.5]) is None and model.predict(x) is not None
    assert model.learn(x[:9], [0.5] * 9) is None


def test_the_newest_grades_are_kept(monkeypatch):
    monkeypatch.setattr(score_model, "MOST", 30)
    model, (x, y) = ScoreModel(), made_up(50)
    model.learn(x[:20], y[:20].tolist())
    model.learn(x[20:], y[20:].tolist())
    assert torch.equal(model.features, x[20:]) and torch.equal(model.scores, y[20:])


def test_predictions_are_scores():
    model, (x, y) = ScoreModel(), made_up(50)
    model.learn(x, y.tolist())
    far = model.predict(1000 * x)
    assert far.min() >= 0 and far.max() <= 1


def test_a_restored_model_predicts_the_same():
    width = 4
    model, (x, y) = ScoreModel(), made_up(50, width=2 * width + 15)
    model.learn(x[:30], y[:30].tolist())
    again = ScoreModel()
    again.restore({name: tensor.clone() for name, tensor in model.tensors().items()}, width)
    assert torch.equal(again.predict(x), model.predict(x))
    assert again.learn(x[30:], y[30:].tolist()) == model.learn(x[30:], y[30:].tolist())
    assert torch.equal(again.predict(x), model.predict(x))


def test_only_stories_that_were_not_sent_have_a_predicted_score():
    """A graded story whose reply was missing, refused or late has none; it is not learned from
    either."""
    model, (x, y) = ScoreModel(), made_up(40)
    graded = list(range(0, 40, 2))
    scores = [None if row in (4, 10) else float(y[row]) for row in graded]
    predicted, r_squared = model.complete(x, graded, scores)
    assert [
        row for row, score in enumerate(predicted) if score is None
    ] == graded and r_squared is None
    assert len(model.scores) == 18
    nothing, r_squared = model.complete(x, graded, [None] * 20)
    assert nothing == predicted and r_squared is None and len(model.scores) == 18
    assert ScoreModel().complete(x, graded, [None] * 20) == ([None] * 40, None)
    assert ScoreModel().complete(x, graded[: FEWEST_GRADED - 1], scores[: FEWEST_GRADED - 1]) == (
        [None] * 40,
        None,
    )


def test_an_empty_story_that_was_not_sent_has_the_score_0():
    nothing = torch.zeros(0)
    stories = [
        Story(i, "Once", text, nothing, nothing, nothing, nothing, nothing, "eos")
        for i, text in enumerate(["One."] * FEWEST_GRADED + ["Two.", ""])
    ]
    count = len(stories)
    batch = SimpleNamespace(lengths=np.full(count, 3))
    reference = Reference(-torch.rand(3 * count), torch.randn(3 * count, 4))
    graded = list(range(FEWEST_GRADED))
    scores = [0.9] * FEWEST_GRADED + [None, None]
    completed, record = with_predictions(ScoreModel(), batch, reference, stories, scores, graded)
    assert completed == [0.9] * FEWEST_GRADED + [pytest.approx(0.9), 0.0]
    assert record["predicted"] == 2


@pytest.mark.parametrize("n", [10, 40])
def test_the_weights_are_those_of_the_least_leave_one_out_error(n):
    """By brute force: each story in turn is left out, and the others' regression predicts it."""
    x, y = made_up(n, seed=2, width=20)
    x = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)

    def solve(rows, penalty):
        a, b = x[rows], y[rows]
        ones = torch.ones(len(rows), 1, dtype=torch.float64)
        a = torch.cat([a, ones], 1)
        ridge = penalty * torch.eye(a.shape[1], dtype=torch.float64)
        ridge[-1, -1] = 0  # the constant is not shrunk
        return torch.linalg.solve(a.T @ a + ridge, a.T @ b)

    def error(penalty):
        left = [[j for j in range(n) if j != i] for i in range(n)]
        weights = [solve(rows, penalty) for rows in left]
        return sum(float((y[i] - (x[i] @ w[:-1] + w[-1])) ** 2) for i, w in enumerate(weights))

    best = min(PENALTIES, key=error)
    torch.testing.assert_close(leave_one_out_ridge(x, y), solve(list(range(n)), best)[:-1])
