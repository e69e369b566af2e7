"""The protocols that --teacher-prompt knows by name, and the protocol of a user's JSON file."""

import contextlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinystory.run.errors import UserError
from tinystory.run.files import read_text
from tinystory.teacher.answers import EDITOR, YesNo
from tinystory.teacher.grades import PREFACE, Grades
from tinystory.teacher.prompt import TOP, Criterion, clean
from tinystory.teacher.protocol import Protocol

LARGEST_WEIGHT = 1e6  # maximum weight of a criterion, so that no sum of weights overflows
# Pattern of a criterion's name. The excluded names are those of other metrics NAME_mean.
NAME = re.compile("(?!(reward|score|length|tokens|diversity|held_out_.*)$)[a-z][a-z0-9_]{0,31}")
SENSE = Criterion(
    "sense",
    "Does this story make sense from beginning to end, with each sentence following from the ones before?",
)
THREAD = Criterion(
    "thread", "Is this story about the same people and the same event from beginning to end?"
)
EVENT = Criterion(
    "event", "Does something unexpected happen in this story, and does it come to an end?"
)
# scripts/doctor.py --calibrate compares them in this order: those that ever judged best come first.
PROTOCOLS: dict[str, Protocol] = {
    "event": YesNo((EVENT,)),
    "examples": YesNo((SENSE,), shows_examples=True),
    "sense": YesNo((SENSE,)),
    "thread": YesNo((THREAD,)),
    "grades": Grades(),
}


def load_protocol(name: str | os.PathLike, option: str = "--teacher-prompt") -> Protocol:
    """The protocol with this name in PROTOCOLS, or the protocol in the JSON file with this name
    (docs/teachers.md); grades for "". Raises UserError if the file is missing or invalid. option:
    the option that named it."""
    if not name:
        return PROTOCOLS["grades"]
    if name in PROTOCOLS:
        return PROTOCOLS[str(name)]
    try:
        return _protocol(json.loads(read_text(Path(name))))
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(
            f"{option} {name} is neither one of {', '.join(PROTOCOLS)} nor a valid template file: "
            f"{error}"
        ) from None


def _protocol(value: object) -> Protocol:
    match value:
        case {"user": str(user), **rest} if rest.keys() <= {"system"} and "{story}" in user:
            system = rest.get("system", "")
            # encode() raises ValueError for lone surrogates, which JSON can contain
            if isinstance(system, str) and (system + user).encode():
                return Grades(system=system, user=user)
        case {"criteria": [_, *_] as values, **rest} if rest.keys() <= {"preface", "examples"}:
            criteria = tuple(map(_criterion, values))
            are_graded = {bool(criterion.levels) for criterion in criteria}
            is_graded = are_graded == {True}
            preface: Any = rest.get("preface", PREFACE if is_graded else EDITOR)
            shows_examples: Any = rest.get("examples", False)
            has_names = len({criterion.name for criterion in criteria}) == len(criteria)
            if _is_plain(preface) and has_names and len(are_graded) == 1:
                if is_graded and shows_examples is False:
                    return Grades(criteria, preface)
                if not is_graded and isinstance(shows_examples, bool):
                    return YesNo(criteria, preface, shows_examples)
    raise ValueError(
        'a template has "criteria", at least one, with different names, all or none with "levels"; optional are '
        '"preface", which is plain text, and, without levels, "examples": true; or a template has "user" with '
        '{story}, and optionally "system"'
    )


def _criterion(value: Any) -> Criterion:
    with contextlib.suppress(TypeError):
        criterion = Criterion(**value)  # raises TypeError for a missing or unknown field
        levels, weight = criterion.levels, criterion.weight
        has_levels = levels == () or (isinstance(levels, list) and len(levels) == TOP + 1)
        has_good = criterion.good == "yes" or (criterion.good == "no" and not levels)
        has_weight = type(weight) in (int, float) and 0 < weight <= LARGEST_WEIGHT
        has_form = NAME.fullmatch(criterion.name) and has_levels and has_good and has_weight
        if has_form and all(map(_is_plain, [criterion.question, *levels])):
            return replace(criterion, levels=tuple(levels), weight=float(weight))
    raise ValueError(
        f'{_shortened(repr(value))} is not a valid criterion: it must have a "name" (one word of small letters, '
        'digits and _, no metric of metrics.jsonl) and a "question" of plain text; optional are a "weight" above 0, at '
        'most 1e6, and 4 "levels" of plain text, or without levels "good": "no"; nothing else is allowed'
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _is_plain(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip()) and clean(text) == text
