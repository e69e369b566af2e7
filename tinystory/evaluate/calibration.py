"""Calibration: whether a judge can judge, by what it says of known stories, before time and money go into learning.

The judgement is the probability that it puts a story above shuffled words (the area under the ROC curve; a tie counts
one half). 0.5 is chance, and a teacher near it teaches noise.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tinystory.config import InteractConfig
from tinystory.evaluate.coreference import unseen_stories
from tinystory.evaluate.corruptions import DOCUMENTS, REAL, SENTENCES, WORDS, KnownStory, known_stories
from tinystory.evaluate.intervals import bootstrap, ranks, wilson, with_ci
from tinystory.run.errors import UserError
from tinystory.teacher.client import HUMAN, Teacher
from tinystory.teacher.grade import Grader

FULL, CHEAP = 24, 16  # stories of each kind
CHEAP_KINDS = (REAL, SENTENCES, WORDS)
RETESTED = 16  # stories, half of them shuffled, that are graded a second time
COUNTS_WORDS = 0.7  # correlation of score and length within a kind from which a teacher is said to count words
MIN_AGREEMENT = 0.5  # agreement of a teacher with itself below which it is said to answer at random

# grade(stories, again): the score of each (opening, story), as a fraction of the highest, or None for no score.
# again: 1 for a second answer to the same question, with another seed.
GradeKnown: TypeAlias = Callable[[Sequence[tuple[str, str]], int], Sequence[float | None]]


def calibrate(grade: GradeKnown, known: Sequence[KnownStory]) -> dict[str, Any]:
    """How a judge scores `known` (see known_stories), and RETESTED of them a second time.

    Returns {"stories", "unscored", "judgement" and "judgement_ci", "kinds": {kind: {"mean", "auc", "ci"}},
    where auc is the probability that a real story scores above one of the kind, "range": [lowest, highest], "length":
    Spearman's correlation of score and number of words within a kind, with "length_ci", "retest": {"equal", "distance",
    "correlation"}}. A teacher's scores are fractions of the highest possible one, 0..1. None stands for what could not
    be measured.

    Intervals of areas are Wilson's for as many trials as the smaller kind has stories, which is on the safe side; that
    of the length is bootstrapped over the stories.
    """
    scores = np.array(grade([(story.opening, story.story) for story in known], 0), dtype=float)  # None becomes nan
    kinds = np.array([story.kind for story in known])
    rows = {kind: np.flatnonzero((kinds == kind) & ~np.isnan(scores)) for kind in dict.fromkeys(kinds.tolist())}
    areas = {kind: _area(scores[rows[REAL]], scores[chosen]) for kind, chosen in rows.items() if kind != REAL}
    judgement = areas.get(WORDS, {})
    scored = scores[~np.isnan(scores)]
    return {
        "stories": len(known),
        "unscored": len(known) - len(scored),
        "judgement": judgement.get("auc"),
        "judgement_ci": judgement.get("ci"),
        "kinds": {
            kind: {"mean": float(scores[chosen].mean()) if len(chosen) else None} | areas.get(kind, {})
            for kind, chosen in rows.items()
        },
        "range": [float(scored.min()), float(scored.max())] if len(scored) else None,
        **_length(scores, kinds, np.array([len(story.story.split()) for story in known])),
        "retest": _retest(grade, scores, known, kinds),
    }


def _area(better: np.ndarray, worse: np.ndarray) -> dict[str, Any]:
    trials = min(len(better), len(worse))
    if not trials:
        return {"auc": None, "ci": None}
    area = float(wins(better, worse).mean())
    return {"auc": area, "ci": list(wilson(area * trials, trials))}


def wins(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """1 for a pair in which the better one has the higher score, 1/2 for a tie. (n,), (m,) -> float64 (n, m), whose
    mean is the area under the ROC curve (Mann and Whitney 1947)."""
    return (better[:, None] > worse) + (better[:, None] == worse) / 2


def _length(scores: np.ndarray, kinds: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """Spearman's correlation of score and words, pooled within the kinds whose texts have many lengths: between the
    kinds, the better ones may be the longer ones. (n,) each."""
    centred = [np.empty((2, 0))]
    for kind in CHEAP_KINDS:
        rows = np.flatnonzero((kinds == kind) & ~np.isnan(scores))
        if len(np.unique(scores[rows])) > 1:  # one score for all lengths tells nothing
            centred.append(np.stack([rank - rank.mean() for rank in (ranks(lengths[rows]), ranks(scores[rows]))]))
    a, b = np.concatenate(centred, 1)

    def correlation(rows: np.ndarray) -> float:
        scale = np.sqrt((a[rows] ** 2).sum() * (b[rows] ** 2).sum())
        return float((a[rows] * b[rows]).sum() / scale) if scale else float("nan")

    value = correlation(np.arange(len(a)))
    if np.isnan(value):
        return {"length": None, "length_ci": None}
    return {"length": value, "length_ci": list(bootstrap(correlation, len(a)))}


def _retest(
    grade: GradeKnown, scores: np.ndarray, known: Sequence[KnownStory], kinds: np.ndarray
) -> dict[str, float | None] | None:
    """How far the teacher repeats itself: the fraction of equal scores, their mean distance, and the correlation of the
    first answers with the second ones (None if either is constant)."""
    rows = [int(i) for kind in (REAL, WORDS) for i in np.flatnonzero(kinds == kind)[: RETESTED // 2]]
    second = np.array(grade([(known[i].opening, known[i].story) for i in rows], 1), dtype=float)
    a, b = np.stack([scores[rows], second])[:, ~np.isnan(scores[rows] + second)]
    if not len(a):
        return None
    constant = a.std() == 0 or b.std() == 0
    return {
        "equal": float(np.isclose(a, b).mean()),
        "distance": float(np.abs(a - b).mean()),
        "correlation": None if constant else float(np.corrcoef(a, b)[0, 1]),
    }


# ---- in words -------------------------------------------------------------------------------------------------------


def verdict(result: Mapping[str, Any]) -> str:
    """The calibration in one clause, which continues "the teacher ..."."""
    if result["judgement"] is None:
        return f"gave no scores: {result['unscored']} of {result['stories']} stories are without one"
    probability = with_ci(result["judgement"], result["judgement_ci"])
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
    retest = result["retest"]
    if retest and retest["equal"] < MIN_AGREEMENT and (retest["correlation"] or 0.0) < MIN_AGREEMENT:
        return (
            f"answers at random: asked twice, it gives {retest['equal']:.0%} of the stories the same score, and it "
            f"puts a story above shuffled words with probability {probability}, where 0.5 is chance"
        )
    return (
        f"cannot tell a story from shuffled words: it puts the story first with probability {probability}, where "
        "0.5 is chance; learning from it is learning from noise"
    )


def table(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Calibrations of several judges on the same stories side by side, as rows of cells: the names, then per kind the
    mean score and how often a real story has the higher one (0.5 is chance), with a 95 % interval."""
    columns = list(results.values())
    rows = [["", *results]]
    for kind in columns[0]["kinds"]:
        values = [result["kinds"][kind] for result in columns]
        areas = [f": {with_ci(value['auc'], value['ci'])}" if "auc" in value else "" for value in values]
        rows.append([kind, *(with_ci(value["mean"], None) + area for value, area in zip(values, areas, strict=True))])
    rows += [
        ["score and length", *(with_ci(result["length"], result["length_ci"], sign="+") for result in columns)],
        ["asked twice", *(_agreement(result["retest"]) for result in columns)],
        ["without a score", *(f"{result['unscored']} of {result['stories']}" for result in columns)],
    ]
    return rows


def _agreement(retest: Mapping[str, Any] | None) -> str:
    return f"{retest['equal']:.0%} the same, {retest['distance']:.2f} apart" if retest else "no score"


def require(result: Mapping[str, Any], least: float) -> None:
    """Raises UserError if the judgement is below `least`."""
    if least and (result["judgement"] is None or result["judgement"] < least):
        raise UserError(f"--require-judgement {least:g}: the teacher {verdict(result)}; choose another teacher")


def calibrated(config: InteractConfig, grader: Grader) -> dict[str, Any]:
    """{"calibration": ...}, the cheap calibration of a grader before a run, whose verdict is printed. {} where it is
    not needed: for the built-in teacher, which is known, and for a human, whose time is expensive.
    Raises UserError if the judgement is below --require-judgement."""
    needed = (config.teacher_url and config.calibrate) or config.require_judgement
    human = isinstance(grader.scorer, Teacher) and grader.scorer.model == HUMAN
    if not needed or human:
        return {}
    result = calibrate(of_grader(grader), known_stories(unseen_stories(DOCUMENTS), CHEAP, CHEAP_KINDS))
    print(f"calibration: the teacher {verdict(result)} (details: scripts/doctor.py --calibrate)")
    require(result, config.require_judgement)
    return {"calibration": result | {"verdict": verdict(result)}}


def of_grader(grader: Grader) -> GradeKnown:
    return lambda stories, again: [grade.score for grade in grader.grade_each(stories, again)]
