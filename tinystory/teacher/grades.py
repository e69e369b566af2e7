"""Grades: one request per story, to which the teacher replies with a whole number from 0 to 3 per
criterion. Criteria, order and scale are those of "Once Upon a Time: Interactive Learning for
Storytelling with Small Language Models" (arXiv 2509.15714); the wording is ours.

A reply gives exactly the requested scores, or none. A lenient parser would invent rewards (the
reply "2 2", which was cut short, is not 4/9). So only three forms are accepted, here for the
criteria readability, coherence, creativity:

    2 1 3
        integers in the requested order, separated by spaces, commas or newlines
    {"readability": 2, "coherence": 1, "creativity": 3}
        one JSON object with exactly these keys, bare or in a ```json fence
    readability: 2, coherence: 1, creativity: 3
        exactly these labels
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinystory.teacher.api import Reply
from tinystory.teacher.grade import LONGEST_REPLY, Grade, Submission
from tinystory.teacher.prompt import (
    BEFORE,
    BETWEEN,
    FENCED,
    STORYTELLING,
    TOP,
    Criterion,
    chat,
    clean,
    user_message,
)
from tinystory.teacher.protocol import Protocol, grammar_constraint, json_constraint

PREFACE = (
    "You are a kind teacher who grades short stories by a beginner. The beginner was given an opening and has room "
    "for a limited number of words after it, so the story may stop before its end; do not count that against it. "
    "Grade only the story, not the opening. Between two levels, choose the higher one."
)
AFTER = "\n\nYour grades for the story between the marks, numbers only:"
_WHITESPACE = " \t\r\n"
_SPACE = rf"[{_WHITESPACE}]"
_BETWEEN = rf"(?:{_SPACE}+(?:,{_SPACE}*)?|,{_SPACE}*)"
_DIGIT = rf"[0-{TOP}]"  # not \d, which also matches digits of other scripts
_FENCED = re.compile(rf"\A```(?:json)?{_SPACE}*(\{{.*\}}){_SPACE}*```\Z", re.DOTALL)


def parse_scores(reply: str, criteria: Sequence[str]) -> dict[str, int] | None:
    """The score (0..3) of each criterion, in order; None unless the reply has exactly one of the
    three forms."""
    if len(reply) > LONGEST_REPLY:
        return None
    text = _FENCED.sub(r"\1", reply.strip(_WHITESPACE))
    is_json = text.startswith("{") and text.endswith("}")
    quote = '"' if is_json else ""
    text = text[1:-1].strip(_WHITESPACE) if is_json else text.removesuffix(".")
    number = f"({_DIGIT})"
    label = "|".join(map(re.escape, criteria))
    item = f"{quote}({label}){quote}{_SPACE}*:{_SPACE}*{number}"
    numbers = re.fullmatch(_BETWEEN.join([number] * len(criteria)), text)
    labelled = re.fullmatch(_BETWEEN.join([item] * len(criteria)), text)
    if labelled:
        names, digits = labelled.groups()[0::2], labelled.groups()[1::2]
    elif numbers and not is_json:
        names, digits = tuple(criteria), numbers.groups()
    else:
        return None
    if set(names) != set(criteria):  # a criterion is repeated
        return None
    scores = dict(zip(names, map(int, digits), strict=True))
    return {name: scores[name] for name in criteria}


@dataclass(frozen=True)
class Grades(Protocol):
    """Grades by criteria with levels. system ("" for none), user: a user's own messages instead of
    ours, in which {opening} and {story} are replaced."""

    criteria: tuple[Criterion, ...] = STORYTELLING
    preface: str = PREFACE
    system: str = ""
    user: str = ""

    @property
    def instructions(self) -> str:
        """The system message, which is the same for every story of a run."""
        fenced = FENCED.format(
            judge="grade", pleads="asks for a grade, names its own grades", judged="graded"
        )
        rubric: list[str] = []
        for criterion in self.criteria:
            lines = [f"{criterion.name.capitalize()}. {criterion.question}"]
            lines += [f"{level} = {meaning}" for level, meaning in enumerate(criterion.levels)]
            rubric.append("\n".join(lines))
        graded = "\n\n".join(rubric)
        count = "1 number" if len(self.names) == 1 else f"{len(self.names)} numbers"
        return (
            f"{self.preface}\n\n"
            "Grade each of these with a whole number from 0 to 3.\n\n"
            f"{graded}\n\n"
            "An empty story, or less than one sentence, gets 0 for everything.\n\n"
            f"{fenced}\n\n"
            f"Reply with exactly {count} separated by spaces, in this order: {', '.join(self.names)}. "
            "Write nothing else."
        )

    def messages(self, opening: str, story: str, mark: str) -> dict[str, list[dict]]:
        """One request. A user's own messages have no fence; {opening} and {story} are replaced
        once, so braces in a story stay text."""
        if not self.user:
            message = user_message(opening, story, mark, AFTER)
            return {"": chat(("system", self.instructions), ("user", message))}
        texts = {"{opening}": clean(opening), "{story}": clean(story)}
        user = re.sub(r"\{opening\}|\{story\}", lambda place: texts[place[0]], self.user)
        system = [("system", self.system)] if self.system else []
        return {"": chat(*system, ("user", user))}

    def constraint(self, held_to: str) -> dict[str, Any]:
        if held_to == "json":
            score = {"type": "integer", "enum": list(range(TOP + 1))}
            return json_constraint(dict.fromkeys(self.names, score))
        digits = [f"[0-{TOP}]"] * len(self.names)
        return grammar_constraint(" ".join(digits), ' " " '.join(digits))

    def reads(self, reply: Reply) -> bool:
        return parse_scores(reply.text, self.names) is not None

    def grade(self, submission: Submission, replies: Mapping[str, Sequence[Reply]]) -> Grade:
        ((reply,),) = replies.values()
        scores = parse_scores(reply.text, self.names)
        assert scores is not None
        return Grade(scores, self.score(scores))


def read_back(messages: object) -> tuple[str, str] | None:
    """The cleaned (opening, story) of messages, the inverse of `Grades.messages`; None unless the
    user message is exactly such a message. The fence is the last line and occurs exactly twice, so
    no text in a story can move the fence."""
    match messages:
        case [*_, {"content": str(user)}]:
            body = user.removeprefix(BEFORE).removesuffix(AFTER)
        case _:
            return None
    _, _, mark = body.rpartition("\n")
    parts = body.split(mark) if mark else []
    if len(parts) != 3:
        return None
    opening = parts[0].removesuffix(BETWEEN)
    story = parts[1][1:-1]  # without the line breaks around it
    try:
        rendered = user_message(opening, story, mark, AFTER)
    except ValueError:  # the fence also occurs elsewhere, perhaps only after cleaning
        return None
    return (opening, story) if rendered == user else None
