"""The table that scripts/evaluate.py prints: evaluations of checkpoints and files, side by side."""

from collections.abc import Sequence

from tinystory.evaluate.intervals import with_ci
from tinystory.run.records import Record

# Name of the measure, task, keys of the value and of the interval in the task's record, decimals.
Row = tuple[str, str, str, str | None, int]
ROWS: tuple[Row, ...] = (
    ("stories", "stories", "stories", None, 0),
    ("bits per byte", "corpus", "bits_per_byte", None, 3),
    ("teacher's score", "stories", "score_mean", "score_ci", 2),
    ("words per story", "stories", "length_mean", "length_ci", 1),
    ("fraction that end", "stories", "ended_eos_share", "ended_eos_ci", 2),
    ("distinct_4", "stories", "distinct_4", None, 3),
    ("clusters of similar stories", "stories", "story_clusters", None, 0),
)


def unequal_counts(records: Sequence[Record]) -> str:
    """A warning if the records have different numbers of stories, else ""."""
    counts = {record["stories"]["stories"] for record in records if "stories" in record}
    if len(counts) < 2:
        return ""
    return (
        "the numbers of stories differ, and distinct_4 falls and clusters rise with that number: compare "
        f"both at equal numbers, with --stories {min(counts)}"
    )


def comparison(records: Sequence[Record], rows: Sequence[Row]) -> list[list[str]]:
    """A header with the records' names, and a row for each recorded measure: the measure's name,
    and each record's value with its 95 % interval."""
    table = [["", *(record["name"] for record in records)]]
    for name, task, value, interval, decimals in rows:
        measured = [record.get(task) or {} for record in records]
        if any(measures.get(value) is not None for measures in measured):
            cells = [with_ci(of.get(value), of.get(interval), decimals) for of in measured]
            table.append([name, *cells])
    return table
