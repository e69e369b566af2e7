"""Whether a teacher can judge: it is shown stories of known order, before time and money go into learning from it.

The judgement is the probability that it scores a story above shuffled words (the area under the ROC curve; a
tie counts one half). 0.5 is chance, and a teacher near it teaches noise.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tinystory.config import InteractConfig
from tinystory.evaluate.coreference import unseen_stories
from tinystory.evaluate.corruptions import KINDS, ORDER, READ, REAL, SENTENCES, WORDS, Known, known_stories
from tinystory.evaluate.intervals import bootstrap, ranks, wilson
from tinystory.run.errors import UserError
from tinystory.teacher.client import HUMAN, Teacher
from tinystory.teacher.grader import Grader

FULL, CHEAP = 24, 16  # stories of each kind
CHEAP_KINDS = (REAL, SENTENCES, WORDS)
AGAIN = 16  # stories, half of them shuffled, that are asked a second time
COUNTS_WORDS = 0.7  # correlation of score and length within a kind from which a teacher is said to count words
STEADY = 0.5  # agreement of a teacher with itself below which it is said to answer at random

# grade(told, again): each text's total, as a fraction of the highest, or None for no score. again: 1 for a second
# answer to the same question, with other random numbers.
Grade: TypeAlias = Callable[[Sequence[tuple[str, str]], int], Sequence[float | None]]


def calibrate(grade: Grade, known: Sequence[Known]) -> dict[str, Any]:
    """What a teacher makes of `known` (see known_stories), and of AGAIN of them a second time.

    Returns {"stories", "unscored", "judgement" and "judgement_ci", "kinds": {kind: {"mean", "low", "high"}}, "order":
    [{"better", "worse", "auc", "ci"}], "range": [lowest, highest], "length": Spearman's correlation of score and number
    of words within a kind, with "length_ci", "steady": {"same", "apart", "correlation"}}. Scores are fractions of the
    highest possible one, 0..1. None stands for what could not be measured.

    Intervals of areas are Wilson's for as many trials as the smaller kind has stories, which is on the safe side;
    that of the length is bootstrapped over the stories.
    """
    scores = grade([(each.opening, each.story) for each in known], 0)
    of_kind = {kind: _array(s for s, each in zip(scores, known, strict=True) if each.kind == kind) for kind in KINDS}
    of_kind = {kind: values for kind, values in of_kind.items() if len(values)}
    order = []
    for better, worse in ORDER:
        if better in of_kind and worse in of_kind:
            order.append({"better": better, "worse": worse} | _area(of_kind[better], of_kind[worse]))
    given = [score for score in scores if score is not None]
    judgement = next((each for each in order if (each["better"], each["worse"]) == (REAL, WORDS)), {})
    return {
        "stories": len(known),
        "unscored": len(known) - len(given),
        "judgement": judgement.get("auc"),
        "judgement_ci": judgement.get("ci"),
        "kinds": {kind: _means(values) for kind, values in of_kind.items()},
        "order": order,
        "range": [min(given), max(given)] if given else None,
        **_length(scores, known),
        "steady": _steady(grade, scores, known),
    }


def _array(values: Any) -> np.ndarray:
    """float64 (n,), with nan for no score."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _means(values: np.ndarray) -> dict[str, float | None]:
    there = values[~np.isnan(values)]
    if not len(there):
        return {"mean": None, "low": None, "high": None}
    return {"mean": float(there.mean()), "low": float(there.min()), "high": float(there.max())}


def _area(better: np.ndarray, worse: np.ndarray) -> dict[str, Any]:
    better, worse = better[~np.isnan(better)], worse[~np.isnan(worse)]
    trials = min(len(better), len(worse))
    if not trials:
        return {"auc": None, "ci": None}
    area = area_under_curve(better, worse)
    return {"auc": area, "ci": list(wilson(area * trials, trials))}


def area_under_curve(better: np.ndarray, worse: np.ndarray) -> float:
    """The fraction of pairs in which the better one has the higher score; ties count one half (Mann and Whitney 1947).
    (n,), (m,)."""
    above = better[:, None] > worse[None, :]
    return float(above.mean() + (better[:, None] == worse[None, :]).mean() / 2)


def _length(scores: Sequence[float | None], known: Sequence[Known]) -> dict[str, Any]:
    """Spearman's correlation of score and words, pooled within the kinds whose texts have many lengths: between the
    kinds, the better ones may be the longer ones."""
    groups = []
    for kind in (REAL, SENTENCES, WORDS):
        pairs = [
            (len(each.story.split()), score)
            for each, score in zip(known, scores, strict=True)
            if each.kind == kind and score is not None
        ]
        if pairs:
            groups.append(np.array(pairs, dtype=float))
    if not groups:
        return {"length": None, "length_ci": None}
    rows = np.concatenate(groups)
    kinds = np.repeat(np.arange(len(groups)), [len(group) for group in groups])

    def pooled(at: np.ndarray) -> float:
        products, squares = 0.0, np.zeros(2)
        for kind in range(len(groups)):
            chosen = rows[at[kinds[at] == kind]]
            if len(chosen) > 1 and len(np.unique(chosen[:, 1])) > 1:  # one score for all lengths tells nothing
                a, b = (rank - rank.mean() for rank in (ranks(chosen[:, 0]), ranks(chosen[:, 1])))
                products += (a * b).sum()
                squares += (a * a).sum(), (b * b).sum()
        return products / np.sqrt(squares.prod()) if squares.all() else float("nan")

    value = pooled(np.arange(len(rows)))
    if np.isnan(value):
        return {"length": None, "length_ci": None}
    return {"length": float(value), "length_ci": list(bootstrap(pooled, len(rows)))}


def _steady(grade: Grade, scores: Sequence[float | None], known: Sequence[Known]) -> dict[str, float | None] | None:
    """How far the teacher repeats itself: the fraction of equal scores, their mean distance, and the correlation of the
    first answers with the second ones (None if either is constant)."""
    chosen = []
    for kind in (REAL, WORDS):
        chosen += list(itertools.islice((i for i, each in enumerate(known) if each.kind == kind), AGAIN // 2))
    second = grade([(known[i].opening, known[i].story) for i in chosen], 1)
    pairs = [(scores[i], other) for i, other in zip(chosen, second, strict=True)]
    a, b = np.array([pair for pair in pairs if None not in pair], dtype=float).reshape(-1, 2).T
    if not len(a):
        return None
    constant = a.std() == 0 or b.std() == 0
    return {
        "same": float(np.isclose(a, b).mean()),
        "apart": float(np.abs(a - b).mean()),
        "correlation": None if constant else float(np.corrcoef(a, b)[0, 1]),
    }


# ---- in words -------------------------------------------------------------------------------------------------------


def verdict(found: Mapping[str, Any]) -> str:
    """One sentence that calls the teacher what it is; it continues "the teacher ..."."""
    if found["judgement"] is None:
        return f"gave no scores: {found['unscored']} of {found['stories']} stories are without one"
    telling = f"{found['judgement']:.2f} [{found['judgement_ci'][0]:.2f}, {found['judgement_ci'][1]:.2f}]"
    lowest, highest = found["range"]
    if found["length"] is not None and found["length"] >= COUNTS_WORDS and found["length_ci"][0] > 0.5:
        return (
            f"counts words: score and length correlate by {found['length']:.2f} among stories of one kind, and it puts "
            f"a story above shuffled words with probability {telling}"
        )
    if found["judgement_ci"][0] > 0.5:
        return f"puts a story above shuffled words with probability {telling}"
    if lowest == highest:
        return f"gives everything the same score, {lowest:.0%} of the highest: there is nothing to learn from it"
    steady = found["steady"]
    if steady and steady["same"] < STEADY and (steady["correlation"] or 0.0) < STEADY:
        return (
            f"answers at random: asked twice, it gives {steady['same']:.0%} of the stories the same score, and it puts "
            f"a story above shuffled words with probability {telling}, where 0.5 is chance"
        )
    return (
        f"cannot tell a story from shuffled words: it puts the story first with probability {telling}, where "
        "0.5 is chance; learning from it is learning from noise"
    )


def lines(found: Mapping[str, Any]) -> list[str]:
    """The calibration as lines for a terminal."""
    said = ["stories of known order, score as a fraction of the highest:"]
    for kind, values in found["kinds"].items():
        spread = "no score" if values["mean"] is None else "{mean:.2f}, from {low:.2f} to {high:.2f}".format(**values)
        said.append(f"  {kind:<20} {spread}")
    said.append("how often the better one has the higher score (0.5 is chance), with a 95 % interval:")
    for each in found["order"]:
        name = f"{each['better']} > {each['worse']}"
        said.append(
            f"  {name:<40} " + ("no score" if each["auc"] is None else f"{each['auc']:.2f} {_ends(each['ci'])}")
        )
    if found["length"] is not None:
        said.append(f"score and length, within a kind: {found['length']:+.2f} {_ends(found['length_ci'])}")
    if found["steady"]:
        steady = found["steady"]
        said.append(
            f"asked twice: the same score {steady['same']:.0%} of the time, {steady['apart']:.2f} apart on average"
        )
    if found["unscored"]:
        said.append(f"without a score: {found['unscored']} of {found['stories']}")
    return said


def _ends(interval: Sequence[float]) -> str:
    return f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def require(found: Mapping[str, Any], least: float) -> None:
    """Raises UserError if the judgement is below `least`."""
    if least and (found["judgement"] is None or found["judgement"] < least):
        raise UserError(f"--require-judgement {least:g}: the teacher {verdict(found)}; choose another teacher")


def calibrated(config: InteractConfig, grader: Grader) -> dict[str, Any]:
    """{"calibration": ...} of a grader before a run, in its cheap form, said in one line; {} where there is no need:
    the built-in teacher is known, and a person has better things to grade. Raises UserError if the judgement is below
    --require-judgement."""
    asked = config.teacher_url and config.calibrate
    if config.replay or not (asked or config.require_judgement):
        return {}
    if isinstance(grader, Teacher) and grader.model == HUMAN:
        return {}
    found = calibrate(of_grader(grader), known_stories(unseen_stories(READ), CHEAP, CHEAP_KINDS))
    print(f"calibration: the teacher {verdict(found)} (scripts/doctor.py --calibrate tells more)")
    require(found, config.require_judgement)
    return {"calibration": found | {"verdict": verdict(found)}}


def of_grader(grader: Grader) -> Grade:
    return lambda told, again: [grade.score for grade in grader.grade_each(told, again)]
