"""Calibration: whether a teacher can judge, by its scores of known stories, before time and money go into learning.

The judgement is the probability that it scores a story above shuffled words (the area under the ROC curve; a tie counts
one half). 0.5 is chance, and a teacher near it teaches noise.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tinystory.config import InteractConfig
from tinystory.evaluate.coreference import unseen_stories
from tinystory.evaluate.corruptions import DOCUMENTS, KINDS, ORDER, REAL, SENTENCES, WORDS, KnownStory, known_stories
from tinystory.evaluate.intervals import bootstrap, ranks, wilson
from tinystory.run.errors import UserError
from tinystory.teacher.client import HUMAN, Teacher
from tinystory.teacher.grader import Grader

FULL, CHEAP = 24, 16  # stories of each kind
CHEAP_KINDS = (REAL, SENTENCES, WORDS)
AGAIN = 16  # stories, half of them shuffled, that are graded a second time
COUNTS_WORDS = 0.7  # correlation of score and length within a kind from which a teacher is said to count words
STEADY = 0.5  # agreement of a teacher with itself below which it is said to answer at random

# grade(stories, again): the score of each (opening, story), as a fraction of the highest, or None for no score.
# again: 1 for a second answer to the same question, with another seed.
GradeKnown: TypeAlias = Callable[[Sequence[tuple[str, str]], int], Sequence[float | None]]


def calibrate(grade: GradeKnown, known: Sequence[KnownStory]) -> dict[str, Any]:
    """How a teacher scores `known` (see known_stories), and AGAIN of them a second time.

    Returns {"stories", "unscored", "judgement" and "judgement_ci", "kinds": {kind: {"mean", "low", "high"}}, "order":
    [{"better", "worse", "auc", "ci"}], "range": [lowest, highest], "length": Spearman's correlation of score and number
    of words within a kind, with "length_ci", "steady": {"same", "apart", "correlation"}}. Scores are fractions of the
    highest possible one, 0..1. None stands for what could not be measured.

    Intervals of areas are Wilson's for as many trials as the smaller kind has stories, which is on the safe side; that
    of the length is bootstrapped over the stories.
    """
    scores = _floats(grade([(story.opening, story.story) for story in known], 0))
    kinds = np.array([story.kind for story in known])
    by_kind = {kind: scores[(kinds == kind) & ~np.isnan(scores)] for kind in KINDS if kind in kinds}
    order = [
        {"better": better, "worse": worse} | _area(by_kind[better], by_kind[worse])
        for better, worse in ORDER
        if better in by_kind and worse in by_kind
    ]
    judgement = next((row for row in order if (row["better"], row["worse"]) == (REAL, WORDS)), {})
    scored = scores[~np.isnan(scores)]
    return {
        "stories": len(known),
        "unscored": len(known) - len(scored),
        "judgement": judgement.get("auc"),
        "judgement_ci": judgement.get("ci"),
        "kinds": {
            kind: {"mean": float(values.mean()), "low": float(values.min()), "high": float(values.max())}
            if len(values)
            else {"mean": None, "low": None, "high": None}
            for kind, values in by_kind.items()
        },
        "order": order,
        "range": [float(scored.min()), float(scored.max())] if len(scored) else None,
        **_length(scores, kinds, np.array([len(story.story.split()) for story in known])),
        "steady": _steady(grade, scores, known),
    }


def _floats(values: Iterable[float | None]) -> np.ndarray:
    """float64 (n,), with nan for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _area(better: np.ndarray, worse: np.ndarray) -> dict[str, Any]:
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


def _length(scores: np.ndarray, kinds: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """Spearman's correlation of score and words, pooled within the kinds whose texts have many lengths: between the
    kinds, the better ones may be the longer ones. (n,) each."""
    rows = np.flatnonzero(np.isin(kinds, CHEAP_KINDS) & ~np.isnan(scores))
    rows = rows[np.argsort([CHEAP_KINDS.index(kind) for kind in kinds[rows]], kind="stable")]

    def pooled(sample: np.ndarray) -> float:
        products, squares = 0.0, np.zeros(2)
        for kind in CHEAP_KINDS:
            chosen = rows[sample][kinds[rows[sample]] == kind]
            if len(chosen) > 1 and len(np.unique(scores[chosen])) > 1:  # one score for all lengths tells nothing
                a, b = (rank - rank.mean() for rank in (ranks(lengths[chosen]), ranks(scores[chosen])))
                products += (a * b).sum()
                squares += (a * a).sum(), (b * b).sum()
        return products / np.sqrt(squares.prod()) if squares.all() else float("nan")

    value = pooled(np.arange(len(rows)))
    if np.isnan(value):
        return {"length": None, "length_ci": None}
    return {"length": float(value), "length_ci": list(bootstrap(pooled, len(rows)))}


def _steady(grade: GradeKnown, scores: np.ndarray, known: Sequence[KnownStory]) -> dict[str, float | None] | None:
    """How far the teacher repeats itself: the fraction of equal scores, their mean distance, and the correlation of the
    first answers with the second ones (None if either is constant)."""
    rows = [
        i for kind in (REAL, WORDS) for i in [i for i, story in enumerate(known) if story.kind == kind][: AGAIN // 2]
    ]
    second = _floats(grade([(known[i].opening, known[i].story) for i in rows], 1))
    a, b = np.stack([scores[rows], second])[:, ~np.isnan(scores[rows] + second)]
    if not len(a):
        return None
    constant = a.std() == 0 or b.std() == 0
    return {
        "same": float(np.isclose(a, b).mean()),
        "apart": float(np.abs(a - b).mean()),
        "correlation": None if constant else float(np.corrcoef(a, b)[0, 1]),
    }


# ---- in words -------------------------------------------------------------------------------------------------------


def verdict(result: Mapping[str, Any]) -> str:
    """The calibration in one clause, which continues "the teacher ..."."""
    if result["judgement"] is None:
        return f"gave no scores: {result['unscored']} of {result['stories']} stories are without one"
    probability = f"{result['judgement']:.2f} {_interval(result['judgement_ci'])}"
    lowest, highest = result["range"]
    if result["length"] is not None and result["length"] >= COUNTS_WORDS and result["length_ci"][0] > 0.5:
        return (
            f"counts words: score and length correlate by {result['length']:.2f} among stories of one kind, and it "
            f"puts a story above shuffled words with probability {probability}"
        )
    if result["judgement_ci"][0] > 0.5:
        return f"puts a story above shuffled words with probability {probability}"
    if lowest == highest:
        return f"gives everything the same score, {lowest:.0%} of the highest: there is nothing to learn from it"
    steady = result["steady"]
    if steady and steady["same"] < STEADY and (steady["correlation"] or 0.0) < STEADY:
        return (
            f"answers at random: asked twice, it gives {steady['same']:.0%} of the stories the same score, and it puts "
            f"a story above shuffled words with probability {probability}, where 0.5 is chance"
        )
    return (
        f"cannot tell a story from shuffled words: it puts the story first with probability {probability}, where "
        "0.5 is chance; learning from it is learning from noise"
    )


def lines(result: Mapping[str, Any]) -> list[str]:
    """The calibration as lines for a terminal."""
    out = ["known stories, score as a fraction of the highest:"]
    for kind, values in result["kinds"].items():
        spread = "no score" if values["mean"] is None else "{mean:.2f}, from {low:.2f} to {high:.2f}".format(**values)
        out.append(f"  {kind:<20} {spread}")
    out.append("how often the better one has the higher score (0.5 is chance), with a 95 % interval:")
    for row in result["order"]:
        area = "no score" if row["auc"] is None else f"{row['auc']:.2f} {_interval(row['ci'])}"
        out.append(f"  {row['better'] + ' > ' + row['worse']:<40} {area}")
    if result["length"] is not None:
        out.append(f"score and length, within a kind: {result['length']:+.2f} {_interval(result['length_ci'])}")
    if steady := result["steady"]:
        out.append(
            f"asked twice: the same score {steady['same']:.0%} of the time, {steady['apart']:.2f} apart on average"
        )
    if result["unscored"]:
        out.append(f"without a score: {result['unscored']} of {result['stories']}")
    return out


def _interval(ci: Sequence[float]) -> str:
    return f"[{ci[0]:.2f}, {ci[1]:.2f}]"


def require(result: Mapping[str, Any], least: float) -> None:
    """Raises UserError if the judgement is below `least`."""
    if least and (result["judgement"] is None or result["judgement"] < least):
        raise UserError(f"--require-judgement {least:g}: the teacher {verdict(result)}; choose another teacher")


def calibrated(config: InteractConfig, grader: Grader) -> dict[str, Any]:
    """{"calibration": ...}, the cheap calibration of a grader before a run, whose verdict is printed. {} where it is
    not needed: for a replay, for the built-in teacher, which is known, and for a human, whose time is expensive.
    Raises UserError if the judgement is below --require-judgement."""
    needed = (config.teacher_url and config.calibrate) or config.require_judgement
    human = isinstance(grader, Teacher) and grader.model == HUMAN
    if config.replay or not needed or human:
        return {}
    result = calibrate(of_grader(grader), known_stories(unseen_stories(DOCUMENTS), CHEAP, CHEAP_KINDS))
    print(f"calibration: the teacher {verdict(result)} (details: scripts/doctor.py --calibrate)")
    require(result, config.require_judgement)
    return {"calibration": result | {"verdict": verdict(result)}}


def of_grader(grader: Grader) -> GradeKnown:
    return lambda stories, again: [grade.score for grade in grader.grade_each(stories, again)]
