"""Parse scores from a teacher's reply: exactly those asked for, or none. A lenient parser invents
rewards ("2 2", cut short, is not 4/9), so three forms are accepted, here for the criteria
readability, coherence, creativity:

    2 1 3                                           integers in the order asked, separated by
    spaces, commas or newlines {"readability": 2, "coherence": 1, ...}         one JSON object with
    exactly these keys, bare or in a ```json fence readability: 2, coherence: 1, creativity: 3
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

_SPACE = r"[ \t\r\n]"
_BETWEEN = rf"(?:{_SPACE}+(?:,{_SPACE}*)?|,{_SPACE}*)"
_DIGIT = rf"[0-{TOP}]"  # not \d, which matches the digits of other scripts too
_FENCED = re.compile(rf"```(?:json)?{_SPACE}*(\{{.*\}}){_SPACE}*```", re.DOTALL)


def parse_scores(reply: str, criteria: Sequence[str]) -> dict[str, int] | None:
    """Score (0..3) of each criterion, in order; None if the reply has none of the three forms
    exactly."""
    if len(reply) > LONGEST_REPLY:
        return None
    text = reply.strip(" \t\r\n")
    numbers, labelled = _patterns(tuple(criteria))
    items: list[tuple[str, object]]
    if match := numbers.fullmatch(text):
        items = list(zip(criteria, map(int, match.groups()), strict=True))
    elif match := labelled.fullmatch(text):
        items = list(zip(match.groups()[0::2], map(int, match.groups()[1::2]), strict=True))
    else:
        items = _json_items(text)
    # True is no score
    scores = {name: value for name, value in items if type(value) is int and 0 <= value <= TOP}
    if len(items) != len(criteria) or scores.keys() != set(criteria):
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
    expected = {}
    for name, position in _digit_positions(reply, criteria).items():
        token, candidates = tokens[bisect.bisect_right(token_starts, start + position) - 1]
        probabilities = [0.0] * (TOP + 1)
        for candidate, logprob in candidates.items():
            if re.fullmatch(_DIGIT, candidate.strip()):  # " 2" is 2
                probabilities[int(candidate)] += math.exp(logprob)
        if token.strip() != reply[position] or not any(probabilities):
            return None
        expected[name] = round(
            sum(score * p for score, p in enumerate(probabilities)) / sum(probabilities), 4
        )
    return expected if len(expected) == len(criteria) else None


def _digit_positions(reply: str, criteria: Sequence[str]) -> dict[str, int]:
    """Index of each criterion's digit in a reply that holds scores."""
    if numbers := _patterns(tuple(criteria))[0].fullmatch(reply.strip(" \t\r\n")):
        stripped = len(reply) - len(reply.lstrip(" \t\r\n"))
        return {name: stripped + numbers.start(i) for i, name in enumerate(criteria, start=1)}
    matches = (
        (name, re.search(rf'\b{name}"?{_SPACE}*:{_SPACE}*({_DIGIT})', reply)) for name in criteria
    )
    # a key may be written with \u escapes
    return {name: match.start(1) for name, match in matches if match}


@functools.cache
def _patterns(criteria: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern]:
    numbers = _BETWEEN.join([f"({_DIGIT})"] * len(criteria))
    label = "|".join(map(re.escape, criteria))
    labelled = _BETWEEN.join([rf"({label}){_SPACE}*:{_SPACE}*({_DIGIT})"] * len(criteria))
    return re.compile(numbers + r"\.?"), re.compile(labelled + r"\.?")


def _json_items(text: str) -> list[tuple[str, object]]:
    """The (key, value) pairs of a flat JSON object, repeated keys included; [] for any other
    text."""
    if match := _FENCED.fullmatch(text):
        text = match[1]
    if not text.startswith("{") or text.count("{") != 1:
        return []
    try:
        return json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):  # not JSON, or JSON nested too deeply
        return []
