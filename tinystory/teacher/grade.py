"""The grade of a story, the interface of graders, and statistics of a step's grades."""

import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tinystory.run.errors import Stop, UserError
from tinystory.run.text import is_blank
from tinystory.teacher.prompt import CRITERIA, TOP, Question


@dataclass(frozen=True)
class Grade:
    """The outcome of grading one story."""

    # 0..3 per criterion; None if no reply could be read, or if a callable graded the story
    scores: Mapping[str, float] | None
    # 0..1, the basis of the reward: weighted mean of `scores`, divided by TOP; None if unscored
    score: float | None
    reply: str = ""  # the last reply to each request, at most LONGEST_REPLY characters
    attempts: int = 0  # replies received, those that could not be read included
    # whitespace-separated words of all replies, at most max_tokens each: input of the student
    reply_words: int = 0
    asked: bool = False  # whether a request was made; False if all replies came from the cache
    error: str | None = None  # why there is no score
    log_odds: Mapping[str, float] | None = None  # of yes, per question, if questions were asked


NOT_ASKED = Grade(None, None, error="the teacher was not asked")


class Grader:
    """Interface of graders; by default one costs nothing and writes no words. facts: recorded in
    config.json."""

    def __init__(self, facts: dict[str, Any]):
        self.facts = facts
        # not yet collected; with the grade to come, if it was asked for at once
        self.sent: dict[Question, Future[Grade] | None] = {}

    @property
    def most_words(self) -> int:
        """Upper bound on the words in the replies to one story."""
        return 0

    def affords(self, stories: int) -> bool:
        """Whether the budget suffices for grading `stories` more, however many attempts they
        take."""
        return True

    def forecast(self, stories: int, opening: str) -> str:
        """One sentence on the cost of grading `stories`; empty if there is none."""
        return ""

    def stats(self) -> dict[str, Any]:
        """Metrics since the last call."""
        return {}

    def send(self, index: int, opening: str, story: str, tokens: Sequence[int] = ()) -> None:
        """Hand over a story as soon as it ends. tokens: the story as the student's tokens."""
        question = Question(opening, story, index, tuple(tokens))
        self.sent[question] = self.submit(question)

    def submit(self, question: Question) -> Future[Grade] | None:
        """Have a story graded at once; None: it waits until all stories are there."""
        return None

    def collect(self, stop: Stop) -> list[Grade]:
        """Grades of all stories sent, by index. Raises Interrupted on `stop`, UserError if every
        story would fail."""
        questions = sorted(self.sent, key=lambda question: question.number)
        grades = self.grades(questions, stop)
        self.sent.clear()
        return grades

    def grade(self, opening: str, stories: Sequence[str]) -> list[Grade]:
        """Grades of stories that share an opening, in order."""
        return self.grade_each([(opening, story) for story in stories])

    def grade_each(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grades of (opening, story) pairs, in order."""
        return self.grades([Question(*pair, index) for index, pair in enumerate(pairs)])

    def grades(self, questions: Sequence[Question], stop: Stop | None = None) -> list[Grade]:
        """Grades of the questions, in order; an empty story's score is 0. Raises as `collect`
        does."""
        raise NotImplementedError


class LocalGrader(Grader):
    """A grader whose scores are computed on this machine."""

    def scores(self, questions: Sequence[Question]) -> Sequence[float | None]:
        """A score per question, 0..1, or None; of stories that are not empty."""
        raise NotImplementedError

    def grades(self, questions: Sequence[Question], stop: Stop | None = None) -> list[Grade]:
        grades = [Grade(None, 0.0)] * len(questions)
        rows = [row for row, question in enumerate(questions) if not is_blank(question.story)]
        if not rows:
            return grades
        scores = self.scores([questions[row] for row in rows])
        for row, score in zip(rows, scores, strict=True):
            if score is None:
                grades[row] = Grade(None, None, error=f"{self.facts['scored_by']} gave None")
            else:
                grades[row] = Grade(None, score)
        return grades


def too_few_scores(grades: Sequence[Grade], max_unscored: float) -> bool:
    """Whether more than a fraction `max_unscored` of the grades has no score."""
    return sum(grade.score is None for grade in grades) > max_unscored * len(grades)


def require_scores(grades: list[Grade], max_unscored: float) -> None:
    """Raises UserError if a step's stories have `too_few_scores`."""
    if not too_few_scores(grades, max_unscored):
        return
    unscored = [grade for grade in grades if grade.score is None]
    replies = [repr((grade.reply or grade.error or "")[:160]) for grade in unscored]
    distinct = list(dict.fromkeys(replies))
    raise UserError(
        f"{len(unscored)} of {len(grades)} stories got no score, more than --max-unscored {max_unscored:g} allows; "
        "all earlier steps are saved, so fix the teacher and go on with --resume "
        f"(it said {'; '.join(distinct[:4])})"
    )


def highest_score(criteria: Collection[str] | None) -> int:
    """The highest score as it is shown: TOP per criterion, 9 with the paper's three, as it plots
    them; 1 without criteria, from a callable."""
    return TOP * len(criteria) if criteria else 1


def shown_scores(grades: Sequence[Grade]) -> list[float]:
    """The scores of the grades that have one, from 0 to `highest_score`: the sum of the criteria's,
    in which each has its weight over their mean weight."""
    return [
        grade.score * highest_score(grade.scores) for grade in grades if grade.score is not None
    ]


def score_means(grades: list[Grade]) -> dict[str, float | None]:
    """score_mean, the mean of `shown_scores`; its standard deviation score_std; score_mode, the
    fraction of scored stories with the commonest score (both None for one story); and NAME_mean of
    each criterion, None for those of the paper's three that are not graded."""
    columns: dict[str, list[float]] = {f"{name}_mean": [] for name in CRITERIA}
    for grade in grades:
        for name, score in (grade.scores or {}).items():
            columns.setdefault(f"{name}_mean", []).append(score)
    shown = shown_scores(grades)
    columns["score_mean"] = shown

    means = {name: statistics.fmean(column) if column else None for name, column in columns.items()}
    if len(shown) < 2:
        return means | {"score_std": None, "score_mode": None}
    most_common = max(Counter(shown).values())
    return means | {"score_std": statistics.stdev(shown), "score_mode": most_common / len(shown)}
