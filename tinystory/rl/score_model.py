"""A surrogate model of the teacher's scores. With `--grades N` the teacher grades N stories of a
run, and a ridge regression predicts the scores of all other stories from the outputs of the frozen
reference.

The regression is refitted in each step. The ridge penalty is the one with the smallest
leave-one-out error, which has a closed form (Allen's PRESS; Golub, Heath and Wahba 1979). The model
chooses for grading the stories with scores that are most informative about the whole step
(V-optimality: Yu, Bi and Tresp 2006, "Active learning via transductive experimental design"). A
predicted score replaces the teacher's score only in the reward, and is recorded separately. A story
that was graded without a readable reply gets no predicted score."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tinystory.config import InteractConfig
from tinystory.config.interaction import FEWEST_GRADES
from tinystory.rl.batch import Batch
from tinystory.run import distributed
from tinystory.run.errors import UserError
from tinystory.run.text import is_blank
from tinystory.student.generate import Story

FEWEST_SCORES = 4  # with fewer scores, nothing is predicted
PENALTIES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)  # features have variance 1
PENALTY = 100.0  # ridge penalty for choosing stories
# Number of newest grades to keep. The limit bounds the size of checkpoints and the time to fit.
MOST = 4096
LARGEST = 5.0  # features are clipped at this many standard deviations from the mean
MORE_FEATURES = 15  # features besides the mean and the last hidden state
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75)  # levels for a story's token log-probabilities


def grades_of_step(config: InteractConfig, step: int, given: int) -> int:
    """Number of stories of the step that the teacher grades. given: number of grades in earlier
    steps. Half of --grades go to the first step, because those grades inform the predictions of all
    steps. The remaining grades are spread over the remaining steps."""
    if not config.grades:
        return config.stories_per_step
    left = config.grades - given
    steps_left = config.steps - step
    share = max(math.ceil(left / steps_left), 0)
    if step == 0:
        share = max(share, config.grades // 2, FEWEST_GRADES)
    return min(share, config.stories_per_step)


def story_features(batch: Batch, stories: Sequence[Story]) -> Tensor:
    """Features of each story, (B, 2C + 15) float32 on the CPU, from the outputs of the reference.

    The features are: the mean and the last hidden state; of the tokens' log-probabilities, the
    mean, the standard deviation, the mean over each half and over the last ten tokens, the fraction
    below -4 nats, and the quantiles QUANTILES; the length, the square and the inverse of the
    length, and whether the story ended."""
    sizes = [int(length) for length in batch.lengths]
    logprobs_of_each = batch.ref_logprobs.cpu().double().split(sizes)
    hidden_of_each = batch.ref_hidden.cpu().double().split(sizes)
    rows = []
    for story, x, story_hidden in zip(stories, logprobs_of_each, hidden_of_each, strict=True):
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
            story_hidden.mean(0),
            story_hidden[-1],
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
    """The scores, completed by predictions for the stories that the teacher did not grade, and
    metrics of the predictions. features: (B, F), of all stories. graded: rows of the stories sent
    to the teacher."""
    predicted, record = distributed.rank0_value(lambda: model.complete(features, graded, scores))
    completed = list(scores)
    for row, prediction in enumerate(predicted):
        if prediction is None:
            continue
        # every grader gives an empty story the score 0
        completed[row] = 0.0 if is_blank(stories[row].text) else prediction
    return completed, record


def require_a_score(scores: Sequence[float | None], step: int, asked: int) -> None:
    """Raises UserError for a step without any score, given or predicted: the student would have
    nothing to learn from. step: number of earlier steps. asked: number of stories graded in earlier
    steps."""
    if all(score is None for score in scores):
        raise UserError(
            f"no story of step {step + 1} has a score: all --grades were given ({asked} so far), and "
            f"predictions need {FEWEST_SCORES} scores or more; all earlier steps are saved: continue "
            f"with --resume and --grades above {asked}"
        )


class ScoreModel:
    """Regression of scores on features, fitted to the graded stories of a run. features: (n, F)
    float32; scores: (n,) float64. Checkpoints contain both."""

    def __init__(self) -> None:
        self.features = torch.zeros(0, 0)
        self.scores = torch.zeros(0, dtype=torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        """Features and scores for a checkpoint, by name; empty before the first grade."""
        if not len(self.scores):
            return {}
        return {"score_model.features": self.features, "score_model.scores": self.scores}

    def restore(self, tensors: Mapping[str, Tensor], width: int) -> None:
        """Load features and scores, the inverse of `tensors`. Tensors with other names are ignored.
        width: C of the reference. Raises ValueError or KeyError if the tensors cannot be the
        features and scores of graded stories."""
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
        """Rows of the `count` stories to grade, in order. The choice is greedy: the next story is
        always the one with the grade that lowers the mean variance of the step's predictions most.
        features: (B, F)."""
        graded, step = self._scaled(features)
        width = features.shape[1]
        precision = PENALTY * torch.eye(width, dtype=torch.float64) + graded.T @ graded
        # (B, B), the covariance of the predictions divided by the noise variance of a score
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
        """Expected scores of a step's stories, (B,) float64 in 0..1, and the root mean squared
        leave-one-out error over the graded stories. None with fewer than FEWEST_SCORES grades."""
        if len(self.scores) < FEWEST_SCORES:
            return None
        graded, step = self._scaled(features)
        weights, error = leave_one_out_ridge(graded, self.scores)
        expected = step @ weights + (self.scores.mean() - graded.mean(0) @ weights)
        return expected.clamp(0, 1), error

    def complete(
        self, features: Tensor, graded: Sequence[int], scores: Sequence[float | None]
    ) -> tuple[list[float | None], dict[str, Any]]:
        """Predicted scores of a step's stories, and metrics of the prediction, after adding the
        step's grades to the model. A predicted score is None for a story that was sent to the
        teacher, and for all stories if there are not enough grades.

        features: (B, F), of all stories. graded: rows that were sent. scores: the teacher's scores,
        None for a story without a score."""
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
            # The variance of the step's scores is estimated as the variance of the predictions plus
            # the variance of the error.
            "score_r_squared": explained / max(explained + error**2, 1e-12),
        }

    def _scaled(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised features of the graded stories, (n, F), and of a step, (B, F), in float64.
        Mean 0 and variance 1 hold over both together, because features need no grade. Values are
        clipped to LARGEST."""
        graded = self.features.reshape(-1, features.shape[1]).double()
        step = features.double()
        both = torch.cat([graded, step])
        mean = both.mean(0)
        scale = both.std(0, correction=0).clamp(min=1e-6)
        scaled = ((both - mean) / scale).clamp(-LARGEST, LARGEST)
        return scaled[: len(graded)], scaled[len(graded) :]


def leave_one_out_ridge(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Weights (F,) of a ridge regression of y (n,) on x (n, F), both centred, and the root mean
    squared leave-one-out error. The penalty is the one of PENALTIES with the smallest error."""
    u, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    centred = y - y.mean()
    projection = u.T @ centred
    least_error = math.inf
    best_weights = torch.zeros(x.shape[1], dtype=x.dtype)
    for penalty in PENALTIES:
        shrinkage = s**2 / (s**2 + penalty)
        leverage = (u**2 * shrinkage).sum(1) + 1 / len(y)  # 1 / n is the leverage of the mean
        residual = centred - u @ (shrinkage * projection)
        left_out_residual = residual / (1 - leverage).clamp(min=1e-6)
        error = float((left_out_residual**2).mean())
        if error < least_error:
            least_error = error
            best_weights = v.T @ (s / (s**2 + penalty) * projection)
    return best_weights, math.sqrt(least_error)
