"""How far two judges of the same stories agree: on each criterion, and on the sum of them.

A judge that ranks stories as another does may still give one point less; one that gives the same mean may rank them
otherwise. So there are three numbers: kappa for the scores themselves, Spearman's correlation for the order, and the
mean difference; and a table of who gave what.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from tinystory.evaluate.intervals import bootstrap, spearman
from tinystory.run.errors import UserError
from tinystory.teacher.prompt import TOP

Told: TypeAlias = tuple[str, str]  # opening and story


@dataclass(frozen=True)
class Judge:
    """What one judge said of each story. A judge may score criteria, 0..3 each, or the whole, 0..1 (as a callable)."""

    name: str
    scores: dict[Told, Mapping[str, float]]
    wholes: dict[Told, float]

    def add(self, opening: str, story: str, scores: Mapping[str, float] | None, score: float | None) -> None:
        """Note what it said of a story; nothing if it said nothing."""
        if scores:
            self.scores[opening, story] = scores
        elif score is not None:
            self.wholes[opening, story] = score

    def knows(self, opening: str, story: str) -> bool:
        return (opening, story) in self.scores or (opening, story) in self.wholes

    def total(self, told: Told, criteria: int) -> float:
        """The sum of the scores of a story; a score of the whole is taken to the scale of so many criteria."""
        return sum(self.scores[told].values()) if told in self.scores else self.wholes[told] * TOP * criteria


def weighted_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights (Cohen 1968) of (n,) and (n,) on an even scale: 1 - mean((a_i - b_i)^2) over
    the mean of (a_i - b_j)^2 for all i, j. For scores that are not whole, as those from probabilities, it is Lin's
    concordance correlation (1989). nan if both always give the same value."""
    by_chance = a.var() + b.var() + (a.mean() - b.mean()) ** 2
    return float(1 - np.square(a - b).mean() / by_chance) if by_chance else float("nan")


def agreement(first: Judge, second: Judge) -> dict[str, Any]:
    """The agreement of two judges on the stories that both scored: {"judges", "stories", "sum", one entry per shared
    criterion in "criteria", "length"}.

    Each of "sum" and the criteria holds kappa, spearman, difference (second less first) and their bootstrap intervals
    over stories, NAME_ci; both means; and, for criteria, "table": rows are the first judge's scores 0..3, columns the
    second's, rounded. "length" holds Spearman's correlation of the number of words with each judge's sum and with the
    difference. None stands for what cannot be computed: a correlation with a constant.
    """
    told = [each for each in (*first.scores, *first.wholes) if second.knows(*each)]
    if not told:
        raise UserError(f"{first.name} and {second.name} have scored no story in common: let one judge the other's")
    shared = [each for each in told if each in first.scores and each in second.scores]
    names = [name for name in first.scores[shared[0]] if name in second.scores[shared[0]]] if shared else []
    criteria = {}
    for name in names:
        a, b = (np.array([judge.scores[each][name] for each in shared], dtype=float) for judge in (first, second))
        criteria[name] = _pair(a, b) | {"table": _table(a, b)}
    count = len(first.scores[shared[0]]) if shared else _criteria(first) or _criteria(second) or TOP
    a, b = (np.array([judge.total(each, count) for each in told], dtype=float) for judge in (first, second))
    words = np.array([len(story.split()) for _, story in told], dtype=float)
    length = {
        "first": _measured(lambda rows: spearman(words[rows], a[rows]), len(told)),
        "second": _measured(lambda rows: spearman(words[rows], b[rows]), len(told)),
        "difference": _measured(lambda rows: spearman(words[rows], (b - a)[rows]), len(told)),
    }
    return {
        "judges": [first.name, second.name],
        "stories": len(told),
        "highest": TOP * count,
        "sum": _pair(a, b),
        "criteria": criteria,
        "length": {name: value for name, (value, _) in length.items()}
        | {f"{name}_ci": interval for name, (_, interval) in length.items()},
    }


def _criteria(judge: Judge) -> int:
    return len(next(iter(judge.scores.values()), ()))


def _pair(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    statistics: dict[str, Callable[[np.ndarray], float]] = {
        "kappa": lambda rows: weighted_kappa(a[rows], b[rows]),
        "spearman": lambda rows: spearman(a[rows], b[rows]),
        "difference": lambda rows: float((b - a)[rows].mean()),
    }
    found: dict[str, Any] = {"means": [float(a.mean()), float(b.mean())], "equal": float((a == b).mean())}
    for name, statistic in statistics.items():
        found[name], found[f"{name}_ci"] = _measured(statistic, len(a))
    return found


def _measured(statistic: Callable[[np.ndarray], float], size: int) -> tuple[float | None, list[float] | None]:
    """A statistic of all rows, and its interval; None for nan."""
    value = statistic(np.arange(size))
    if np.isnan(value):
        return None, None
    return float(value), list(bootstrap(statistic, size))


def _table(a: np.ndarray, b: np.ndarray) -> list[list[int]]:
    """Counts of stories by the first judge's score (row) and the second's (column)."""
    table = np.zeros((TOP + 1, TOP + 1), dtype=int)
    np.add.at(table, (np.rint(a).astype(int), np.rint(b).astype(int)), 1)
    return table.tolist()
