"""Changes of train_interact.py for runs of lab/recipes.py. The name of a change precedes the options
of a run: `no model: --grades 64`. Each change is a context in which train_interact.py behaves
differently in one point. A control of train_interact.py (--control) is named in the same way:
`shuffled: --grades 64` is the control of the run `--grades 64`. So is the mean of this run and of a
run with another seed (scripts/average.py): `mean: --grades 64`."""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from unittest.mock import patch

from torch import Tensor

from tinystory.config.control import CONTROLS
from tinystory.rl import score_model
from tinystory.rl.score_model import ScoreModel
from tinystory.run.errors import UserError


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


MEAN = "mean"  # the mean of the weights of two runs of one student
CHANGES: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "random choice": random_choice,
    "no model": no_model,
}


def split(text: str) -> tuple[str, str]:
    """The name (of a control or a change, or MEAN) and the options of `NAME: OPTIONS`. Without a
    colon before the options, the name is "". Raises UserError for an unknown name."""
    before, colon, after = text.partition(":")
    if not colon or before.lstrip().startswith("-"):
        return "", text
    names = [*CONTROLS, MEAN, *filter(None, CHANGES)]
    if before not in names:
        known = ", ".join(names)
        raise UserError(f"--options {text!r}: {before!r} is not a control: give one of {known}")
    return before, after
