"""The grade of a story, the interface of graders, and metrics of a step's grades."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from tinystory.run.errors import Stop, UserError
from tinystory.run.text import is_blank
from tinystory.teacher.prompt import CRITERIA, TOP

if TYPE_CHECKING:
    from tinystory.student.generate import Story

LONGEST_REPLY = 1000  # maximum characters; a longer reply is treated as text without scores
# A story's score, 0..1, or numbers that sum to it, one per word (story.split()) and one for the end;
# None: unscored
Score: TypeAlias = float | tuple[float, ...] | None


class Submission(NamedTuple):
    """A story to be graded. number: index of the story in the run. tokens: the tokens that the
    student sampled; () if only the text is known."""

    opening: str
    story: str
    number: int
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Grade:
    """The outcome of grading one story."""

    # 0..3 per criterion; None if no reply was readable, or if a callable graded the story
    scores: Mapping[str, float] | None
    # 0..1, the basis of the reward: weighted mean of `scores`, divided by TOP; None if unscored
    score: float | None
    # the last replies, one per request, joined, at most LONGEST_REPLY characters
    reply: str = ""
    # Number of whitespace-separated words in all replies, at most max_tokens per reply. These words
    # count as words in.
    reply_words: int = 0
    error: str | None = None  # why there is no score
    # numbers that sum to the score, one per word of the story and one for its end; () for a score of
    # the whole story
    by_word: tuple[float, ...] = ()
    log_odds: Mapping[str, float] | None = None  # log-odds of yes, by question; None for grades


NOT_ASKED = Grade(None, None, error="the teacher was not asked")


class Grader:
    """A grader has three verbs: `send` a story as soon as it ends, `collect` the grades of all
    stories sent, and `grade_each` of some texts. Only rank 0 grades: on other ranks, a plain Grader
    is idle and receives the grades. A class of graders implements `grades` and, if it grades a
    story at once, `submit`. The other default methods are those of a grader without cost and
    without words in the replies. facts: facts about the grader for config.json."""

    steps: float = math.inf  # number of steps of a run for which the grader has scores

    def __init__(self, facts: dict[str, Any]):
        self.facts = facts
        # Submissions that are not yet collected. The value is the future grade, or None if the
        # grader grades all stories together.
        self.sent: dict[Submission, Future[Grade] | None] = {}

    @property
    def most_words(self) -> int:
        """Upper bound on the number of words in all replies about one story."""
        return 0

    def affords(self, stories: int) -> bool:
        """Whether the budget suffices for grading `stories` more stories with the maximum number of
        attempts."""
        return True

    def forecast(self, stories: int, opening: str) -> str:
        """One sentence on the cost of grading `stories` stories; "" if grading costs nothing."""
        return ""

    def stats(self) -> dict[str, Any]:
        """Metrics since the last call."""
        return {}

    def send(self, story: "Story") -> None:
        """Hand over a story as soon as it ends."""
        tokens = tuple(story.tokens.tolist())
        submission = Submission(story.opening, story.text, story.index, tokens)
        self.sent[submission] = self.submit(submission)

    def submit(self, submission: Submission) -> Future[Grade] | None:
        """The future grade of a story, which the grader starts to grade at once; None if the grader
        collects stories and grades them together."""
        return None

    def collect(self, stop: Stop | None = None) -> list[Grade]:
        """Grades of all stories sent, in the order of their indices, on every rank. Raises
        Interrupted on `stop`, and UserError after a failure that would affect every story."""
        submissions = sorted(self.sent, key=lambda submission: submission.number)
        grades = on_every_rank(lambda: self.grades(submissions, stop))
        self.sent.clear()
        return grades

    def grade_each(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grades of (opening, story) pairs, in order, on every rank."""
        submissions = [Submission(*pair, index) for index, pair in enumerate(pairs)]
        return on_every_rank(lambda: self.grades(submissions))

    def grades(self, submissions: Sequence[Submission], stop: Stop | None = None) -> list[Grade]:
        """Grades of the submissions, in order. The score of an empty story is 0. Raises Interrupted
        on `stop`, and UserError after a failure that would affect every story."""
        raise NotImplementedError


def on_every_rank(grade: Callable[[], list[Grade]]) -> list[Grade]:
    """The grades of `grade()`, which runs on rank 0 alone, on every rank."""
    # imported here, because the first lines of scripts/doctor.py do not wait for torch
    from tinystory.run import distributed

    return distributed.rank0_value(grade)


class LocalGrader(Grader):
    """A grader that computes scores on this machine."""

    def scores(self, submissions: Sequence[Submission]) -> Sequence[Score]:
        """One score per submission. No story is empty."""
        raise NotImplementedError

    def grades(self, submissions: Sequence[Submission], stop: Stop | None = None) -> list[Grade]:
        grades = [Grade(None, 0.0)] * len(submissions)
        rows = [row for row, submission in enumerate(submissions) if not is_blank(submission.story)]
        if not rows:
            return grades
        scores = self.scores([submissions[row] for row in rows])
        for row, score in zip(rows, scores, strict=True):
            if score is None:
                grades[row] = Grade(None, None, error=f"{self.facts['scored_by']} returned None")
            elif isinstance(score, tuple):
                grades[row] = Grade(None, total(score), by_word=score)
            else:
                grades[row] = Grade(None, score)
        return grades


def total(by_word: Sequence[float]) -> float:
    """A story's score: the sum of the scores of its words and of its end, rounded to 9 decimals, so that
    no rounding error takes it out of 0..1."""
    return round(math.fsum(by_word), 9)


def too_few_scores(grades: Sequence[Grade], max_unscored: float) -> bool:
    """Whether the fraction of the grades without a score exceeds `max_unscored`."""
    return sum(grade.score is None for grade in grades) > max_unscored * len(grades)


def require_scores(grades: list[Grade], max_unscored: float) -> None:
    """Raises UserError if `too_few_scores` is true for the grades of a step."""
    if not too_few_scores(grades, max_unscored):
        return
    unscored = [grade for grade in grades if grade.score is None]
    replies = [repr((grade.reply or grade.error or "")[:160]) for grade in unscored]
    distinct = list(dict.fromkeys(replies))
    raise UserError(
        f"{len(unscored)} of {len(grades)} stories got no score, more than --max-unscored {max_unscored:g} allows; "
        "all earlier steps are saved: fix the teacher and continue with --resume "
        f"(the teacher said {'; '.join(distinct[:4])})"
    )


def highest_score(criteria: Collection[str] | None) -> int:
    """The highest possible score as shown to users: TOP per criterion, so 9 with the three criteria
    of the paper, which also plots scores in this way; 1 for a callable, which has no criteria."""
    return TOP * len(criteria) if criteria else 1


def shown_scores(grades: Sequence[Grade]) -> list[float]:
    """The scores as shown to users, from 0 to `highest_score`, of all grades with a score. A shown
    score is the sum of the scores of the criteria, each multiplied by the weight of the criterion
    divided by the mean weight."""
    return [
        grade.score * highest_score(grade.scores) for grade in grades if grade.score is not None
    ]


def score_means(grades: list[Grade]) -> dict[str, float | None]:
    """Metrics of grades. score_mean, score_std: mean and standard deviation of `shown_scores`.
    score_mode: fraction of the scored stories with the most frequent score. NAME_mean: mean score
    of each criterion; None for a criterion of the paper that is not graded. score_std and
    score_mode are None for fewer than two scores."""
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
