"""A model of the teacher's scores: `--graded N` sends N stories of a step to the teacher, and a
ridge regression on what the frozen reference sees of a story predicts the scores of the others.

It is refitted in each step with the penalty of least leave-one-out error, which has a closed form
(Allen's PRESS; Golub, Heath and Wahba 1979). A predicted score replaces the teacher's in the reward
alone, and is recorded separately. A graded story without a readable reply gets none."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tinystory.config import FEWEST_GRADED
from tinystory.rl.batch import Batch, Reference
from tinystory.run import distributed
from tinystory.run.text import is_blank
from tinystory.student.generate import Story

PENALTIES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)  # features have variance 1
MOST = 4096  # newest grades that are kept, a bound on the checkpoint and on the time to fit
LARGEST = 5.0  # standard deviations from the mean at which a feature is clipped
MORE_FEATURES = 15  # besides the mean and the last state
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75)  # levels for a story's token log-probabilities


def sent_to_teacher(stories: int, graded: int, seed: int, step: int) -> list[int]:
    """Rows of a step's stories to grade, in order, drawn from seed and step; all if `graded` is
    0."""
    return sorted(random.Random(f"graded {seed} {step}").sample(range(stories), graded or stories))


def story_features(
    logprobs: Tensor, states: Tensor, lengths: Iterable[int], ended: Sequence[bool]
) -> Tensor:
    """(B, 2 C + 15) float32 on the CPU: what the reference sees of each story. logprobs (n,) and
    states (n, C), which predict them, are concatenated over the stories. lengths: tokens per story.
    ended: whether it drew an end token.

    The mean and last state; the log-probabilities' mean, standard deviation, means of either half
    and of the last ten, fraction below -4 nats, and quantiles; the length, its square, its inverse
    and the end."""
    sizes = [int(length) for length in lengths]
    logprobs_of_each = logprobs.cpu().double().split(sizes)
    states_of_each = states.cpu().double().split(sizes)
    rows = []
    for x, story_states, end in zip(logprobs_of_each, states_of_each, ended, strict=True):
        count = len(x)
        half = max(count // 2, 1)
        columns = [
            story_states.mean(0),
            story_states[-1],
            x.mean()[None],
            x.std(correction=0)[None],
            x[:half].mean()[None],
            x[-half:].mean()[None],
            x[-10:].mean()[None],
            (x < -4).double().mean()[None],
            torch.quantile(x, x.new_tensor(QUANTILES)),
            x.new_tensor([count / 100, (count / 100) ** 2, 10 / count, end]),
        ]
        rows.append(torch.cat(columns))
    return torch.stack(rows).float()


def with_predictions(
    model: "ScoreModel",
    batch: Batch,
    reference: Reference,
    stories: Sequence[Story],
    scores: Sequence[float | None],
    sent: Sequence[int],
) -> tuple[list[float | None], dict[str, Any]]:
    """The scores, with predictions for the stories that were not sent to the teacher, and what to
    record about them. sent: rows of the stories that were sent."""
    ended = [story.ended == "eos" for story in stories]
    features = story_features(reference.logprobs, reference.states, batch.lengths, ended)
    graded = [scores[row] for row in sent]
    predicted, r_squared = distributed.rank0_value(lambda: model.complete(features, sent, graded))
    completed = list(scores)
    for row, prediction in enumerate(predicted):
        if prediction is None:
            continue
        # Every grader's score of an empty story is 0.
        completed[row] = 0.0 if is_blank(stories[row].text) else prediction
    count = len(stories) - predicted.count(None)
    return completed, {"predicted": count, "score_r_squared": r_squared}


class ScoreModel:
    """The graded stories of a run, which its checkpoints hold. features: (n, F) float32; scores:
    (n,) float64."""

    def __init__(self) -> None:
        self.features = torch.zeros(0, 0)
        self.scores = torch.zeros(0, dtype=torch.float64)
        self._weights: Tensor | None = None

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
        stories = len(scores) if scores.dim() else 0
        if features.shape != (stories, 2 * width + MORE_FEATURES) or not 0 < stories <= MOST:
            raise ValueError(f"score_model.features is {tuple(features.shape)}")
        if scores.shape != (stories,):
            raise ValueError(f"score_model.scores is {tuple(scores.shape)}")
        if features.dtype != torch.float32 or scores.dtype != torch.float64:
            raise ValueError(f"score_model is of {features.dtype} and {scores.dtype}")
        if not bool(((scores >= 0) & (scores <= 1)).all()):
            raise ValueError("score_model.scores holds one outside 0 to 1")
        self.features = features
        self.scores = scores
        self._weights = None

    def learn(self, features: Tensor, scores: Sequence[float]) -> float | None:
        """Add graded stories. Returns the R-squared of their predictions before (negative if their
        mean score would have been nearer), or None if there were none or all scores are equal."""
        new = torch.tensor(scores, dtype=torch.float64)
        predicted = self.predict(features)
        self.features = torch.cat([self.features.reshape(-1, features.shape[1]), features])[-MOST:]
        self.scores = torch.cat([self.scores, new])[-MOST:]
        self._weights = None
        if predicted is None or len(new) < 2:
            return None
        total = float(((new - new.mean()) ** 2).sum())
        residual = float(((new - predicted) ** 2).sum())
        return 1 - residual / total if total > 0 else None

    def predict(self, features: Tensor) -> Tensor | None:
        """(B,) float64, 0 to 1: the expected scores; None with fewer than FEWEST_GRADED grades."""
        if len(self.scores) < FEWEST_GRADED:
            return None
        if self._weights is None:
            self._weights = leave_one_out_ridge(self._scaled(self.features), self.scores)
        expected = self._scaled(features) @ self._weights + self.scores.mean()
        return expected.clamp(0, 1)

    def complete(
        self, features: Tensor, graded: Sequence[int], scores: Sequence[float | None]
    ) -> tuple[list[float | None], float | None]:
        """Learn from a step's graded stories and predict the scores of the others. features: (B,
        F), of all of them; graded: rows that were sent; scores: the teacher's for these rows, or
        None. Returns a score per story (None if it was sent, or without enough grades), and the
        R-squared of `learn`."""
        rows: list[int] = []
        known_scores: list[float] = []
        for row, score in zip(graded, scores, strict=True):
            if score is not None:
                rows.append(row)
                known_scores.append(score)
        r_squared = self.learn(features[rows], known_scores) if rows else None

        expected = self.predict(features)
        if expected is None:
            return [None] * len(features), r_squared
        predicted: list[float | None] = expected.tolist()
        for row in graded:
            predicted[row] = None
        return predicted, r_squared

    def _scaled(self, features: Tensor) -> Tensor:
        graded = self.features.double()
        scale = graded.std(0, correction=0).clamp(min=1e-6)
        scaled = (features.double() - graded.mean(0)) / scale
        return scaled.clamp(-LARGEST, LARGEST)


def leave_one_out_ridge(x: Tensor, y: Tensor) -> Tensor:
    """(F,) weights that predict y (n,), less its mean, from x (n, F), with the penalty of least
    PRESS."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
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
    return best_weights
