"""Blind comparison of two stories to the same opening, before and after interaction or by any two
storytellers.

The judge, a language model or a human, sees each pair in both orders, since many prefer whichever
comes first or last. A story wins if it is preferred in both orders; otherwise the pair is a tie."""

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tinystory.evaluate.intervals import mean_of, wilson, with_ci
from tinystory.evaluate.stories import Sample
from tinystory.run.errors import UserError
from tinystory.run.records import SAMPLES, read_records
from tinystory.teacher.prompt import load_template

BEFORE_AFTER = ("the one before", "the story after interaction")
# Which story is better, or ORDER if the two orders were judged differently (a tie).
FIRST, SECOND, ORDER = "first", "second", "order"
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
    pairs: list[StoryPair] = []
    if len(paths) == 1:
        pairs = run_pairs(paths[0])
    elif len(paths) == 2:
        first, second = paths
        pairs = story_pairs(read(first), read(second))
    if not pairs:
        raise UserError(
            "lab/compare.py takes a finished interaction, or two that tell different stories to the same openings"
        )
    return pairs


def run_pairs(run: Path) -> list[StoryPair]:
    """A run's stories to its held-out openings, before interaction (first) and after it
    (second)."""
    stories: dict[str, list[Sample]] = defaultdict(list)
    for record in read_records(run / SAMPLES):
        stories[record["when"]].append(Sample(record["opening"], record["story"]))
    return story_pairs(stories["before"], stories["after"])


def story_pairs(first: Sequence[Sample], second: Sequence[Sample]) -> list[StoryPair]:
    """The n-th story to each opening in the first list with the n-th in the second, where they
    differ."""
    waiting: dict[str, deque[str]] = defaultdict(deque)
    for story in second:
        waiting[story.opening].append(story.text)
    pairs = []
    for story in first:
        if waiting[story.opening]:
            pairs.append(StoryPair(story.opening, story.text, waiting[story.opening].popleft()))
    return [pair for pair in pairs if pair.first != pair.second]


def win_rate(choices: Sequence[str | None]) -> dict[str, Any]:
    """{"pairs", "first", "second", "order", "rate", "ci"}: counts, and the fraction of pairs that
    the second story wins, a tie counting one half, with Wilson's interval (None without pairs). A
    choice of None does not count."""
    counts = {name: choices.count(name) for name in (FIRST, SECOND, ORDER)}
    pairs = sum(counts.values())
    if not pairs:
        return counts | {"pairs": 0, "rate": None, "ci": None}
    won = counts[SECOND] + counts[ORDER] / 2
    return counts | {"pairs": pairs, "rate": won / pairs, "ci": wilson(won, pairs)}


def preference_line(judge: str, rates: Mapping[str, Any], names: Sequence[str]) -> str:
    """One sentence on a blind comparison of two storytellers, these `names`."""
    first, second = names
    return (
        f"{judge} preferred {second} in {rates['second']} of {rates['pairs']} pairs, {first} in {rates['first']}, "
        f"and one or the other by their order in {rates['order']}: win rate {with_ci(rates['rate'], rates['ci'])}"
    )


# A comparison is a grade of a text that holds two stories, so that the client's parsing, retries,
# cache and fence all serve it. The score says which story is better, and how clearly.
# scripts/teach.py asks a person by the same file.
COMPARISON_FILE = Path(__file__).with_name("comparison.json")
COMPARISON = load_template(COMPARISON_FILE)


def both_orders(pair: StoryPair) -> tuple[tuple[str, str], tuple[str, str]]:
    """(opening, text to grade), with the first story above the second and then below it."""
    mark = "-" * 8
    while mark in pair.first + pair.second:  # no story can pretend to be two
        mark += "-" * 8
    first = pair.first.strip()
    second = pair.second.strip()
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
    prefers_lower: dict[tuple[str, str], bool | None] = {}
    for text, preference in zip(shuffled, grade(shuffled), strict=True):
        prefers_lower[text] = None if preference is None else preference > 0.5
    choices = []
    for pair in pairs:
        second_below, first_below = both_orders(pair)
        choices.append(choice(prefers_lower[second_below], prefers_lower[first_below]))
    return choices, mean_of(prefers_lower.values())


def choice(prefers_second: bool | None, prefers_first: bool | None) -> str | None:
    """The choice of a judge that was asked twice: with the second story below, and with the
    first."""
    if prefers_second is None or prefers_first is None:
        return None
    if prefers_second == prefers_first:
        return ORDER
    return SECOND if prefers_second else FIRST
