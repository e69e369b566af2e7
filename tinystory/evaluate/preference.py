"""Blind comparison of two stories to one opening: before and after interaction, or by any two storytellers.

A human sees the two in random order. A language model sees each pair in both orders, since many prefer whatever comes
first (or last): a story wins only if it is preferred in both orders, and otherwise the pair is a tie.
"""

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tinystory.evaluate.intervals import wilson
from tinystory.evaluate.samples import Sample
from tinystory.run.errors import UserError
from tinystory.run.folder import PREFERENCES, SAMPLES, read_records
from tinystory.run.journal import Journal
from tinystory.teacher.prompt import Criterion, Template

FIRST, SECOND, SAME = "first", "second", "same"


class Pair(NamedTuple):
    """Two stories to one opening; `second` is the one expected to be better."""

    key: str
    opening: str
    first: str
    second: str


class Choice(NamedTuple):
    better: str  # FIRST, SECOND or SAME
    inconsistent: bool = False  # whether it is SAME because the two orders were judged differently


def pair_of(opening: str, first: str, second: str) -> Pair:
    return Pair(hashlib.sha256(json.dumps([opening, first, second]).encode()).hexdigest()[:24], opening, first, second)


def compared_pairs(paths: Sequence[Path], read: Callable[[Path], Sequence[Sample]]) -> list[Pair]:
    """The pairs of one run, or of two storytellers, whose stories `read` returns. Raises UserError if there are
    none."""
    pairs = run_pairs(*paths) if len(paths) == 1 else story_pairs(*map(read, paths)) if len(paths) == 2 else []
    if pairs:
        return pairs
    raise UserError("--compare takes a finished interaction, or two that tell different stories to the same openings")


def run_pairs(run: Path) -> list[Pair]:
    """The stories to a run's held-out openings before interaction (first) and after it (second)."""
    stories: dict[str, list[Sample]] = defaultdict(list)
    for record in read_records(Path(run) / SAMPLES):
        stories[record["when"]].append(Sample(record["opening"], record["story"]))
    return story_pairs(stories["before"], stories["after"])


def story_pairs(first: Sequence[Sample], second: Sequence[Sample]) -> list[Pair]:
    """The n-th story to each opening in one list and the n-th to it in the other, where they differ."""
    waiting: dict[str, list[Sample]] = defaultdict(list)
    for story in reversed(second):
        waiting[story.opening].append(story)
    couples = [(story, waiting[story.opening].pop()) for story in first if waiting[story.opening]]
    return [pair_of(a.opening, a.text, b.text) for a, b in couples if a.text != b.text]


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
    """Per judge, the win rate of a run's stories after interaction."""
    return preferences(Path(run) / PREFERENCES, run_pairs(run))


def preferences(path: Path, pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """Per judge in a file of choices, the win rate of the second stories of `pairs`. Judges are humans, and models of
    `evaluate.py --compare`; the last choice of each on a pair counts, unless it is null."""
    keys = {pair.key for pair in pairs}
    by: dict[str, dict[str, Choice | None]] = defaultdict(dict)
    for record in read_records(path):
        if record["key"] in keys:
            choice = Choice(record["choice"], record.get("inconsistent") is True) if record["choice"] else None
            by[record["by"]][record["key"]] = choice
    rates = {judge: win_rate([choice for choice in choices.values() if choice]) for judge, choices in by.items()}
    return {judge: rate for judge, rate in rates.items() if rate["pairs"]}


def keep_choices(run: Path, by: str, pairs: Sequence[Pair], choices: Sequence[Choice | None]) -> None:
    """Append a model's choices between a run's pairs, in place of its earlier ones."""
    with contextlib.closing(Journal(Path(run) / PREFERENCES)) as journal:
        for pair, choice in zip(pairs, choices, strict=True):
            fields = {"choice": choice.better, "inconsistent": choice.inconsistent} if choice else {"choice": None}
            journal.append({**pair._asdict(), **fields, "by": by})


# ---- a language model -----------------------------------------------------------------------------------------------

# A comparison takes the form of a grade, so that the client's strict parsing, retries, cache and fence all serve it:
# the text to grade is two stories, and the score says which is better, and how clearly.
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
    """(opening, text to grade) with the first story above the second, and below it."""
    mark = "-" * 8
    while mark in pair.first + pair.second:  # no story can pretend to be two
        mark += "-" * 8
    first, second = pair.first.strip(), pair.second.strip()
    return (pair.opening, f"{first}\n{mark}\n{second}"), (pair.opening, f"{second}\n{mark}\n{first}")


Grade: TypeAlias = Callable[[Sequence[tuple[str, str]]], Iterable[float | None]]


def compare(pairs: Sequence[Pair], grade: Grade) -> dict[str, Any]:
    """The win rate of the second stories, from each pair in both orders; "unscored" pairs, which are left out;
    "second_place", the fraction of grades for the story that came second (0.5 without position bias); and "choices",
    one or None per pair. grade: per text to grade, the preference 0..1 for the story that comes second, or None."""
    grades = list(grade([text for pair in pairs for text in both_orders(pair)]))
    scored = [preference for preference in grades if preference is not None]
    second_place = sum(preference > 0.5 for preference in scored) / len(scored) if scored else None
    result = _result(grades, lambda straight, turned: _choice(straight > 0.5, turned < 0.5))
    return result | {"second_place": second_place}


def compare_scores(pairs: Sequence[Pair], grade: Grade) -> dict[str, Any]:
    """The same by a judge that scores each story by itself, so that none comes second: the higher score wins, and equal
    ones are a tie. grade: per (opening, story) its score, or None."""
    scores = list(grade([(pair.opening, story) for pair in pairs for story in (pair.first, pair.second)]))
    result = _result(scores, lambda a, b: Choice(SAME if a == b else SECOND if a < b else FIRST))
    return result | {"second_place": None}


def _result(values: Sequence[float | None], choose: Callable[[float, float], Choice]) -> dict[str, Any]:
    """values: two per pair."""
    couples = zip(values[::2], values[1::2], strict=True)
    choices = [None if a is None or b is None else choose(a, b) for a, b in couples]
    rates = win_rate([choice for choice in choices if choice])
    return rates | {"unscored": choices.count(None), "choices": choices}


def _choice(straight: bool, turned: bool) -> Choice:
    """From whether the second story was preferred where it stood below, and where it stood above."""
    if straight == turned:
        return Choice(SECOND if straight else FIRST)
    return Choice(SAME, inconsistent=True)
