"""Parse scores from a teacher's reply: exactly those asked for, or none. A lenient parser invents
rewards ("2 2", cut short, is not 4/9), so three forms are accepted, here for the criteria
readability, coherence, creativity:

    2 1 3
        integers in the order asked, separated by spaces, commas or newlines
    {"readability": 2, "coherence": 1, "creativity": 3}
        one JSON object with exactly these keys, bare or in a ```json fence
    readability: 2, coherence: 1, creativity: 3
        exactly these labels
"""

import bisect
import functools
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence

from tinystory.teacher.prompt import TOP

LONGEST_REPLY = 1000  # characters; a longer reply is an essay without scores

_WHITESPACE = " \t\r\n"
_SPACE = rf"[{_WHITESPACE}]"
_BETWEEN = rf"(?:{_SPACE}+(?:,{_SPACE}*)?|,{_SPACE}*)"
_DIGIT = rf"[0-{TOP}]"  # not \d, which matches the digits of other scripts too
_FENCED = re.compile(rf"```(?:json)?{_SPACE}*(\{{.*\}}){_SPACE}*```", re.DOTALL)


def parse_scores(reply: str, criteria: Sequence[str]) -> dict[str, int] | None:
    """Score (0..3) of each criterion, in order; None if the reply has none of the three forms
    exactly."""
    if len(reply) > LONGEST_REPLY:
        return None
    text = reply.strip(_WHITESPACE)
    numbers = _numbers(len(criteria)).fullmatch(text)
    labelled = _labelled(tuple(criteria)).fullmatch(text)
    items: list[tuple[str, object]]
    if numbers:
        items = list(zip(criteria, map(int, numbers.groups()), strict=True))
    elif labelled:
        names = labelled.groups()[0::2]
        items = list(zip(names, map(int, labelled.groups()[1::2]), strict=True))
    else:
        items = _json_items(text)
    scores: dict[str, int] = {}
    for name, value in items:
        if type(value) is not int or not 0 <= value <= TOP or name in scores:  # True is no score
            return None
        scores[name] = value
    if scores.keys() != set(criteria):
        return None
    return {name: scores[name] for name in criteria}


def expected_scores(
    reply: str, criteria: Sequence[str], tokens: Sequence[tuple[str, Mapping[str, float]]]
) -> dict[str, float] | None:
    """Expected value of each score: the mean of 0..3, weighted by the normalised probabilities of
    these digits at its position (G-Eval, arXiv 2303.16634, equation 1). tokens: the reply's, each
    with natural log-probabilities of candidates. None if the reply has no scores, the tokens do not
    spell it, or no candidate is a single digit."""
    spelled = "".join(token for token, _ in tokens)
    # The tokens may also hold white space that was stripped, thoughts before the reply, or an
    # end-of-turn token.
    start = spelled.rfind(reply)
    if parse_scores(reply, criteria) is None or start < 0:
        return None
    token_starts = [0, *itertools.accumulate(len(token) for token, _ in tokens)]
    expected: dict[str, float] = {}
    for name in criteria:
        position = _digit_position(reply, criteria, name)
        if position is None:
            return None
        token, candidates = tokens[bisect.bisect_right(token_starts, start + position) - 1]
        if token.strip() != reply[position]:
            return None
        total = 0.0
        weighted = 0.0
        for candidate, logprob in candidates.items():
            if re.fullmatch(_DIGIT, candidate.strip()):  # " 2" is 2
                probability = math.exp(logprob)
                total += probability
                weighted += int(candidate) * probability
        if not total:
            return None
        expected[name] = round(weighted / total, 4)
    return expected


def _digit_position(reply: str, criteria: Sequence[str], name: str) -> int | None:
    """Index of a criterion's digit in a reply that holds scores; None for a key that is written
    with \\u escapes."""
    text = reply.lstrip(_WHITESPACE)
    numbers = _numbers(len(criteria)).fullmatch(text.rstrip(_WHITESPACE))
    if numbers:
        return len(reply) - len(text) + numbers.start(1 + criteria.index(name))
    labelled = re.search(rf'\b{name}"?{_SPACE}*:{_SPACE}*({_DIGIT})', reply)
    return labelled.start(1) if labelled else None


@functools.cache
def _numbers(count: int) -> re.Pattern:
    return re.compile(_BETWEEN.join([f"({_DIGIT})"] * count) + r"\.?")


@functools.cache
def _labelled(criteria: tuple[str, ...]) -> re.Pattern:
    label = "|".join(map(re.escape, criteria))
    item = rf"({label}){_SPACE}*:{_SPACE}*({_DIGIT})"
    return re.compile(_BETWEEN.join([item] * len(criteria)) + r"\.?")


def _json_items(text: str) -> list[tuple[str, object]]:
    """The (key, value) pairs of a flat JSON object, repeated keys included; [] for any other
    text."""
    fenced = _FENCED.fullmatch(text)
    if fenced:
        text = fenced[1]
    if not text.startswith("{") or text.count("{") != 1:
        return []
    try:
        return json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):  # not JSON, or JSON nested too deeply
        return []
