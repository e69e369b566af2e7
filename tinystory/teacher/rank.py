"""Relative judge: stories that share an opening are judged together, and their ranks are the scores
(as in RULER of ART). A group of n stories takes n requests, one per rotation of their order, so
each story stands once in each place and a preference for places cancels out. A request has the form
of a grade (text: all stories; criteria: story_1, story_2 ...), so the client's parsing, retries and
cache apply."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, pvariance
from typing import Any

from tinystory.run.errors import Stop
from tinystory.run.text import is_blank
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grade, Grader
from tinystory.teacher.prompt import Criterion, Question, Template, clean


def ranking(template: Template, count: int) -> Template:
    """The template that asks how `count` stories compare with each other by the criteria of
    `template`."""
    levels = (
        "among the worst of them",
        "below their middle",
        "above their middle",
        "among the best of them",
    )
    names = [f"story_{i}" for i in range(1, count + 1)]
    stories = [
        Criterion(name, f"How does {name} compare with the others?", levels) for name in names
    ]
    criteria = [
        f"{criterion.name.capitalize()} (weight {criterion.weight:g}): {criterion.question}"
        for criterion in template.criteria
    ]
    return Template(
        tuple(stories),
        f"You compare {count} short stories by beginners. All go on from the same opening, and each may stop before "
        "its end; do not count that against it, nor its place, nor its length. The text to grade holds all of them, "
        "each below a line of dashes with its name. Compare them by these criteria. "
        f"{' '.join(criteria)}",
    )


def joined(stories: Sequence[str]) -> str:
    """One text to grade with all the stories, each below a heading that occurs in none of them."""
    stories = [clean(story).strip() for story in stories]
    mark = "-" * 8
    while any(mark in story for story in stories):
        mark += "-" * 8
    return "\n".join(f"{mark} story_{i}\n{story}" for i, story in enumerate(stories, start=1))


def ranks(table: Sequence[Sequence[float]]) -> list[float]:
    """Score of each story of a group, 0..1: the fraction of the others that it beats (a tie counts
    1/2). table[i][j]: grade of place j in request i, where story (i + j) mod n stands."""
    n = len(table)
    sums: list[float] = []
    for story in range(n):
        grades = [table[i][(story - i) % n] for i in range(n)]
        sums.append(round(sum(grades), 6))
    scores: list[float] = []
    for own in sums:
        beaten = sum(other < own for other in sums)
        ties = sums.count(own) - 1
        scores.append((beaten + ties / 2) / (n - 1))
    return scores


class Ranked(Grader):
    """Ranks groups of `size` consecutive stories, which share an opening; one unreadable reply
    leaves its group unscored. Stories given to `grade_each`, as in evaluations, belong to no group
    and are scored one by one."""

    def __init__(self, teacher: Teacher, size: int):
        super().__init__(teacher.facts)
        self.teacher = teacher
        self.size = size
        self.template = ranking(teacher.options.template, size)
        self.scorer = teacher
        # grades by place, a row per request of the last `grades`
        self._rows: list[list[int]] = []

    def forecast(self, stories: int, opening: str, together: int = 1) -> str:
        return self.teacher.forecast(stories, opening, self.size)

    def grade_each(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        return self.teacher.grade_each(pairs)

    def send_question(self, question: Question) -> None:
        """Send a group as soon as its last story ends."""
        super().send_question(question)
        number = question.number // self.size
        group = [each for each in self.sent if each.number // self.size == number]
        if len(group) == self.size:
            group.sort(key=lambda each: each.number)
            for rotation in self._rotations(group):
                self.teacher.send_question(rotation)

    def _rotations(self, group: Sequence[Question]) -> list[Question]:
        """The i-th begins with the i-th story of the group and has its number."""
        stories = [question.story for question in group]
        rotations: list[Question] = []
        for i, question in enumerate(group):
            text = joined(stories[i:] + stories[:i])
            rotations.append(question._replace(story=text, template=self.template))
        return rotations

    def grades(self, questions: Sequence[Question], stop: Stop | None = None) -> list[Grade]:
        starts = range(0, len(questions), self.size)
        rotations: list[Question] = []
        for start in starts:
            rotations += self._rotations(questions[start : start + self.size])
        replies = self.teacher.grades(rotations, stop)
        grades = [replace(reply, score=None, scores=None) for reply in replies]
        self._rows = []
        for start in starts:
            group = replies[start : start + self.size]
            table = [list(reply.scores.values()) for reply in group if reply.scores is not None]
            if len(table) < self.size:
                continue
            self._rows += table
            for place, score in enumerate(ranks(table), start):
                grades[place] = replace(grades[place], score=score)
        for place, question in enumerate(questions):
            if is_blank(question.story):
                grades[place] = replace(grades[place], score=0.0, error=None)
        return grades

    def stats(self) -> dict[str, Any]:
        """The teacher's metrics, and rank_position_bias: the fraction of the grades' variance that
        places explain (0 for a consistent judge, 1 for one that only looks at places)."""
        return self.teacher.stats() | {"rank_position_bias": self._position_bias()}

    def _position_bias(self) -> float | None:
        """None if all grades are equal, or there are none."""
        if not self._rows:
            return None
        spread = pvariance([grade for row in self._rows for grade in row])
        if not spread:
            return None
        means = [fmean(column) for column in zip(*self._rows, strict=True)]
        return pvariance(means) / spread
