"""Calibration: tests a judge on known stories before time and money go into learning from it.

`judgement` is the probability that the judge scores a real story above shuffled words (the area
under the ROC curve; a tie counts one half). 0.5 is chance, and a teacher near it teaches noise."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from tinystory.config import InteractConfig
from tinystory.evaluate.corruptions import (
    DOCUMENTS,
    REAL,
    SENTENCES,
    WORDS,
    KnownStory,
    known_stories,
    unseen_stories,
)
from tinystory.evaluate.intervals import mean_of, wilson, with_ci
from tinystory.run.errors import UserError
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grader
from tinystory.teacher.probe import HUMAN

# stories of each kind
FULL = 24
CHEAP = 16
CHEAP_KINDS = (REAL, SENTENCES, WORDS)

# (opening, story) pairs -> scores, a teacher's as fractions of the highest possible one; None
# without a score.
GradeKnown = Callable[[Sequence[tuple[str, str]]], Sequence[float | None]]


def calibrate(grade: GradeKnown, known: Sequence[KnownStory]) -> dict[str, Any]:
    """Scores `known` (see known_stories) and summarises the scores; None stands for what could not
    be measured.

    Returns {"stories", "unscored", "judgement", "judgement_ci", "kinds": {kind: {"mean", "auc",
    "ci"}}}, where auc is the probability that a real story scores above
    one of this kind. Intervals are Wilson's with as many trials as the smaller kind has stories,
    which is conservative."""
    scores = grade([(story.opening, story.story) for story in known])
    by_kind: dict[str, list[float]] = {story.kind: [] for story in known}
    for story, score in zip(known, scores, strict=True):
        if score is not None:
            by_kind[story.kind].append(score)

    kinds: dict[str, dict[str, Any]] = {}
    for kind, values in by_kind.items():
        kinds[kind] = {"mean": mean_of(values)}
        if kind != REAL:
            kinds[kind] |= area_and_interval(by_kind[REAL], values)
    return {
        "stories": len(known),
        "unscored": sum(score is None for score in scores),
        "judgement": kinds[WORDS]["auc"],
        "judgement_ci": kinds[WORDS]["ci"],
        "kinds": kinds,
    }


def area_and_interval(better: Sequence[float], worse: Sequence[float]) -> dict[str, Any]:
    """{"auc", "ci"}: the area under the ROC curve (Mann and Whitney 1947), in which a tie counts
    1/2; None for both if either side has no scores."""
    trials = min(len(better), len(worse))
    if trials == 0:
        return {"auc": None, "ci": None}
    pairs = itertools.product(better, worse)
    auc = fmean((high > low) + (high == low) / 2 for high, low in pairs)
    return {"auc": auc, "ci": list(wilson(auc * trials, trials))}


# ---- in words ------------------------------------------------------------------------------------


def verdict(result: Mapping[str, Any]) -> str:
    """One clause that continues "the teacher ..."."""
    if result["judgement"] is None:
        return (
            f"gave no scores: {result['unscored']} of {result['stories']} stories are without one"
        )
    probability = with_ci(result["judgement"], result["judgement_ci"])
    if result["judgement_ci"][0] > 0.5:
        return f"puts a story above shuffled words with probability {probability}"
    return (
        "cannot tell a story from shuffled words: it puts the story first with probability "
        f"{probability}, where 0.5 is chance; learning from it is learning from noise"
    )


def table(judge: str, result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of two cells: the judge's name, then per kind the mean score and the AUC with its 95 %
    interval (0.5 is chance), then the number of unscored stories."""
    rows = [["", judge]]
    for kind, value in result["kinds"].items():
        cell = with_ci(value["mean"], None)
        if "auc" in value:
            cell = f"{cell}: {with_ci(value['auc'], value['ci'])}"
        rows.append([kind, cell])
    rows.append(["without a score", f"{result['unscored']} of {result['stories']}"])
    return rows


def require(result: Mapping[str, Any], least: float) -> None:
    """Raises UserError if the judgement is below `least`."""
    judgement = result["judgement"]
    if least and (judgement is None or judgement < least):
        raise UserError(
            f"--require-judgement {least:g}: the teacher {verdict(result)}; choose another teacher"
        )


def calibrated(config: InteractConfig, grader: Grader) -> dict[str, Any]:
    """{"calibration": ...}, a brief calibration before a run, whose verdict is printed. {} where it
    is not needed: the built-in teacher is known, and a human's time is expensive. Raises UserError
    below --require-judgement."""
    needed = (config.teacher_url and config.calibrate) or config.require_judgement
    human = isinstance(grader, Teacher) and grader.model == HUMAN
    if not needed or human:
        return {}
    known = known_stories(unseen_stories(DOCUMENTS), CHEAP, CHEAP_KINDS)
    forecast = grader.forecast(len(known), known[0].opening)
    if forecast:
        print(f"calibration: {forecast}", flush=True)
    result = calibrate(of_grader(grader), known)
    print(f"calibration: the teacher {verdict(result)} (details: scripts/doctor.py --calibrate)")
    require(result, config.require_judgement)
    return {"calibration": result | {"verdict": verdict(result)}}


def of_grader(grader: Grader) -> GradeKnown:
    return lambda stories: [grade.score for grade in grader.grade_each(stories)]
