"""The model of the teacher's scores: predictions, cases without predictions, and the same fit as
scikit-learn's."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tinystory.config import InteractConfig
from tinystory.config.interaction import FEWEST_GRADES
from tinystory.rl import score_model
from tinystory.rl.score_model import (
    FEWEST_SCORES,
    PENALTIES,
    PENALTY,
    ScoreModel,
    grades_of_step,
    leave_one_out_ridge,
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


def test_half_of_the_grades_are_of_the_first_step_and_the_others_are_spread():
    for grades, steps in [(64, 8), (32, 8), (9, 3), (100, 7), (8, 5), (40, 1)]:
        config = InteractConfig(grades=grades, steps=steps)
        counts = spread(config, 0, 0)
        assert sum(counts) == grades and counts[0] >= FEWEST_GRADES
        assert max(counts[1:], default=0) <= min(counts[1:], default=0) + 1
        assert counts[0] == (grades if steps == 1 else max(grades // 2, FEWEST_GRADES))
    assert grades_of_step(InteractConfig(), 3, 999) == InteractConfig.stories_per_step


def spread(config, step, given):
    """The grades of each step from this one on."""
    counts = []
    while step < config.steps:
        counts.append(grades_of_step(config, step, given + sum(counts)))
        step += 1
    return counts


def test_a_run_that_is_resumed_with_other_steps_keeps_to_its_grades():
    eight_of_three_each = [3] * 8 + [2] * 4
    assert spread(InteractConfig(grades=64, steps=16), 4, 32) == eight_of_three_each
    assert sum(spread(InteractConfig(grades=64, steps=5), 4, 32)) == 32
    assert spread(InteractConfig(grades=16, steps=8), 4, 32) == [0, 0, 0, 0]


def written(lengths, ended, width=4):
    """A batch of stories of these lengths with the reference's results, and the stories."""
    nothing = torch.zeros(0)
    stories = []
    for index, end in enumerate(ended):
        stories.append(
            Story(index, "Once", "One.", nothing, nothing, nothing, nothing, nothing, end)
        )
    count = sum(lengths)
    columns = dict(ref_logprobs=-torch.rand(count), ref_hidden=torch.randn(count, width))
    return SimpleNamespace(lengths=np.array(lengths), **columns), stories


def test_a_story_is_seen_alone():
    batch, stories = written([30, 18], ["eos", "length"])
    both = story_features(batch, stories)
    assert both.shape == (2, 2 * 4 + 15) and both.dtype == torch.float32 and both.isfinite().all()
    alone = SimpleNamespace(
        lengths=np.array([18]),
        ref_logprobs=batch.ref_logprobs[30:],
        ref_hidden=batch.ref_hidden[30:],
    )
    second = story_features(alone, stories[1:])
    assert torch.equal(both[1:], second)
    of_one_token = story_features(*written([1], ["eos"]))
    assert of_one_token.isfinite().all()


def mean_variance(x, rows, graded):
    """The mean variance of the predictions for x once these rows of it are known, by inverting the
    precision of the weights; over the variance of the noise."""
    known = torch.cat([graded, x[rows]])
    precision = PENALTY * torch.eye(x.shape[1], dtype=x.dtype) + known.T @ known
    return float((x @ torch.linalg.inv(precision) * x).sum(1).mean())


@pytest.mark.parametrize("grades", [0, 10])
def test_the_stories_that_are_chosen_lower_the_mean_variance_most(grades):
    """The choice is greedy: no other story instead of the next one would lower the variance
    more."""
    model, (x, y) = ScoreModel(), made_up(60, width=6)
    if grades:
        learn(model, x[50 : 50 + grades], y[50 : 50 + grades].tolist())
    step = x[:50]
    graded, scaled = model._scaled(step)
    chosen = []
    for count in (1, 2, 3, 4):
        rows = model.choose(step, count)
        assert len(set(rows)) == count and rows == sorted(rows) and set(chosen) < set(rows)
        others = [row for row in range(50) if row not in chosen]
        variances = [mean_variance(scaled, [*chosen, row], graded) for row in others]
        assert mean_variance(scaled, rows, graded) == pytest.approx(min(variances), rel=1e-9)
        chosen = rows
    assert model.choose(step, 50) == list(range(50))
    assert model.choose(step, 0) == []


def test_the_chosen_stories_predict_the_others_better_than_stories_at_random():
    """A step with a rare kind of story, with scores that depend on another feature: over twenty
    draws, the worst choice by the model is better than the mean of random choices."""
    errors = {"chosen": [], "random": []}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(200, 30, generator=generator)
        x[:190, 10:] *= 0.1
        y = (0.5 + 0.05 * x.sum(1) / 2).double().clamp(0, 1)
        for kind, rows in [
            ("chosen", ScoreModel().choose(x, 24)),
            ("random", torch.randperm(200, generator=generator)[:24].tolist()),
        ]:
            model = ScoreModel()
            predicted, _ = model.complete(x, rows, scores_of(y, rows))
            left = [row for row in range(200) if row not in rows]
            errors[kind].append(
                np.mean([(predicted[row] - float(y[row])) ** 2 for row in left]) ** 0.5
            )
    assert np.mean(errors["chosen"]) < np.mean(errors["random"])


def scores_of(y, rows):
    """The scores that a teacher gave to these rows alone."""
    scores = [None] * len(y)
    for row in rows:
        scores[row] = float(y[row])
    return scores


def learn(model, x, y):
    """All of these stories are graded; the metrics."""
    return model.complete(x, range(len(x)), list(y))[1]


def test_scores_that_follow_the_features_are_predicted():
    model, (x, y) = ScoreModel(), made_up(200)
    learn(model, x[:100], y[:100].tolist())
    record = learn(model, x[100:], y[100:].tolist())
    assert 0.9 < record["score_r_squared"] < 1 and 0 < record["score_error"] < 0.05
    assert torch.equal(model.features, x) and torch.equal(model.scores, y)


def test_scores_that_have_nothing_to_do_with_the_features_are_not():
    model, (x, _) = ScoreModel(), made_up(200)
    scores = torch.rand(200, generator=torch.Generator().manual_seed(1)).tolist()
    assert learn(model, x, scores)["score_r_squared"] < 0.2


def test_the_estimated_r_squared_is_that_of_the_stories_without_a_grade():
    """Within 0.1, for scores with more and more noise."""
    for noise in (0.01, 0.1, 0.2):
        x, y = made_up(2000)
        y = y + noise * torch.randn(2000, generator=torch.Generator().manual_seed(1))
        y = y.clamp(0, 1)
        rows = list(range(0, 2000, 10))
        predicted, record = ScoreModel().complete(x, rows, scores_of(y, rows))
        left = [row for row in range(2000) if row not in set(rows)]
        predictions = torch.tensor([predicted[row] for row in left], dtype=torch.float64)
        residual = ((y[left] - predictions) ** 2).mean()
        r_squared = float(1 - residual / y[left].var(correction=0))
        assert record["score_r_squared"] == pytest.approx(r_squared, abs=0.1)


def test_nothing_is_predicted_of_a_few_grades_or_told_apart_by_equal_scores():
    model, (x, y) = ScoreModel(), made_up(40)
    few = FEWEST_SCORES - 1
    record = learn(model, x[:few], y[:few].tolist())
    assert model.predict(x) is None
    assert record == {"predicted": 0, "score_error": None, "score_r_squared": None}
    assert learn(ScoreModel(), x[:9], [0.5] * 9)["score_r_squared"] == pytest.approx(0, abs=1e-6)


def test_the_newest_grades_are_kept(monkeypatch):
    monkeypatch.setattr(score_model, "MOST", 30)
    model, (x, y) = ScoreModel(), made_up(50)
    learn(model, x[:20], y[:20].tolist())
    learn(model, x[20:], y[20:].tolist())
    assert torch.equal(model.features, x[20:]) and torch.equal(model.scores, y[20:])


def test_predictions_are_scores():
    model, (x, y) = ScoreModel(), made_up(50)
    learn(model, x, y.tolist())
    far, _ = model.predict(1000 * x)
    assert far.min() >= 0 and far.max() <= 1


def test_a_restored_model_predicts_the_same():
    width = 4
    model, (x, y) = ScoreModel(), made_up(50, width=2 * width + 15)
    learn(model, x[:30], y[:30].tolist())
    again = ScoreModel()
    again.restore({name: tensor.clone() for name, tensor in model.tensors().items()}, width)
    assert torch.equal(again.predict(x)[0], model.predict(x)[0])
    assert learn(again, x[30:], y[30:].tolist()) == learn(model, x[30:], y[30:].tolist())
    assert torch.equal(again.predict(x)[0], model.predict(x)[0])
    assert again.choose(x, 5) == model.choose(x, 5)


def test_only_stories_that_were_not_sent_have_a_predicted_score():
    """A graded story with a missing, refused or late reply has no score, and the model does not
    learn from it."""
    model, (x, y) = ScoreModel(), made_up(40)
    graded = list(range(0, 40, 2))
    scores = scores_of(y, [row for row in graded if row not in (4, 10)])
    predicted, record = model.complete(x, graded, scores)
    assert [row for row, score in enumerate(predicted) if score is None] == graded
    assert record["predicted"] == 20
    assert len(model.scores) == 18
    nothing, _ = model.complete(x, graded, [None] * 40)
    assert nothing == predicted and len(model.scores) == 18
    empty, record = ScoreModel().complete(x, graded, [None] * 40)
    assert empty == [None] * 40 and record["predicted"] == 0


def test_an_empty_story_that_was_not_sent_has_the_score_0():
    count = FEWEST_GRADES + 2
    batch, stories = written([3] * count, ["eos"] * count)
    stories[-1] = replace(stories[-1], text="")
    features = story_features(batch, stories)
    graded = range(FEWEST_GRADES)
    scores = [0.9] * FEWEST_GRADES + [None, None]
    completed, record = with_predictions(ScoreModel(), features, stories, scores, graded)
    assert completed == [0.9] * FEWEST_GRADES + [pytest.approx(0.9), 0.0]
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
    weights, left_out_error = leave_one_out_ridge(x, y)
    torch.testing.assert_close(weights, solve(list(range(n)), best)[:-1])
    assert left_out_error == pytest.approx((error(best) / n) ** 0.5)
