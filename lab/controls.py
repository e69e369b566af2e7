"""Controls for runs of lab/recipes.py. A control's name precedes the options of a run: `shuffled:
--grades 64`. Each control is a context in which train_interact.py behaves differently in one
point."""

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
    """The grades of a step are shuffled among the graded stories. Any remaining gain does not come
    from the teacher (arXiv 2606.05932)."""
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
    """The stories to grade are drawn at random, instead of the most informative ones."""

    def choose(model: ScoreModel, features: Tensor, count: int) -> list[int]:
        generator = random.Random(f"random choice {len(model.scores)} {float(features.sum())}")
        return sorted(generator.sample(range(len(features)), count))

    with patch.object(ScoreModel, "choose", choose):
        yield


@contextlib.contextmanager
def no_model() -> Iterator[None]:
    """No scores are predicted: PPO learns only from the graded stories."""

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
    """The control and the options of `CONTROL: OPTIONS`. Without a colon before the options, the
    control is "". Raises UserError for an unknown control."""
    before, colon, after = text.partition(":")
    if not colon or before.lstrip().startswith("-"):
        return "", text
    if before not in CONTROLS:
        known = ", ".join(filter(None, CONTROLS))
        raise UserError(f"--options {text!r}: {before!r} is not a control: give one of {known}")
    return before, after
