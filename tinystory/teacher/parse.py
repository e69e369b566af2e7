"""Parses the scores in a teacher's reply: exactly the requested scores, or none. A lenient parser
would invent rewards (the reply "2 2", which was cut short, is not 4/9). So only three forms are
accepted, here for the criteria readability, coherence, creativity:

    2 1 3
        integers in the requested order, separated by spaces, commas or newlines
    {"readability": 2, "coherence": 1, "creativity": 3}
        one JSON object with exactly these keys, bare or in a ```json fence
    readability: 2, coherence: 1, creativity: 3
        exactly these labels
"""

import json
import re
from collections.abc import Sequence

from tinystory.teacher.prompt import TOP

LONGEST_REPLY = 1000  # maximum characters; a longer reply is treated as text without scores

_WHITESPACE = " \t\r\n"
_SPACE = rf"[{_WHITESPACE}]"
_BETWEEN = rf"(?:{_SPACE}+(?:,{_SPACE}*)?|,{_SPACE}*)"
_DIGIT = rf"[0-{TOP}]"  # not \d, which also matches digits of other scripts
_FENCED = re.compile(rf"```(?:json)?{_SPACE}*(\{{.*\}}){_SPACE}*```", re.DOTALL)


def parse_scores(reply: str, criteria: Sequence[str]) -> dict[str, int] | None:
    """The score (0..3) of each criterion, in order; None unless the reply has exactly one of the
    three forms."""
    if len(reply) > LONGEST_REPLY:
        return None
    text = reply.strip(_WHITESPACE)
    number = f"({_DIGIT})"
    label = "|".join(map(re.escape, criteria))
    item = f"({label}){_SPACE}*:{_SPACE}*{number}"
    numbers = re.fullmatch(_BETWEEN.join([number] * len(criteria)) + r"\.?", text)
    labelled = re.fullmatch(_BETWEEN.join([item] * len(criteria)) + r"\.?", text)
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
        # type(), because isinstance(True, int)
        if type(value) is not int or not 0 <= value <= TOP or name in scores:
            return None
        scores[name] = value
    if scores.keys() != set(criteria):
        return None
    return {name: scores[name] for name in criteria}


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
