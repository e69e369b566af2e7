"""Blind comparison of two stories to the same opening, before and after interaction or by any two
storytellers.

The judge, a language model or a human, sees each pair in both orders, since many prefer whichever
comes first or last. A story wins if it is preferred in both orders; otherwise the pair is a tie."""

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tinystory.evaluate.intervals import wilson, with_ci
from tinystory.evaluate.stories import Sample, mean_of
from tinystory.run.errors import UserError
from tinystory.run.journal import Journal
from tinystory.run.records import SAMPLES, Fields, read_records
from tinystory.teacher.prompt import load_template

PREFERENCES = "preferences.jsonl"  # in a run's folder: the choices between its stories
_FIELDS: Fields = {
    "opening": (str,),
    "first": (str,),
    "second": (str,),
    "choice": (str, type(None)),
    "by": (str,),
}
BEFORE_AFTER = ("the one before", "the story after interaction")
# Which story is better, or ORDER if the two orders were judged differently (a tie).
FIRST, SECOND, ORDER = "first", "second", "order"
# Keys: whether the lower story is preferred when the second is below, and when the first is below.
# Other pairs: ORDER.
CHOICES: dict[tuple[bool | None, bool | None], str] = {(True, False): SECOND, (False, True): FIRST}
# (opening, text to grade) pairs -> numbers, None without an answer.
GradeTexts: TypeAlias = Callable[[Sequence[tuple[str, str]]], Iterable[float | None]]


class StoryPair(NamedTuple):
    """Two stories to one opening; `second` is the one expected to be better."""

    opening: str
    first: str
    second: str


def compared_pairs(
    paths: Sequence[Path], read: Callable[[Path], Sequence[Sample]]
) -> list[StoryPair]:
    """The pairs of one run, or of two storytellers, whose stories `read` loads. Raises UserError if
    there are none."""
    pairs = (
        run_pairs(*paths)
        if len(paths) == 1
        else story_pairs(*map(read, paths))
        if len(paths) == 2
        else []
    )
    if pairs:
        return pairs
    raise UserError(
        "lab/compare.py takes a finished interaction, or two that tell different stories to the same openings"
    )


def run_pairs(run: Path) -> list[StoryPair]:
    """A run's stories to its held-out openings, before interaction (first) and after it
    (second)."""
    stories: dict[str, list[Sample]] = defaultdict(list)
    for record in read_records(Path(run) / SAMPLES):
        stories[record["when"]].append(Sample(record["opening"], record["story"]))
    return story_pairs(stories["before"], stories["after"])


def story_pairs(first: Sequence[Sample], second: Sequence[Sample]) -> list[StoryPair]:
    """The n-th story to each opening in the first list with the n-th in the second, where they
    differ."""
    waiting: dict[str, list[Sample]] = defaultdict(list)
    for story in reversed(second):
        waiting[story.opening].append(story)
    couples = [(story, waiting[story.opening].pop()) for story in first if waiting[story.opening]]
    return [StoryPair(a.opening, a.text, b.text) for a, b in couples if a.text != b.text]


def win_rate(choices: Sequence[str | None]) -> dict[str, Any]:
    """{"pairs", "first", "second", "order", "rate", "ci"}: counts, and the fraction of pairs that
    the second story wins, a tie counting one half, with Wilson's interval (None without pairs). A
    choice of None does not count."""
    counts = {name: choices.count(name) for name in (FIRST, SECOND, ORDER)}
    pairs, won = sum(counts.values()), counts[SECOND] + counts[ORDER] / 2
    rate, ci = (won / pairs, list(wilson(won, pairs))) if pairs else (None, None)
    return {"pairs": pairs, **counts, "rate": rate, "ci": ci}


def run_preferences(run: Path) -> dict[str, dict[str, Any]]:
    """Each judge's win rate of a run's stories after interaction, by its latest choices."""
    pairs = set(run_pairs(run))
    by: dict[str, dict[StoryPair, str | None]] = defaultdict(dict)
    for record in read_records(Path(run) / PREFERENCES, _FIELDS):
        if (pair := StoryPair(*(record[name] for name in StoryPair._fields))) in pairs:
            by[record["by"]][pair] = record["choice"]
    rates = {judge: win_rate(list(choices.values())) for judge, choices in by.items()}
    return {judge: rate for judge, rate in rates.items() if rate["pairs"]}


def keep_choices(
    run: Path, by: str, pairs: Sequence[StoryPair], choices: Sequence[str | None]
) -> None:
    """Append a judge's choices between a run's pairs; they replace its earlier ones."""
    with contextlib.closing(Journal(Path(run) / PREFERENCES)) as journal:
        for pair, choice in zip(pairs, choices, strict=True):
            journal.append({**pair._asdict(), "choice": choice, "by": by})


def preference_lines(
    preferences: Mapping[str, Mapping[str, Any]], names: Sequence[str] = BEFORE_AFTER
) -> list[str]:
    """One sentence per judge on its blind comparisons. names: the two storytellers."""
    return [
        f"{judge} preferred {names[1]} in {rates['second']} of {rates['pairs']} pairs, {names[0]} in "
        f"{rates['first']}, and one or the other by their order in {rates['order']}: "
        f"win rate {with_ci(rates['rate'], rates['ci'])}"
        for judge, rates in preferences.items()
    ]


# A comparison is a grade of a text that holds two stories, so that the client's parsing, retries, cache and fence
# all serve it. The score says which story is better, and how clearly. scripts/teach.py asks a person by the same file.
COMPARISON_FILE = Path(__file__).with_name("comparison.json")
COMPARISON = load_template(COMPARISON_FILE)


def both_orders(pair: StoryPair) -> tuple[tuple[str, str], tuple[str, str]]:
    """(opening, text to grade), with the first story above the second and then below it."""
    mark = "-" * 8
    while mark in pair.first + pair.second:  # no story can pretend to be two
        mark += "-" * 8
    first, second = pair.first.strip(), pair.second.strip()
    return (pair.opening, f"{first}\n{mark}\n{second}"), (
        pair.opening,
        f"{second}\n{mark}\n{first}",
    )


def compare(pairs: Sequence[StoryPair], grade: GradeTexts) -> tuple[list[str | None], float | None]:
    """The choice on each pair (None without an answer), judged in both orders, and the fraction of
    answers that prefer the lower story (0.5 without position bias). grade: answers COMPARISON with
    0..1, above 0.5 for the lower story."""
    texts = [text for pair in pairs for text in both_orders(pair)]
    # a human is not to know which story comes first
    shuffled = random.Random(0).sample(texts, len(texts))
    grades = zip(shuffled, grade(shuffled), strict=True)
    lower = {text: None if preference is None else preference > 0.5 for text, preference in grades}
    answers = [(lower[straight], lower[turned]) for straight, turned in map(both_orders, pairs)]
    choices = [None if None in answer else CHOICES.get(answer, ORDER) for answer in answers]
    return choices, mean_of(lower.values())
