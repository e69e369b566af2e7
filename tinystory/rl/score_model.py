"""A model of the teacher's scores: with `--grades N` the teacher grades N stories of a run, and a
ridge regression on what the frozen reference sees of a story predicts the scores of the others.

It is refitted in each step with the penalty of least leave-one-out error, which has a closed form
(Allen's PRESS; Golub, Heath and Wahba 1979). The stories to grade are those whose scores tell most
about the scores of the whole step (V-optimality: Yu, Bi and Tresp 2006, "Active learning via
transductive experimental design"). A predicted score replaces the teacher's in the reward alone,
and is recorded separately. A graded story without a readable reply gets none."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tinystory.config import FEWEST_GRADES, InteractConfig
from tinystory.rl.batch import Batch, Reference
from tinystory.run import distributed
from tinystory.run.errors import UserError
from tinystory.run.text import is_blank
from tinystory.student.generate import Story

FEWEST_SCORES = 4  # with fewer, nothing is predicted
PENALTIES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)  # features have variance 1
PENALTY = 100.0  # while stories are chosen
MOST = 4096  # newest grades that are kept, a bound on the checkpoint and on the time to fit
LARGEST = 5.0  # standard deviations from the mean at which a feature is clipped
MORE_FEATURES = 15  # besides the mean and the last state
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75)  # levels for a story's token log-probabilities


def grades_of_step(config: InteractConfig, step: int, given: int) -> int:
    """Number of the step's stories that the teacher grades, after `given` grades in the steps
    before. Half of --grades are of the first step: they tell about the stories of all steps. What
    is left is spread over the steps that are left."""
    if not config.grades:
        return config.stories_per_step
    left = config.grades - given
    steps_left = config.steps - step
    share = max(math.ceil(left / steps_left), 0)
    if step == 0:
        share = max(share, config.grades // 2, FEWEST_GRADES)
    return min(share, config.stories_per_step)


def story_features(batch: Batch, reference: Reference, stories: Sequence[Story]) -> Tensor:
    """(B, 2 C + 15) float32 on the CPU: what the reference sees of each story of the batch.

    The mean and last state; the log-probabilities' mean, standard deviation, means of either half
    and of the last ten, fraction below -4 nats, and quantiles; the length, its square, its inverse
    and the end."""
    sizes = [int(length) for length in batch.lengths]
    logprobs_of_each = reference.logprobs.cpu().double().split(sizes)
    states_of_each = reference.states.cpu().double().split(sizes)
    rows = []
    for story, x, story_states in zip(stories, logprobs_of_each, states_of_each, strict=True):
        count = len(x)
        half = max(count // 2, 1)
        scalars = [
            x.mean(),
            x.std(correction=0),
            x[:half].mean(),
            x[-half:].mean(),
            x[-10:].mean(),
            (x < -4).double().mean(),
        ]
        columns = [
            story_states.mean(0),
            story_states[-1],
            torch.stack(scalars),
            torch.quantile(x, x.new_tensor(QUANTILES)),
            x.new_tensor([count / 100, (count / 100) ** 2, 10 / count, story.ended == "eos"]),
        ]
        rows.append(torch.cat(columns))
    return torch.stack(rows).float()


def with_predictions(
    model: "ScoreModel",
    features: Tensor,
    stories: Sequence[Story],
    scores: Sequence[float | None],
    graded: Sequence[int],
) -> tuple[list[float | None], dict[str, Any]]:
    """The scores, with predictions for the stories that the teacher did not grade, and what to
    record about them. features: (B, F), of all stories; graded: rows of those that were sent."""
    predicted, record = distributed.rank0_value(lambda: model.complete(features, graded, scores))
    completed = list(scores)
    for row, prediction in enumerate(predicted):
        if prediction is None:
            continue
        # Every grader's score of an empty story is 0.
        completed[row] = 0.0 if is_blank(stories[row].text) else prediction
    return completed, record


def require_a_score(scores: Sequence[float | None], step: int, asked: int) -> None:
    """Raises UserError for a step without any score, the teacher's or a predicted one: there would
    be nothing to learn from. step: done before this one; asked: stories graded in them."""
    if all(score is None for score in scores):
        raise UserError(
            f"no story of step {step + 1} has a score: all --grades were given ({asked} so far), and "
            f"fewer than {FEWEST_SCORES} scores are kept to predict from; all earlier steps are "
            "saved, so go on with --resume and more --grades than that"
        )


class ScoreModel:
    """The graded stories of a run, which its checkpoints hold. features: (n, F) float32; scores:
    (n,) float64."""

    def __init__(self) -> None:
        self.features = torch.zeros(0, 0)
        self.scores = torch.zeros(0, dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint; empty before the first grade."""
        if not len(self.scores):
            return {}
        return {"score_model.features": self.features, "score_model.scores": self.scores}

    def restore(self, tensors: Mapping[str, Tensor], width: int) -> None:
        """The inverse of `tensors`; others are ignored. width: of the reference's states. Raises
        ValueError, or KeyError, unless they are the features and scores of graded stories."""
        if not any(name.startswith("score_model.") for name in tensors):
            return
        features = tensors["score_model.features"]
        scores = tensors["score_model.scores"]
        stories = scores.numel()
        if (
            not 0 < stories <= MOST
            or features.shape != (stories, 2 * width + MORE_FEATURES)
            or features.dtype != torch.float32
            or scores.shape != (stories,)
            or scores.dtype != torch.float64
            or not ((scores >= 0) & (scores <= 1)).all()
        ):
            raise ValueError("score_model holds no features and scores of graded stories")
        self.features = features
        self.scores = scores

    def choose(self, features: Tensor, count: int) -> list[int]:
        """Rows of `count` of a step's stories, in order: greedily, each the one whose score, once
        known, lowers the mean variance of the step's predictions most. features: (B, F)."""
        graded, step = self._scaled(features)
        width = features.shape[1]
        precision = PENALTY * torch.eye(width, dtype=torch.float64) + graded.T @ graded
        # (B, B), the covariance of the predictions over the variance of a score's noise
        covariance = step @ torch.linalg.solve(precision, step.T)
        chosen: list[int] = []
        for _ in range(count):
            variance = covariance.diagonal()
            reduction = (covariance**2).sum(0) / (1 + variance)
            reduction[chosen] = -1.0
            row = int(reduction.argmax())
            chosen.append(row)
            column = covariance[:, row].clone()
            covariance -= torch.outer(column, column) / (1 + column[row])
        return sorted(chosen)

    def predict(self, features: Tensor) -> tuple[Tensor, float] | None:
        """(B,) float64, 0 to 1: the expected scores of a step's stories; and the root of the mean
        squared leave-one-out error of the graded ones. None with fewer than FEWEST_SCORES
        grades."""
        if len(self.scores) < FEWEST_SCORES:
            return None
        graded, step = self._scaled(features)
        weights, error = leave_one_out_ridge(graded, self.scores)
        expected = step @ weights + (self.scores.mean() - graded.mean(0) @ weights)
        return expected.clamp(0, 1), error

    def complete(
        self, features: Tensor, graded: Sequence[int], scores: Sequence[float | None]
    ) -> tuple[list[float | None], dict[str, Any]]:
        """Learn from a step's graded stories and predict the scores of the others. features: (B,
        F), of all of them; graded: rows that were sent; scores: the teacher's, None without.
        Returns a score per story (None if it was sent, or without enough grades), and metrics."""
        rows = [row for row in graded if scores[row] is not None]
        new_scores = torch.tensor([scores[row] for row in rows], dtype=torch.float64)
        earlier_features = self.features.reshape(-1, features.shape[1])
        self.features = torch.cat([earlier_features, features[rows]])[-MOST:]
        self.scores = torch.cat([self.scores, new_scores])[-MOST:]

        prediction = self.predict(features)
        if prediction is None:
            record = {"predicted": 0, "score_error": None, "score_r_squared": None}
            return [None] * len(features), record

        expected, error = prediction
        predicted: list[float | None] = expected.tolist()
        for row in graded:
            predicted[row] = None
        explained = float(expected.var(correction=0))
        return predicted, {
            "predicted": len(predicted) - len(graded),
            "score_error": error,
            # of the step's scores: the predictions' variance in it and that of their error
            "score_r_squared": explained / max(explained + error**2, 1e-12),
        }

    def _scaled(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The features of the graded stories, (n, F), and of a step, (B, F), in float64: with mean
        0 and variance 1 over both, which need no grade, and clipped."""
        graded = self.features.reshape(-1, features.shape[1]).double()
        step = features.double()
        both = torch.cat([graded, step])
        mean = both.mean(0)
        scale = both.std(0, correction=0).clamp(min=1e-6)
        scaled = ((both - mean) / scale).clamp(-LARGEST, LARGEST)
        return scaled[: len(graded)], scaled[len(graded) :]


def leave_one_out_ridge(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """(F,) weights that predict y (n,), less its mean, from x (n, F), less its, with the penalty of
    least PRESS; and the root of the mean squared leave-one-out error."""
    u, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    centred = y - y.mean()
    projection = u.T @ centred
    least_error = math.inf
    best_weights = torch.zeros(x.shape[1], dtype=x.dtype)
    for penalty in PENALTIES:
        shrinkage = s**2 / (s**2 + penalty)
        leverage = (u**2 * shrinkage).sum(1) + 1 / len(y)  # the mean's included
        residual = centred - u @ (shrinkage * projection)
        left_out_residual = residual / (1 - leverage).clamp(min=1e-6)
        error = float((left_out_residual**2).mean())
        if error < least_error:
            least_error = error
            best_weights = v.T @ (s / (s**2 + penalty) * projection)
    return best_weights, math.sqrt(least_error)
