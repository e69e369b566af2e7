"""The interface of protocols: how a teacher is asked about a story, and how the replies become the
story's grade. Each protocol has a file: grades.py, answers.py. named_protocols.py lists the
protocols that --teacher-prompt knows by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tinystory.teacher.api import Reply
from tinystory.teacher.grade import Grade, Submission
from tinystory.teacher.prompt import TOP, Criterion

JSON_TOKENS = 12  # tokens per criterion: a key, a colon, a value, a comma and some white space


@dataclass(frozen=True)
class Example:
    """A text of known quality, to which the answer is known."""

    opening: str
    story: str
    is_good: bool


@dataclass(frozen=True)
class Protocol:
    """A prompt of a teacher. preface: first sentences of the system message. scale: what
    `fitted` has measured."""

    criteria: tuple[Criterion, ...]
    preface: str
    scale: Mapping[str, Any] = field(default_factory=dict, kw_only=True, repr=False, compare=False)
    # Number of likeliest first tokens to request with log-probabilities. A server that gives them
    # is sent each request once.
    top_logprobs: ClassVar[int] = 0
    draws: ClassVar[int] = 1  # number of replies to each request without log-probabilities
    temperature: ClassVar[float | None] = None  # None: as the user's options say
    has_scale: ClassVar[bool] = False  # whether scores need a scale that `fitted` measures

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(criterion.name for criterion in self.criteria)

    def messages(self, opening: str, story: str, mark: str) -> dict[str, list[dict]]:
        """The chat messages of each request about a story, by the name of the request. Raises
        ValueError if the fence `mark` is not one line or occurs in a text."""
        raise NotImplementedError

    def constraint(self, held_to: str) -> dict[str, Any]:
        """Fields of a request that constrain the reply. held_to: "grammar" or "json"."""
        raise NotImplementedError

    def max_tokens(self, limit: int, held_to: str) -> int:
        """Token limit of a reply. limit: of a reply that is not JSON."""
        if held_to != "json":
            return limit
        return max(limit, JSON_TOKENS * len(self.criteria) + 8)

    def reads(self, reply: Reply) -> bool:
        """Whether the reply is as this protocol demands."""
        raise NotImplementedError

    def is_bare(self, reply: Reply) -> bool:
        """Whether the reply holds nothing but what is read, so that it needs no constraint."""
        return self.reads(reply)

    def grade(self, submission: Submission, replies: Mapping[str, Sequence[Reply]]) -> Grade:
        """The grade of a story. replies: by the name of the request, all readable."""
        raise NotImplementedError

    def fitted(self, grades: Sequence[Grade]) -> "Protocol":
        """This protocol with a scale that is fitted to the grades of known texts, if it needs a
        scale."""
        return self

    def restored(self, recorded: object) -> "Protocol | None":
        """This protocol with the scale that a run's config.json records; None if that is not a
        scale for these criteria."""
        return None

    def with_examples(self, examples: Callable[[], Sequence[Example]]) -> "Protocol":
        """This protocol with texts of the student's corpus, if its messages show any."""
        return self

    def score(self, scores: Mapping[str, float]) -> float:
        """Score of a story, 0..1: the weighted mean of the scores of the criteria, divided by
        TOP."""
        total = sum(criterion.weight * scores[criterion.name] for criterion in self.criteria)
        weights = sum(criterion.weight for criterion in self.criteria)
        return total / (TOP * weights)


def json_constraint(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a request that constrain the reply to a JSON object with these properties."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    form = {"name": "reply", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


def grammar_constraint(regex: str, grammar: str) -> dict[str, Any]:
    """Fields of a request that constrain the reply to a regular expression. vLLM obeys the first
    field, and llama.cpp's server the second. Each ignores the other field."""
    return {"structured_outputs": {"regex": regex}, "grammar": f"root ::= {grammar}"}
