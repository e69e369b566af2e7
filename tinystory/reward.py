"""From the teacher's score of a story to its reward, the number that PPO maximises.

Anything can be the teacher: any callable `f(opening, stories)` that returns one score per story, 0..1 or None. None is
no score: the story gets no reward and no gradient, and it is counted.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tinystory.errors import UserError

ScoreStories = Callable[[str, Sequence[str]], Sequence[float | None]]


def story_reward(score: float, words: int, length_weight: float, length_words: int) -> float:
    """(score + length_weight * words / length_words) / (1 + length_weight): 0..1. The second term, at most
    length_weight, keeps stories from shrinking (arXiv 2509.15714). score: 0..1; words: whitespace-separated words that
    the student wrote."""
    return (score + length_weight * min(words / length_words, 1.0)) / (1 + length_weight)


def load_score(spec: str) -> ScoreStories:
    """The function named by FILE.py:FUNCTION, with its scores checked at each call. Raises UserError if there is none,
    and from a call whose scores are not one number in 0..1 or None per story."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--reward {spec}: there is no file {file!r}; write it as FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--reward {spec}: {file!r} is not a Python file; write it as FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--reward {spec}: {file} has no function {name!r}")

    def score(opening: str, stories: Sequence[str]) -> Sequence[float | None]:
        scores = list(function(opening, stories))
        if len(scores) != len(stories):
            raise UserError(
                f"--reward {spec} gave {len(scores)} scores for {len(stories)} stories; it must give one per story"
            )
        for value in scores:
            if value is not None and not (math.isfinite(value) and 0 <= value <= 1):
                raise UserError(f"--reward {spec} gave {value!r}; a score is a number from 0 to 1, or None")
        return scores

    return score
