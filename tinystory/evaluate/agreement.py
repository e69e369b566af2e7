"""How far two raters of the same stories agree: on each criterion, and on the sum of them.

A rater that ranks stories as another does may still give one point less, and one with the same mean may rank them
otherwise. So there are three statistics, kappa for the scores themselves, Spearman's correlation for their order and
the mean difference, and a confusion table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from tinystory.evaluate.intervals import bootstrap, spearman
from tinystory.run.errors import UserError
from tinystory.teacher.prompt import TOP

Key: TypeAlias = tuple[str, str]  # opening and story


@dataclass(frozen=True)
class Rater:
    """The ratings of one judge: per story, scores of criteria, 0..3 each, or one score, 0..1 (as of a callable)."""

    name: str
    ratings: dict[Key, Mapping[str, float] | float] = field(default_factory=dict)

    def add(self, opening: str, story: str, scores: Mapping[str, float] | None, score: float | None) -> None:
        """Add the scores or else the score of a story; nothing if it has neither."""
        rating = scores or score
        if rating is not None:
            self.ratings[opening, story] = rating

    def scores(self, key: Key) -> Mapping[str, float]:
        """The scores of the criteria; {} if there are none."""
        rating = self.ratings.get(key)
        return rating if isinstance(rating, Mapping) else {}

    def score_sum(self, key: Key, criteria: int) -> float:
        """The sum of a story's scores; a single score is scaled to the sum of so many criteria."""
        rating = self.ratings[key]
        return sum(rating.values()) if isinstance(rating, Mapping) else rating * TOP * criteria

    def criteria(self) -> int:
        """The number of criteria; 0 if no story has scores of criteria."""
        return max((len(self.scores(key)) for key in self.ratings), default=0)


def weighted_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights (Cohen 1968) of (n,) and (n,) on an even scale: 1 - mean((a_i - b_i)^2) over
    the mean of (a_i - b_j)^2 for all i, j. For scores that are not whole, as those from probabilities, it is Lin's
    concordance correlation (1989). nan if both always give the same value."""
    by_chance = a.var() + b.var() + (a.mean() - b.mean()) ** 2
    return float(1 - np.square(a - b).mean() / by_chance) if by_chance else float("nan")


def agreement(first: Rater, second: Rater) -> dict[str, Any]:
    """The agreement of two raters on the stories that both rated: {"judges", "stories", "highest", "sum", "criteria",
    with an entry per shared criterion, "length"}.

    "sum" and each criterion hold kappa, spearman, difference (second less first) and their bootstrap intervals over
    stories, NAME_ci; both means; the fraction of equal scores; and, for criteria, "table": rows are the first rater's
    scores 0..3, columns the second's, rounded. "length" holds Spearman's correlation of the number of words with each
    rater's sum and with the difference. None stands for what cannot be computed: a correlation with a constant.
    """
    keys = [key for key in first.ratings if key in second.ratings]
    if not keys:
        raise UserError(f"{first.name} and {second.name} have scored no story in common: let one judge the other's")
    shared = [key for key in keys if first.scores(key) and second.scores(key)]
    names = [name for name in first.scores(shared[0]) if name in second.scores(shared[0])] if shared else []
    criteria = {}
    for name in names:
        a, b = (np.array([rater.scores(key)[name] for key in shared], dtype=float) for rater in (first, second))
        criteria[name] = _pair(a, b) | {"table": _table(a, b)}
    count = len(first.scores(shared[0])) if shared else first.criteria() or second.criteria() or TOP
    a, b = (np.array([rater.score_sum(key, count) for key in keys], dtype=float) for rater in (first, second))
    words = np.array([len(story.split()) for _, story in keys], dtype=float)
    length = _statistics(
        len(keys),
        first=lambda rows: spearman(words[rows], a[rows]),
        second=lambda rows: spearman(words[rows], b[rows]),
        difference=lambda rows: spearman(words[rows], (b - a)[rows]),
    )
    facts = {"judges": [first.name, second.name], "stories": len(keys), "highest": TOP * count}
    return facts | {"sum": _pair(a, b), "criteria": criteria, "length": length}


def _pair(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    statistics = _statistics(
        len(a),
        kappa=lambda rows: weighted_kappa(a[rows], b[rows]),
        spearman=lambda rows: spearman(a[rows], b[rows]),
        difference=lambda rows: float((b - a)[rows].mean()),
    )
    return {"means": [float(a.mean()), float(b.mean())], "equal": float((a == b).mean())} | statistics


def _statistics(size: int, **functions: Callable[[np.ndarray], float]) -> dict[str, Any]:
    """Per name, the statistic of all rows and, as NAME_ci, its interval; None for nan."""
    out: dict[str, Any] = {}
    for name, function in functions.items():
        value = function(np.arange(size))
        out[name] = None if np.isnan(value) else float(value)
        out[f"{name}_ci"] = None if np.isnan(value) else list(bootstrap(function, size))
    return out


def _table(a: np.ndarray, b: np.ndarray) -> list[list[int]]:
    """Counts of stories by the first rater's score (row) and the second's (column)."""
    table = np.zeros((TOP + 1, TOP + 1), dtype=int)
    np.add.at(table, (np.rint(a).astype(int), np.rint(b).astype(int)), 1)
    return table.tolist()
