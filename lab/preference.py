"""Blind comparison of two stories for the same opening, from before and after interaction or by any
two students.

The judge, a language model or a human, reads each pair in both orders, because many judges prefer
the first or the last story (position bias). The mean of the two answers decides, from which this
bias cancels; equal answers are a tie."""

import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tinystory.evaluate.intervals import mean_of, wilson, with_ci
from tinystory.evaluate.stories import Sample
from tinystory.run.errors import UserError
from tinystory.run.records import SAMPLES, read_records
from tinystory.teacher.grade import Grader

BEFORE_AFTER = ("the one before", "the story after interaction")
FIRST, SECOND, TIE = "first", "second", "tie"  # the better story
# Function from pairs (opening, text to grade) to numbers, None without an answer.
GradeTexts: TypeAlias = Callable[[Sequence[tuple[str, str]]], Iterable[float | None]]


# A comparison is the grade of a text that holds two stories, so it uses the client's parsing,
# retries, cache and fence. The score says which story is better, and how clearly: in four levels,
# or by the probability of yes.
COMPARISON = Path(__file__).with_name("comparison.json")
PREFERENCE = Path(__file__).with_name("preference.json")


class StoryPair(NamedTuple):
    """Two stories for one opening. `second` is the story that is expected to be better."""

    opening: str
    first: str
    second: str


def compared_pairs(
    paths: Sequence[Path], read: Callable[[Path], Sequence[Sample]]
) -> list[StoryPair]:
    """The pairs of stories of one run (before and after), or of two students or files, loaded by
    `read`. Raises UserError if there are no pairs."""
    pairs: list[StoryPair] = []
    if len(paths) == 1:
        pairs = run_pairs(paths[0])
    elif len(paths) == 2:
        first, second = paths
        pairs = story_pairs(read(first), read(second))
    if not pairs:
        raise UserError(
            "there are no pairs to compare: give lab/compare.py one finished interaction, or two students or files "
            "with different stories for the same openings"
        )
    return pairs


def run_pairs(run: Path) -> list[StoryPair]:
    """Pairs of a run's stories for held-out openings: before interaction (first) and after it
    (second)."""
    stories: dict[str, list[Sample]] = defaultdict(list)
    for record in read_records(run / SAMPLES):
        stories[record["when"]].append(Sample(record["opening"], record["story"]))
    return story_pairs(stories["before"], stories["after"])


def story_pairs(first: Sequence[Sample], second: Sequence[Sample]) -> list[StoryPair]:
    """Pairs of the n-th story for each opening in the first list and the n-th in the second, if the
    two stories differ."""
    waiting: dict[str, deque[str]] = defaultdict(deque)
    for story in second:
        waiting[story.opening].append(story.text)
    pairs = []
    for story in first:
        if waiting[story.opening]:
            pairs.append(StoryPair(story.opening, story.text, waiting[story.opening].popleft()))
    return [pair for pair in pairs if pair.first != pair.second]


def win_rate(choices: Sequence[str | None]) -> dict[str, Any]:
    """{"pairs", "first", "second", "tie", "rate", "ci"}: counts, the fraction of pairs won by the
    second story (a tie counts one half), and Wilson's interval of this fraction (None without
    pairs). A choice of None does not count."""
    counts = {name: choices.count(name) for name in (FIRST, SECOND, TIE)}
    pairs = sum(counts.values())
    if not pairs:
        return counts | {"pairs": 0, "rate": None, "ci": None}
    won = counts[SECOND] + counts[TIE] / 2
    return counts | {"pairs": pairs, "rate": won / pairs, "ci": wilson(won, pairs)}


def preference_line(judge: str, rates: Mapping[str, Any], names: Sequence[str]) -> str:
    """One sentence with the result of a blind comparison of two students or files called
    `names`."""
    first, second = names
    return (
        f"{judge} preferred {second} in {rates['second']} of {rates['pairs']} pairs, {first} in {rates['first']}, "
        f"and neither in {rates['tie']}: win rate {with_ci(rates['rate'], rates['ci'])}"
    )


def both_orders(pair: StoryPair) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two pairs (opening, text to grade): with the first story above the second, then below the
    second."""
    mark = "-" * 8
    while mark in pair.first + pair.second:  # so that one story cannot look like two
        mark += "-" * 8
    first = pair.first.strip()
    second = pair.second.strip()
    return (pair.opening, f"{first}\n{mark}\n{second}"), (
        pair.opening,
        f"{second}\n{mark}\n{first}",
    )


def scores_of(grader: Grader) -> GradeTexts:
    """A function from pairs (opening, text to grade) to their scores."""
    return lambda texts: [grade.score for grade in grader.grade_each(texts)]


def compare(pairs: Sequence[StoryPair], grade: GradeTexts) -> tuple[list[str | None], float | None]:
    """The choice for each pair, judged in both orders (None without an answer), and the fraction of
    answers that prefer the lower story (0.5 without position bias). grade: answers with a number
    from 0 to 1, above 0.5 if the lower story is better."""
    texts = [text for pair in pairs for text in both_orders(pair)]
    # a human must not be able to guess which story is which
    shuffled = random.Random(0).sample(texts, len(texts))
    lower_is_better = dict(zip(shuffled, grade(shuffled), strict=True))
    choices = []
    for pair in pairs:
        second_below, first_below = both_orders(pair)
        choices.append(choice(lower_is_better[second_below], lower_is_better[first_below]))
    answers = [answer for answer in lower_is_better.values() if answer is not None]
    return choices, mean_of(answer > 0.5 for answer in answers)


def choice(second_is_better: float | None, first_is_better: float | None) -> str | None:
    """The choice of a judge that was asked twice, with answers from 0 to 1: with the second story
    below, and with the first story below."""
    if second_is_better is None or first_is_better is None:
        return None
    if second_is_better == first_is_better:
        return TIE
    return SECOND if second_is_better > first_is_better else FIRST
