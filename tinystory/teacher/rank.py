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
    names = [f"story_{i}" for i in range(1, count + 1)]
    levels = (
        "among the worst of them",
        "below their middle",
        "above their middle",
        "among the best of them",
    )
    listed = " ".join(
        f"{c.name.capitalize()} (weight {c.weight:g}): {c.question}" for c in template.criteria
    )
    return Template(
        tuple(
            Criterion(name, f"How does {name} compare with the others?", levels) for name in names
        ),
        f"You compare {count} short stories by beginners. All go on from the same opening, and each may stop before "
        "its end; do not count that against it, nor its place, nor its length. The text to grade holds all of them, "
        f"each below a line of dashes with its name. Compare them by these criteria. {listed}",
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
    sums = [round(sum(table[i][(story - i) % n] for i in range(n)), 6) for story in range(n)]
    return [(sum((a > b) + (a == b) / 2 for b in sums) - 0.5) / (n - 1) for a in sums]


class Ranked(Grader):
    """Ranks groups of `size` consecutive stories, which share an opening; one unreadable reply
    leaves its group unscored. Stories given to `grade_each`, as in evaluations, belong to no group
    and are scored one by one."""

    def __init__(self, teacher: Teacher, size: int):
        super().__init__(teacher.facts)
        self.teacher, self.size, self.template = teacher, size, ranking(teacher.template, size)
        self.scorer = teacher
        # grades by place, a row per request of the last `grades`
        self._rows: list[list[float]] = []

    def forecast(self, stories: int, opening: str, together: int = 1) -> str:
        return self.teacher.forecast(stories, opening, self.size)

    def grade_each(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        return self.teacher.grade_each(pairs)

    def send(self, index: int, opening: str, story: str, tokens: Sequence[int] = ()) -> None:
        """Send a group as soon as its last story ends."""
        super().send(index, opening, story, tokens)
        group = range(index - index % self.size, index - index % self.size + self.size)
        if all(i in self.pending for i in group):
            for question in self._questions([self.pending[i] for i in group]):
                self.teacher.sent[question] = self.teacher.submit(question)

    def _questions(self, group: Sequence[Question]) -> list[Question]:
        """One per rotation of the group: the i-th begins with the i-th story and has its number."""
        turns = [
            joined([each.story for each in (*group[i:], *group[:i])]) for i in range(len(group))
        ]
        return [
            each._replace(story=turn, template=self.template)
            for each, turn in zip(group, turns, strict=True)
        ]

    def grades(self, questions: Sequence[Question], stop: Stop | None = None) -> list[Grade]:
        groups = [questions[i : i + self.size] for i in range(0, len(questions), self.size)]
        replies = self.teacher.grades(
            [each for group in groups for each in self._questions(group)], stop
        )
        grades, self._rows = [replace(reply, score=None, scores=None) for reply in replies], []
        for i in range(0, len(replies), self.size):
            table = [
                [*reply.scores.values()]
                for reply in replies[i : i + self.size]
                if reply.scores is not None
            ]
            if len(table) == self.size:
                self._rows += table
                for place, score in enumerate(ranks(table), start=i):
                    grades[place] = replace(grades[place], score=score)
        for place, question in enumerate(questions):
            if is_blank(question.story):
                grades[place] = replace(grades[place], score=0.0, error=None)
        return grades

    def stats(self) -> dict[str, Any]:
        """The teacher's metrics, and rank_position_bias: the fraction of the grades' variance that
        places explain (0 for a consistent judge, 1 for one that only looks at places)."""
        spread = pvariance([grade for row in self._rows for grade in row]) if self._rows else 0.0
        by_place = (
            pvariance([fmean(column) for column in zip(*self._rows, strict=True)])
            if spread
            else 0.0
        )
        return self.teacher.stats() | {"rank_position_bias": by_place / spread if spread else None}
