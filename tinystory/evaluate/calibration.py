"""Calibration: tests a judge on texts of known quality, before a run spends time and money on the
judge's scores.

The AUC of a kind of text is the probability that the judge scores a good text above a text of this
kind (the area under the ROC curve; a tie counts one half). 0.5 is chance. `judgement` is the
highest AUC over all kinds that are not TOO_EASY. A judge at chance for every kind teaches noise. A
judge that recognises one kind can teach a student to avoid that kind."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from tinystory.config import InteractConfig
from tinystory.data.corpus import NO_STORIES
from tinystory.evaluate.corruptions import (
    DULL,
    ESSAY,
    GENERIC,
    PLEA,
    REAL,
    SENTENCES,
    WORDS,
    KnownStory,
    corpus_documents,
    known_stories,
)
from tinystory.evaluate.intervals import mean_of, wilson, with_ci
from tinystory.run.errors import UserError
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grader
from tinystory.teacher.probe import HUMAN

# Texts per kind: scripts/doctor.py --calibrate, and the calibration before a run.
FULL = 24
CHEAP = 16
CHEAP_KINDS = (REAL, SENTENCES, WORDS)
# Kinds of texts by the student. If the student was also pretrained on dull text, the student's
# stories are compared with the student's dull texts; else all the student's texts are compared with
# real stories.
STUDENT = "the student's texts"
STUDENT_STORY = "the student's stories"
STUDENT_DULL = "the student's dull texts"
# Kinds that are no evidence of judgement, because the length of the text differs from a story's.
TOO_EASY = (GENERIC, ESSAY, PLEA)
# The better kind to which a kind is compared, if it is not REAL. None: the kind is not compared.
BETTER = {REAL: None, STUDENT_STORY: None, STUDENT_DULL: STUDENT_STORY}

# Function from (opening, story) pairs to scores. A teacher's scores are fractions of the highest
# possible score; None is a missing score.
GradeKnown = Callable[[Sequence[tuple[str, str]]], Sequence[float | None]]


def calibrate(grade: GradeKnown, known: Sequence[KnownStory]) -> dict[str, Any]:
    """Calibration results of a judge on `known`, from `known_stories`: {"stories", "unscored",
    "judgement", "judgement_ci", "mean_auc", "kinds": {kind: {"mean", "auc", "ci"}}}. A value that
    could not be measured is None.

    Intervals are Wilson's. The number of trials is the number of stories of the smaller kind, which
    is conservative. judgement_ci is wider than the interval of a single kind, because the judgement
    is the best of several kinds."""
    scores = grade([(story.opening, story.story) for story in known])
    by_kind: dict[str, list[float]] = {story.kind: [] for story in known}
    for story, score in zip(known, scores, strict=True):
        if score is not None:
            by_kind[story.kind].append(score)

    kinds: dict[str, dict[str, Any]] = {}
    trials = {}  # number of trials per kind that counts for the judgement
    for kind, values in by_kind.items():
        kinds[kind] = {"mean": mean_of(values)}
        better = BETTER.get(kind, REAL)
        if better is None or better not in by_kind:
            continue
        kinds[kind] |= area_and_interval(by_kind[better], values)
        if kinds[kind]["auc"] is not None and kind not in TOO_EASY:
            trials[kind] = min(len(by_kind[better]), len(values))
    judgement = interval = None
    if trials:
        best = max(trials, key=lambda kind: kinds[kind]["auc"])
        judgement = kinds[best]["auc"]
        interval = list(wilson(judgement * trials[best], trials[best], len(trials)))
    return {
        "stories": len(known),
        "unscored": sum(score is None for score in scores),
        "judgement": judgement,
        "judgement_ci": interval,
        "mean_auc": mean_of(kinds[kind]["auc"] for kind in trials),
        "kinds": kinds,
    }


def area_and_interval(better: Sequence[float], worse: Sequence[float]) -> dict[str, Any]:
    """{"auc", "ci"}: the area under the ROC curve, where a tie counts 1/2 (Mann and Whitney 1947),
    and a 95 % interval; None for both if either side has no scores."""
    trials = min(len(better), len(worse))
    if trials == 0:
        return {"auc": None, "ci": None}
    pairs = itertools.product(better, worse)
    auc = fmean((high > low) + (high == low) / 2 for high, low in pairs)
    return {"auc": auc, "ci": list(wilson(auc * trials, trials))}


# ---- in words ------------------------------------------------------------------------------------


def verdict(result: Mapping[str, Any]) -> str:
    """The result as a clause that completes the sentence "the teacher ..."."""
    if result["judgement"] is None:
        return (
            f"gave no scores: {result['unscored']} of {result['stories']} stories are without one"
        )
    areas = {}
    for kind, value in result["kinds"].items():
        if value.get("auc") is not None and kind not in TOO_EASY:
            areas[kind] = value["auc"]
    listed = ", ".join(f"{kind} {area:.2f}" for kind, area in areas.items())
    judgement = with_ci(result["judgement"], result["judgement_ci"])
    if can_judge(result):
        best = max(areas, key=areas.__getitem__)
        return f"scores a story above {best} with probability {judgement} (all: {listed}; 0.5 is chance)"
    return (
        f"cannot distinguish a story from a bad text: it scores the story higher with probability {judgement} at "
        f"best ({listed}), where 0.5 is chance; the student would learn from noise"
    )


def value_as_teacher(result: Mapping[str, Any]) -> float:
    """The AUC by which judges are compared: the AUC for the student's texts, because a teacher
    scores such texts; without texts by the student, the mean AUC over all kinds."""
    for kind in (STUDENT_DULL, STUDENT):
        auc = result["kinds"].get(kind, {}).get("auc")
        if auc is not None:
            return float(auc)
    return float(result["mean_auc"])


def can_judge(result: Mapping[str, Any]) -> bool:
    """Whether the judgement is significantly better than chance: the interval lies above 0.5."""
    return result["judgement"] is not None and result["judgement_ci"][0] > 0.5


def table(judge: str, result: Mapping[str, Any]) -> list[list[str]]:
    """The result as rows of two cells: the judge's name; for each kind, the mean score and the AUC
    with a 95 % interval (0.5 is chance); the mean AUC; the number of stories without a score."""
    rows = [["", judge]]
    for kind, value in result["kinds"].items():
        cell = with_ci(value["mean"], None)
        if "auc" in value:
            cell = f"{cell}: {with_ci(value['auc'], value['ci'])}"
        rows.append([kind, cell])
    rows.append(["mean of these", with_ci(result["mean_auc"], None)])
    rows.append(["without a score", f"{result['unscored']} of {result['stories']}"])
    if "seconds" in result:
        rows.append(["seconds per text", f"{result['seconds']:.2f}"])
    return rows


def require(result: Mapping[str, Any], least: float) -> None:
    """Raises UserError if the judgement is below `least`."""
    judgement = result["judgement"]
    if least and (judgement is None or judgement < least):
        raise UserError(
            f"--require-judgement {least:g} is not reached: the teacher {verdict(result)}; choose another teacher"
        )


def calibrated(config: InteractConfig, grader: Grader, corpus: Sequence[str]) -> dict[str, Any]:
    """{"calibration": ...}, the result of a brief calibration before a run, for config.json. Prints
    the verdict, and fits the scale of a teacher's answers to questions. {} without a calibration:
    the built-in teacher needs none, and a human's time is expensive. corpus: the student's corpus.
    Raises UserError if the judgement is below --require-judgement."""
    needed = (config.teacher_url and config.calibrate) or config.require_judgement
    human = isinstance(grader, Teacher) and grader.model == HUMAN
    if not needed or human:
        return {}
    has_dull_text = not set(NO_STORIES).isdisjoint(corpus)
    kinds = (*CHEAP_KINDS, DULL) if has_dull_text else CHEAP_KINDS
    known = known_stories(corpus_documents(corpus), CHEAP, kinds)
    forecast = grader.forecast(len(known), known[0].opening)
    if forecast:
        print(f"calibration: {forecast}", flush=True)
    fit_scale(grader, known)
    result = calibrate(of_grader(grader), known)
    print(f"calibration: the teacher {verdict(result)} (details: scripts/doctor.py --calibrate)")
    require(result, config.require_judgement)
    facts = {"calibration": result | {"verdict": verdict(result)}}
    if isinstance(grader, Teacher):
        facts["answer_scale"] = dict(grader.options.protocol.scale)
    return facts


def fit_scale(grader: Grader, known: Sequence[KnownStory]) -> None:
    """Fit the scale of a teacher's protocol to known texts. Does nothing for other graders. The
    replies are cached, so grading the same texts later sends no request."""
    if isinstance(grader, Teacher):
        grades = grader.grade_each([(story.opening, story.story) for story in known])
        grader.options.protocol = grader.options.protocol.fitted(grades)


def of_grader(grader: Grader) -> GradeKnown:
    """The function for `calibrate` that grades with this grader."""
    return lambda stories: [grade.score for grade in grader.grade_each(stories)]
