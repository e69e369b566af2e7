"""Calibration: tests a judge on texts of known quality, before a run spends time and money on the
judge's scores.

The AUC of a kind of text is the probability that the judge scores a good text above a text of this
kind (the area under the ROC curve; a tie counts one half). 0.5 is chance. `best_auc` is the
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
from tinystory.teacher.endpoint import HUMAN
from tinystory.teacher.grade import Grade, Grader

# Texts per kind: scripts/doctor.py --calibrate, and the calibration before a run.
FULL = 24
CHEAP = 16
# Texts that are graded first. If none of them gets a score, the calibration ends.
FIRST_TEXTS = 4
CHEAP_KINDS = (REAL, SENTENCES, WORDS)
# Kinds of texts by the student. If the student was also pretrained on dull text, the student's
# stories are compared with the student's dull texts; else all the student's texts are compared with
# real stories.
STUDENT = "the student's texts"
STUDENT_STORY = "the student's stories"
STUDENT_DULL = "the student's dull texts"
# Kinds that are no evidence, because the length of the text differs from a story's.
TOO_EASY = (GENERIC, ESSAY, PLEA)
# The better kind to which a kind is compared, if it is not REAL. None: the kind is not compared.
BETTER = {REAL: None, STUDENT_STORY: None, STUDENT_DULL: STUDENT_STORY}


class NoScores(UserError):
    """None of the first FIRST_TEXTS texts got a score."""


# Function from (opening, story) pairs to scores. A teacher's scores are fractions of the highest
# possible score; None is a missing score.
GradeKnown = Callable[[Sequence[tuple[str, str]]], Sequence[float | None]]


def calibrate(grade: GradeKnown, known: Sequence[KnownStory]) -> dict[str, Any]:
    """Calibration results of a judge on `known`, from `known_stories`: {"stories", "unscored",
    "best_auc", "best_auc_ci", "mean_auc", "kinds": {kind: {"mean", "auc", "ci"}}}. A value that
    could not be measured is None.

    Intervals are Wilson's. The number of trials is the number of stories of the smaller kind, which
    is conservative. best_auc_ci is wider than the interval of a single kind, because best_auc
    is the best of several kinds."""
    scores = grade([(story.opening, story.story) for story in known])
    by_kind: dict[str, list[float]] = {story.kind: [] for story in known}
    for story, score in zip(known, scores, strict=True):
        if score is not None:
            by_kind[story.kind].append(score)

    kinds: dict[str, dict[str, Any]] = {}
    trials = {}  # number of trials per kind that counts for best_auc
    for kind, values in by_kind.items():
        kinds[kind] = {"mean": mean_of(values)}
        better = BETTER.get(kind, REAL)
        if better is None or better not in by_kind:
            continue
        kinds[kind] |= area_and_interval(by_kind[better], values)
        if kinds[kind]["auc"] is not None and kind not in TOO_EASY:
            trials[kind] = min(len(by_kind[better]), len(values))
    best_auc = interval = None
    if trials:
        best = max(trials, key=lambda kind: kinds[kind]["auc"])
        best_auc = kinds[best]["auc"]
        interval = list(wilson(best_auc * trials[best], trials[best], len(trials)))
    return {
        "stories": len(known),
        "unscored": sum(score is None for score in scores),
        "best_auc": best_auc,
        "best_auc_ci": interval,
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
    if result["best_auc"] is None:
        return (
            f"gave no scores: {result['unscored']} of {result['stories']} stories are without one"
        )
    areas = {}
    for kind, value in result["kinds"].items():
        if value.get("auc") is not None and kind not in TOO_EASY:
            areas[kind] = value["auc"]
    listed = ", ".join(f"{kind} {area:.2f}" for kind, area in areas.items())
    best_auc = with_ci(result["best_auc"], result["best_auc_ci"])
    if can_judge(result):
        best = max(areas, key=areas.__getitem__)
        return f"scores a story above {best} with probability {best_auc} (all: {listed}; 0.5 is chance)"
    worst = min(areas, key=areas.__getitem__)
    interval = result["kinds"][worst]["ci"]
    if interval[1] < 0.5:
        return (
            f"scores {worst} above a story: the story has the higher score with probability "
            f"{with_ci(areas[worst], interval)} (all: {listed}; 0.5 is chance), so its scores are reversed: give "
            '"good": "no" with a question to which no is the better answer (a JSON file for --teacher-prompt)'
        )
    return (
        f"cannot distinguish a story from a bad text: it scores the story higher with probability {best_auc} at "
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
    """Whether best_auc is significantly better than chance: the interval lies above 0.5."""
    return result["best_auc"] is not None and result["best_auc_ci"][0] > 0.5


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
    """Raises UserError if best_auc is below `least`."""
    best_auc = result["best_auc"]
    if least and (best_auc is None or best_auc < least):
        raise UserError(
            f"--min-auc {least:g} is not reached: the teacher {verdict(result)}; choose another teacher"
        )


def scaled(
    grader: Grader, corpus: Sequence[str], recorded: object = None
) -> dict[str, tuple[float, float]]:
    """The scale of a teacher's answers to yes-or-no questions, for config.json: `recorded`, the
    scale that config.json holds if the run is resumed; else a scale that is fitted to the answers
    about known texts. {} for other graders. The scale belongs to the run: with another scale the
    same answers would have other scores."""
    if not isinstance(grader, Teacher) or not needs_scale(grader):
        return {}
    options = grader.options
    restored = options.protocol.restored(recorded)
    if restored:
        options.protocol = restored
    else:
        known = known_texts(corpus)
        announce("scale of the answers", grader, known)
        fit_scale(grader, known)
    return dict(options.protocol.scale)


def calibrated(config: InteractConfig, grader: Grader, corpus: Sequence[str]) -> dict[str, Any]:
    """{"calibration": ...}, the result of a brief calibration before a run, for config.json. Prints
    the verdict. {} without a calibration: the built-in teacher needs none, and a human's time is
    expensive. corpus: the student's corpus. Raises UserError if best_auc is below
    --min-auc, or not above chance."""
    is_model = isinstance(grader, Teacher) and grader.model != HUMAN
    measures = bool(config.teacher_url) and config.calibrate and is_model
    if not measures and not config.min_auc:
        return {}
    known = known_texts(corpus)
    announce("calibration", grader, known)
    result = calibrate(of_grader(grader), known)
    require(result, config.min_auc)
    if measures and not can_judge(result):
        raise UserError(
            f"the run ends before its first step, because the teacher {verdict(result)}: try another "
            "--teacher-prompt (scripts/doctor.py --calibrate compares them) or a larger model, or go on all the "
            "same with --no-calibrate"
        )
    print(f"calibration: the teacher {verdict(result)} (details: scripts/doctor.py --calibrate)")
    return {"calibration": result | {"verdict": verdict(result)}}


def known_texts(corpus: Sequence[str]) -> list[KnownStory]:
    """The texts of known quality by which a teacher is calibrated before a run, and by which its
    answers are scaled. corpus: the student's corpus."""
    has_dull_text = not set(NO_STORIES).isdisjoint(corpus)
    kinds = (*CHEAP_KINDS, DULL) if has_dull_text else CHEAP_KINDS
    return known_stories(corpus_documents(corpus), CHEAP, kinds)


def announce(title: str, grader: Grader, known: Sequence[KnownStory]) -> None:
    """Print the forecast of the cost of grading the texts, unless this costs nothing."""
    forecast = grader.forecast(len(known), known[0].opening)
    if forecast:
        print(f"{title}: {forecast}", flush=True)


def needs_scale(teacher: Teacher) -> bool:
    """Whether a model's answers need a scale. A human's time is too expensive for one."""
    return teacher.options.protocol.has_scale and teacher.model != HUMAN


def fit_scale(grader: Grader, known: Sequence[KnownStory]) -> None:
    """Fit the scale of a teacher's protocol to known texts. Does nothing for other graders. The
    replies are cached, so grading the same texts later sends no request."""
    if isinstance(grader, Teacher) and needs_scale(grader):
        grades = grade_known(grader, [(story.opening, story.story) for story in known])
        grader.options.protocol = grader.options.protocol.fitted(grades)


def grade_known(grader: Grader, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
    """Grades of (opening, story) pairs. Raises NoScores if the first FIRST_TEXTS of them get no
    score, because then each further text would cost as many requests for nothing."""
    grades = grader.grade_each(pairs[:FIRST_TEXTS])
    if all(grade.score is None for grade in grades):
        replies = dict.fromkeys(repr((grade.reply or grade.error or "")[:80]) for grade in grades)
        role = grader.options.role if isinstance(grader, Teacher) else "teacher"
        raise NoScores(
            f"the {role} gave no score for the first {len(grades)} of {len(pairs)} texts, but "
            f"{'; '.join(replies)}: choose another --{role}-prompt or another model"
        )
    return grades + grader.grade_each(pairs[FIRST_TEXTS:])


def of_grader(grader: Grader) -> GradeKnown:
    """The function for `calibrate` that grades with this grader."""
    return lambda pairs: [grade.score for grade in grade_known(grader, pairs)]
