"""Reading a teacher's reply: exactly the scores that were asked for, or no score at all.

A reply that is read generously becomes an invented reward ("2 2", cut short, is not 4/9), so three forms are
understood and nothing else is. For the criteria readability, coherence, creativity they are

    2 1 3                                           whole numbers in the order asked, by spaces, commas or newlines
    {"readability": 2, "coherence": 1, ...}         one JSON object with exactly these keys, bare or in a ```json fence
    readability: 2, coherence: 1, creativity: 3     exactly these labels
"""

import functools
import json
import re
from collections.abc import Sequence

TOP = 3  # each criterion is graded 0, 1, 2 or 3
LONGEST_REPLY = 1000  # characters; what is longer is an essay, and costs nothing to refuse

_SPACE = r"[ \t\r\n]"
_BETWEEN = rf"(?:{_SPACE}+(?:,{_SPACE}*)?|,{_SPACE}*)"
_DIGIT = rf"[0-{TOP}]"  # a class, not \d, which also means the digits of other scripts
_FENCED = re.compile(rf"```(?:json)?{_SPACE}*(\{{.*\}}){_SPACE}*```", re.DOTALL)


def parse_scores(reply: str, criteria: Sequence[str]) -> dict[str, int] | None:
    """The scores, 0..3, of the criteria in their order; None where the reply is not exactly one of the three forms."""
    if len(reply) > LONGEST_REPLY:
        return None
    text = reply.strip(" \t\r\n")
    numbers, labelled = _patterns(tuple(criteria))
    if match := numbers.fullmatch(text):
        found = list(zip(criteria, map(int, match.groups()), strict=True))
    elif match := labelled.fullmatch(text):
        names, digits = match.groups()[0::2], match.groups()[1::2]
        found = list(zip(names, map(int, digits), strict=True))
    else:
        found = _json_object(text)
    scores = dict(found)
    if len(found) != len(criteria) or scores.keys() != set(criteria):
        return None
    if not all(type(value) is int and 0 <= value <= TOP for value in scores.values()):  # type: True is an int too
        return None
    return {name: scores[name] for name in criteria}


@functools.cache
def _patterns(criteria: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern]:
    numbers = _BETWEEN.join([f"({_DIGIT})"] * len(criteria))
    label = "|".join(map(re.escape, criteria))
    labelled = _BETWEEN.join([rf"({label}){_SPACE}*:{_SPACE}*({_DIGIT})"] * len(criteria))
    return re.compile(numbers + r"\.?"), re.compile(labelled + r"\.?")


def _json_object(text: str) -> list[tuple[str, object]]:
    """The (key, value) pairs of a flat JSON object, repeated keys kept so that they can be refused; else []."""
    if match := _FENCED.fullmatch(text):
        text = match[1]
    if not text.startswith("{") or text.count("{") != 1:
        return []
    try:
        return json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):  # not JSON; or a thousand brackets, which is not JSON that anyone asked for
        return []
