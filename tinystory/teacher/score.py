"""Reading a teacher's reply: exactly the scores that were asked for, or no score at all.

A reply that is read generously becomes an invented reward ("2 2", cut short, is not 4/9), so three forms are
understood and nothing else is. For the criteria readability, coherence, creativity they are

    2 1 3                                           whole numbers in the order asked, by spaces, commas or newlines
    {"readability": 2, "coherence": 1, ...}         one JSON object with exactly these keys, bare or in a ```json fence
    readability: 2, coherence: 1, creativity: 3     exactly these labels
"""

import bisect
import functools
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence

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


def expected_scores(
    reply: str, criteria: Sequence[str], tokens: Sequence[tuple[str, Mapping[str, float]]]
) -> dict[str, float] | None:
    """The scores that a reply holds, each weighed by the model's own doubt: the mean of 0..3 by the probabilities that
    these digits had in the score's place, made to sum to 1 (G-Eval, arXiv 2303.16634, equation 1); 4 decimals.

    `tokens` are the reply's, each with the natural log-probabilities of what could have stood there. None where the
    reply holds no scores, or the tokens are not its own or have none of the digits by itself.
    """
    scores = parse_scores(reply, criteria)
    said = "".join(token for token, _ in tokens)
    start = said.find(reply)  # a server may strip the reply, or end the tokens with the one that ends the turn
    if scores is None or start < 0:
        return None
    begins = [0, *itertools.accumulate(len(token) for token, _ in tokens)]
    expected = {}
    for name, at in _places(reply, criteria).items():
        token, others = tokens[bisect.bisect_right(begins, start + at) - 1]
        chances = [0.0] * (TOP + 1)
        for other, logprob in others.items():
            if re.fullmatch(_DIGIT, other.strip()):  # " 2" is 2
                chances[int(other)] += math.exp(logprob)
        if token.strip() != reply[at] or not any(chances):
            return None
        expected[name] = round(sum(score * chance for score, chance in enumerate(chances)) / sum(chances), 4)
    return expected if expected.keys() == scores.keys() else None


def _places(reply: str, criteria: Sequence[str]) -> dict[str, int]:
    """Where in a reply that holds scores the digit of each criterion stands."""
    if numbers := _patterns(tuple(criteria))[0].fullmatch(reply.strip(" \t\r\n")):
        before = len(reply) - len(reply.lstrip(" \t\r\n"))
        return {name: before + numbers.start(i) for i, name in enumerate(criteria, start=1)}
    found = ((name, re.search(rf'\b{name}"?{_SPACE}*:{_SPACE}*({_DIGIT})', reply)) for name in criteria)
    return {name: match.start(1) for name, match in found if match}  # a key may be written with \u escapes


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
