"""Which of two stories is the better one: before and after interaction, or of two students, judged blindly.

A person sees the two in random order. A language model sees each pair in both orders, since many prefer whatever comes
first (or last): a pair counts for a story only if it is preferred in both, and otherwise as a tie.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tinystory.evaluate.intervals import wilson
from tinystory.run.errors import UserError
from tinystory.run.folder import PREFERENCES, SAMPLES, read_records
from tinystory.run.journal import Journal
from tinystory.teacher.prompt import Criterion, Template

FIRST, SECOND, SAME = "first", "second", "same"


class Pair(NamedTuple):
    """Two stories to one opening: `second` is the one that is hoped to be better."""

    key: str
    opening: str
    first: str
    second: str


class Choice(NamedTuple):
    better: str  # FIRST, SECOND or SAME
    inconsistent: bool = False  # whether it is SAME because the two orders were judged differently


def pair_of(opening: str, first: str, second: str) -> Pair:
    return Pair(hashlib.sha256(json.dumps([opening, first, second]).encode()).hexdigest()[:24], opening, first, second)


def run_pairs(run: Path) -> list[Pair]:
    """The stories to a run's held-out openings before interaction (first) and after it (second).

    Raises UserError if there are none."""
    pairs = _pairs(run)
    if not pairs:
        raise UserError(f"{run} has no stories before and after ({SAMPLES}): give the folder of a finished interaction")
    return pairs


def _pairs(run: Path) -> list[Pair]:
    told: dict[int, dict[str, dict]] = {}
    for record in read_records(Path(run) / SAMPLES):
        told.setdefault(record["index"], {})[record["when"]] = record
    return [
        pair_of(sides["before"]["opening"], sides["before"]["story"], sides["after"]["story"])
        for sides in told.values()
        if sides.keys() == {"before", "after"} and sides["before"]["story"] != sides["after"]["story"]
    ]


def win_rate(choices: Sequence[Choice]) -> dict[str, Any]:
    """{"pairs", "first", "second", "same", "rate", "ci", "inconsistent"}. rate: the fraction of pairs won by the second
    story, where a tie counts one half; its interval is Wilson's. None without pairs."""
    counts = {name: sum(choice.better == name for choice in choices) for name in (FIRST, SECOND, SAME)}
    won, pairs = counts[SECOND] + counts[SAME] / 2, len(choices)
    return {
        "pairs": pairs,
        **counts,
        "rate": won / pairs if pairs else None,
        "ci": list(wilson(won, pairs)) if pairs else None,
        "inconsistent": sum(choice.inconsistent for choice in choices),
    }


def run_preferences(run: Path) -> dict[str, dict[str, Any]]:
    """The win rate of a run's stories after interaction, by who judged them: people, and models of
    `evaluate.py --compare`. A person's last word on a pair counts."""
    keys = {pair.key for pair in _pairs(run)}
    by: dict[str, dict[str, Choice]] = {}
    for record in read_records(Path(run) / PREFERENCES):
        if record["key"] in keys:
            by.setdefault(record["by"], {})
            if record["choice"]:
                choice = Choice(record["choice"], record.get("inconsistent") is True)
                by[record["by"]][record["key"]] = choice
            else:
                by[record["by"]].pop(record["key"], None)
    return {who: win_rate(list(choices.values())) for who, choices in by.items() if choices}


def keep_choices(run: Path, by: str, pairs: Sequence[Pair], choices: Sequence[Choice | None]) -> None:
    """Append what a model says of a run's pairs; it counts in place of what the same model said before."""
    with contextlib.closing(Journal(Path(run) / PREFERENCES)) as journal:
        for pair, choice in zip(pairs, choices, strict=True):
            said = {"choice": choice.better, "inconsistent": choice.inconsistent} if choice else {"choice": None}
            journal.append({**pair._asdict(), **said, "by": by})


# ---- a language model -----------------------------------------------------------------------------------------------

# A comparison is asked as a grade, so that the client's strict parsing, retries, cache and fence all serve it: the text
# between the marks is two stories, and the one number says which is better, and how clearly.
COMPARISON = Template(
    (
        Criterion(
            "preference",
            "Which of the two stories is the better one, as a story that goes on from the opening?",
            (
                "the first story is clearly better",
                "the first story is a little better",
                "the second story is a little better",
                "the second story is clearly better",
            ),
        ),
    ),
    "You compare two short stories by beginners. Both go on from the same opening, and both may stop before their end; "
    "do not count that against them, nor which one comes first, nor which is longer. The text to grade holds both, the "
    "first above a line of dashes and the second below it.",
)


def both_orders(pair: Pair) -> tuple[tuple[str, str], tuple[str, str]]:
    """(opening, text to grade) with the first story above, and with it below."""
    mark = "-" * 8
    while mark in pair.first + pair.second:  # no story can pretend to be two
        mark += "-" * 8
    first, second = pair.first.strip(), pair.second.strip()
    return (pair.opening, f"{first}\n{mark}\n{second}"), (pair.opening, f"{second}\n{mark}\n{first}")


Grade: TypeAlias = Callable[[Sequence[tuple[str, str]]], Iterable[float | None]]


def compare(pairs: Sequence[Pair], grade: Grade) -> dict[str, Any]:
    """Ask about each pair in both orders. grade: for each text to grade, the preference 0..1 for what comes second in
    it, or None. Returns the win rate; "unscored" pairs, which are left out; "second_place", the fraction of answers for
    the story that came second (0.5 without a bias of position); and "choices", one or None per pair."""
    asked = [text for pair in pairs for text in both_orders(pair)]
    answers = list(grade(asked))
    choices: list[Choice | None] = []
    for straight, turned in zip(answers[::2], answers[1::2], strict=True):
        choices.append(None if straight is None or turned is None else _choice(straight > 0.5, turned < 0.5))
    given = [answer for answer in answers if answer is not None]
    return win_rate([choice for choice in choices if choice]) | {
        "unscored": sum(choice is None for choice in choices),
        "second_place": sum(answer > 0.5 for answer in given) / len(given) if given else None,
        "choices": choices,
    }


def _choice(straight: bool, turned: bool) -> Choice:
    """From whether the second story was preferred where it stood below, and where it stood above."""
    if straight == turned:
        return Choice(SECOND if straight else FIRST)
    return Choice(SAME, inconsistent=True)
