"""Calibration: tests a judge on texts of known quality before time and money go into learning from
it.

`judgement` is the probability that the judge scores a good text above a bad one (the area under the
ROC curve; a tie counts one half), averaged over the kinds of bad texts. 0.5 is chance, and a teacher
near it teaches noise."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, harmonic_mean
from typing import Any

from tinystory.config import InteractConfig
from tinystory.data.corpus import NO_STORIES
from tinystory.evaluate.corruptions import (
    DULL,
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

# stories of each kind
FULL = 24
CHEAP = 16
CHEAP_KINDS = (REAL, SENTENCES, WORDS)
# Texts by the student. Where it was pretrained on dull text too, these are known apart; else all of
# them are compared with real stories.
STUDENT = "the student's texts"
STUDENT_STORY = "the student's stories"
STUDENT_DULL = "the student's dull texts"
# The better kind with which a kind is compared, if that is not REAL; None: with none.
BETTER = {REAL: None, STUDENT_STORY: None, STUDENT_DULL: STUDENT_STORY}

# (opening, story) pairs -> scores, a teacher's as fractions of the highest possible one; None
# without a score.
GradeKnown = Callable[[Sequence[tuple[str, str]]], Sequence[float | None]]


def calibrate(grade: GradeKnown, known: Sequence[KnownStory]) -> dict[str, Any]:
    """Scores `known` (see known_stories) and summarises the scores; None stands for what could not
    be measured.

    Returns {"stories", "unscored", "judgement", "judgement_ci", "kinds": {kind: {"mean", "auc",
    "ci"}}}, where auc is the probability that a better text scores above one of this kind. Intervals
    are Wilson's with as many trials as the smaller kind has stories, for the judgement with the
    harmonic mean of the numbers of good and of bad texts, which is conservative."""
    scores = grade([(story.opening, story.story) for story in known])
    by_kind: dict[str, list[float]] = {story.kind: [] for story in known}
    for story, score in zip(known, scores, strict=True):
        if score is not None:
            by_kind[story.kind].append(score)

    kinds: dict[str, dict[str, Any]] = {}
    areas = []
    compared = {REAL}
    bad_texts = 0
    for kind, values in by_kind.items():
        kinds[kind] = {"mean": mean_of(values)}
        better = BETTER.get(kind, REAL)
        if better is None or better not in by_kind:
            continue
        kinds[kind] |= area_and_interval(by_kind[better], values)
        if kinds[kind]["auc"] is not None:
            areas.append(kinds[kind]["auc"])
            compared.add(better)
            bad_texts += len(values)
    judgement = mean_of(areas)
    interval = None
    if judgement is not None:
        good_texts = sum(len(by_kind[kind]) for kind in compared)
        trials = harmonic_mean([good_texts, bad_texts])
        interval = list(wilson(judgement * trials, trials))
    return {
        "stories": len(known),
        "unscored": sum(score is None for score in scores),
        "judgement": judgement,
        "judgement_ci": interval,
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
    kinds = []
    for kind, value in result["kinds"].items():
        if value.get("auc") is not None:
            kinds.append(f"{kind} {value['auc']:.2f}")
    probability = f"{with_ci(result['judgement'], result['judgement_ci'])} ({', '.join(kinds)})"
    if can_judge(result):
        return f"scores a story above a bad text with probability {probability}"
    return (
        "cannot tell a story from a bad text: it scores the story higher with probability "
        f"{probability}, where 0.5 is chance; learning from it is learning from noise"
    )


def judgement_of_student(result: Mapping[str, Any]) -> tuple[float, Sequence[float]]:
    """The judgement and its interval on the student's own texts, which are what a teacher will
    score, or on all texts if there are none by the student."""
    for kind in (STUDENT_DULL, STUDENT):
        value = result["kinds"].get(kind, {})
        if value.get("auc") is not None:
            return value["auc"], value["ci"]
    return result["judgement"], result["judgement_ci"]


def can_judge(result: Mapping[str, Any]) -> bool:
    """Whether the judgement is better than chance, by its interval."""
    return result["judgement"] is not None and result["judgement_ci"][0] > 0.5


def table(judge: str, result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of two cells: the judge's name, then per kind the mean score and the AUC with its 95 %
    interval (0.5 is chance), then the number of unscored stories."""
    rows = [["", judge]]
    for kind, value in result["kinds"].items():
        cell = with_ci(value["mean"], None)
        if "auc" in value:
            cell = f"{cell}: {with_ci(value['auc'], value['ci'])}"
        rows.append([kind, cell])
    rows.append(["mean of these", with_ci(result["judgement"], result["judgement_ci"])])
    rows.append(["without a score", f"{result['unscored']} of {result['stories']}"])
    if "seconds" in result:
        rows.append(["seconds per text", f"{result['seconds']:.2f}"])
    return rows


def require(result: Mapping[str, Any], least: float) -> None:
    """Raises UserError if the judgement is below `least`."""
    judgement = result["judgement"]
    if least and (judgement is None or judgement < least):
        raise UserError(
            f"--require-judgement {least:g}: the teacher {verdict(result)}; choose another teacher"
        )


def calibrated(config: InteractConfig, grader: Grader, corpus: Sequence[str]) -> dict[str, Any]:
    """{"calibration": ...}, a brief calibration before a run, whose verdict is printed. {} where it
    is not needed: the built-in teacher is known, and a human's time is expensive. Fits the scale of
    a teacher's answers to questions. corpus: the student's. Raises UserError below
    --require-judgement."""
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
        facts["answer_scale"] = grader.scale.questions
    return facts


def fit_scale(grader: Grader, known: Sequence[KnownStory]) -> None:
    """Fit the scale of a teacher's answers to its answers on known texts. The replies are kept, so
    whoever grades these texts next asks for none again."""
    if not isinstance(grader, Teacher) or not grader.options.template.asks_yes_or_no:
        return
    grades = grader.grade_each([(story.opening, story.story) for story in known])
    answers = [grade.log_odds for grade in grades if grade.log_odds]
    if answers:
        grader.scale.fit(answers)


def of_grader(grader: Grader) -> GradeKnown:
    return lambda stories: [grade.score for grade in grader.grade_each(stories)]
