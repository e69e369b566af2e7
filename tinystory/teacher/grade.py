"""The grade of a story, the interface of graders, and statistics of a step's grades."""

import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinystory.run.errors import Stop, UserError
from tinystory.run.text import is_blank
from tinystory.teacher.prompt import CRITERIA, Question


@dataclass(frozen=True)
class Grade:
    """The outcome of grading one story."""

    # 0..3 per criterion: integers, or expected values from log-probabilities. None if no reply
    # could be read, or if a callable graded the story.
    scores: Mapping[str, float] | None
    # 0..1, the basis of the reward: weighted mean of `scores`, divided by TOP; None if unscored
    score: float | None
    reply: str = ""  # the last reply, at most LONGEST_REPLY characters
    attempts: int = 0  # replies received; more than one if the first could not be read
    # whitespace-separated words of all replies, at most max_tokens each: input of the student
    reply_words: int = 0
    asked: bool = False  # whether a request was made; False if all replies came from the cache
    error: str | None = None  # why there is no score


class Grader(ABC):
    """Interface of graders; by default one costs nothing and writes no words. facts: recorded in
    config.json."""

    def __init__(self, facts: dict[str, Any]):
        self.facts = facts
        self.pending: dict[int, Question] = {}  # sent but not yet collected, by index
        # scores one story per request: for evaluations, and for the cost of a story
        self.scorer: Grader = self

    @property
    def most_words(self) -> int:
        """Upper bound on the words in the replies to one story."""
        return 0

    def affords(self, stories: int) -> bool:
        """Whether the budget suffices for grading `stories` more, however many attempts they
        take."""
        return True

    def forecast(self, stories: int, opening: str, together: int = 1) -> str:
        """One sentence on the cost of grading `stories`, `together` in each request; empty if there
        is none."""
        return ""

    def stats(self) -> dict[str, Any]:
        """Metrics since the last call."""
        return {}

    def send(self, index: int, opening: str, story: str, tokens: Sequence[int] = ()) -> None:
        """Hand over a story as soon as it ends. tokens: of which the student made it."""
        self.pending[index] = Question(opening, story, index, tokens=tuple(tokens))

    def collect(self, stop: Stop) -> list[Grade]:
        """Grades of all stories sent, by index. Raises Interrupted on `stop`, UserError if every
        story would fail."""
        questions, self.pending = [question for _, question in sorted(self.pending.items())], {}
        return self.grades(questions, stop)

    def grade(self, opening: str, stories: Sequence[str]) -> list[Grade]:
        """Grades of stories that share an opening, in order."""
        return self.grade_each([(opening, story) for story in stories])

    def grade_each(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grades of (opening, story) pairs, in order."""
        return self.grades([Question(*pair, index) for index, pair in enumerate(pairs)])

    @abstractmethod
    def grades(self, questions: Sequence[Question], stop: Stop | None = None) -> list[Grade]:
        """Grades of the questions, in order; an empty story's score is 0. Raises as `collect`
        does."""


class LocalGrader(Grader):
    """A grader whose scores are computed on this machine."""

    @abstractmethod
    def scores(self, questions: Sequence[Question]) -> Sequence[float | None]:
        """A score per question, 0..1, or None; of stories that are not empty."""

    def grades(self, questions: Sequence[Question], stop: Stop | None = None) -> list[Grade]:
        grades = [Grade(None, 0.0)] * len(questions)
        rows = [row for row, question in enumerate(questions) if not is_blank(question.story)]
        if not rows:
            return grades
        scores = self.scores([questions[row] for row in rows])
        unscored = f"{self.facts['scored_by']} gave None"
        for row, score in zip(rows, scores, strict=True):
            grades[row] = Grade(None, score, error=unscored if score is None else None)
        return grades


def too_few_scores(grades: Sequence[Grade], max_unscored: float) -> bool:
    return sum(grade.score is None for grade in grades) > max_unscored * len(grades)


def require_scores(grades: list[Grade], max_unscored: float) -> None:
    """Raises UserError if more than a fraction `max_unscored` of a step's stories has no score."""
    if too_few_scores(grades, max_unscored):
        unscored = [grade for grade in grades if grade.score is None]
        distinct = dict.fromkeys(
            repr((grade.reply or grade.error or "")[:160]) for grade in unscored
        )
        replies = "; ".join([*distinct][:4])
        raise UserError(
            f"{len(unscored)} of {len(grades)} stories got no score, more than --max-unscored {max_unscored:g} allows; "
            f"all earlier steps are saved, so fix the teacher and go on with --resume (it said {replies})"
        )


def score_means(grades: list[Grade]) -> dict[str, float | None]:
    """score_mean, the sum of the criteria's scores, 0..9, as the paper plots it (0..1 from a
    callable); its standard deviation score_std; score_mode, the fraction of scored stories with the
    commonest score (both None for one story); and NAME_mean of each criterion, None for those of
    the paper's three that are not graded."""
    scored = [grade for grade in grades if grade.score is not None]
    names = dict.fromkeys([*CRITERIA, *(name for grade in scored for name in grade.scores or ())])
    values = {
        f"{name}_mean": [g.scores[name] for g in scored if g.scores and name in g.scores]
        for name in names
    }
    sums = [sum(g.scores.values()) if g.scores else g.score for g in grades if g.score is not None]
    values["score_mean"] = sums
    means = {name: sum(column) / len(column) if column else None for name, column in values.items()}
    std, mode = (
        (statistics.stdev(sums), max(Counter(sums).values()) / len(sums))
        if len(sums) > 1
        else (None, None)
    )
    return means | {"score_std": std, "score_mode": mode}
