"""Controls that change what a run's grades are worth, named before the options of a run in
lab/recipes.py: `shuffled: --grades 64`. Each is a context in which train_interact.py's runs differ
in one thing from what the options say."""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from unittest.mock import patch

from torch import Tensor

import train_interact
from tinystory.rl import score_model
from tinystory.rl.score_model import ScoreModel
from tinystory.run.errors import UserError
from tinystory.teacher.grade import Grade


@contextlib.contextmanager
def shuffled() -> Iterator[None]:
    """A step's grades go to its graded stories in random order. What is still learned does not
    come from the teacher (arXiv 2606.05932)."""
    collect = train_interact.collect_grades

    def collect_shuffled(run: train_interact.InteractionRun, sent: Sequence[int]) -> list[Grade]:
        grades = collect(run, sent)
        order = list(sent)
        random.Random(f"shuffled {run.config.seed} {run.state.step}").shuffle(order)
        result = list(grades)
        for row, other in zip(sent, order, strict=True):
            result[row] = grades[other]
        return result

    with patch.object(train_interact, "collect_grades", collect_shuffled):
        yield


@contextlib.contextmanager
def random_choice() -> Iterator[None]:
    """The stories to grade are drawn at random, instead of those that tell most."""

    def choose(model: ScoreModel, features: Tensor, count: int) -> list[int]:
        generator = random.Random(f"random choice {len(model.scores)} {float(features.sum())}")
        return sorted(generator.sample(range(len(features)), count))

    with patch.object(ScoreModel, "choose", choose):
        yield


@contextlib.contextmanager
def no_model() -> Iterator[None]:
    """Nothing is predicted: PPO learns from the graded stories alone."""

    def without_predictions(
        model: object, features: object, stories: object, scores: list[float | None], sent: object
    ) -> tuple[list[float | None], dict]:
        return scores, {}

    with patch.object(score_model, "with_predictions", without_predictions):
        yield


CONTROLS: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "shuffled": shuffled,
    "random choice": random_choice,
    "no model": no_model,
}


def split(text: str) -> tuple[str, str]:
    """The control and the options of `CONTROL: OPTIONS`; no control without a colon before the
    options. Raises UserError for an unknown one."""
    before, colon, after = text.partition(":")
    if not colon or before.lstrip().startswith("-"):
        return "", text
    if before not in CONTROLS:
        known = ", ".join(filter(None, CONTROLS))
        raise UserError(f"--options {text!r}: {before!r} is no control: take one of {known}")
    return before, after
