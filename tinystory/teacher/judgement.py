"""What came of one story, by the replies that were given to it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tinystory.teacher.prompt import Template, clean
from tinystory.teacher.score import LONGEST_REPLY


@dataclass(frozen=True)
class Judgement:
    """What came of one story."""

    # 0..3 by criterion, whole or, of log-probabilities, expected; None where the teacher gave none that could be read.
    scores: dict[str, float] | None
    score: float | None  # their weighted mean as a share of the greatest, 0..1; None with `scores`
    reply: str  # the last reply, at most LONGEST_REPLY characters
    attempts: int  # replies received; more than one where the first could not be read
    reply_words: int  # their white-space separated words, which count as the student's input; max_tokens at most each
    seconds: float  # from the first request to the last reply, 0 where no request was made
    error: str | None  # why there are no scores


def verdict(
    template: Template,
    scores: dict[str, float] | None,
    replies: Sequence[str],
    max_tokens: int,
    seconds: float,
    error: str | None,
) -> Judgement:
    """The judgement that these replies to one story make, the last of which holds the scores or none does."""
    return Judgement(
        scores,
        None if scores is None else template.score(scores),
        replies[-1][:LONGEST_REPLY] if replies else "",
        len(replies),
        # A word is a token or more. Where a server ignores the cap, what lies beyond it is read by nobody.
        sum(min(len(reply.split()), max_tokens) for reply in replies),
        seconds,
        error,
    )


def nothing_to_grade(template: Template, story: str) -> Judgement | None:
    """All 0, by the rubric, for a story with no text at all, which is not sent; None for any other."""
    if clean(story).strip():
        return None
    return Judgement(dict.fromkeys(template.names, 0), 0.0, "", 0, 0, 0.0, None)
