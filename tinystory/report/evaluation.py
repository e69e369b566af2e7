"""The evaluations of one or several checkpoints side by side, as a table for the terminal."""

from collections.abc import Sequence
from typing import Any

from tinystory.evaluate.intervals import with_ci
from tinystory.run.folder import Record

# Name, path to the value in a record, path to its interval, decimals.
ROWS = (
    ("BLiMP, %", ("blimp", "accuracy"), ("blimp", "ci"), 1),
    ("supplement, %", ("supplement", "accuracy"), ("supplement", "ci"), 1),
    ("EWoK, %", ("ewok", "accuracy"), ("ewok", "ci"), 1),
    ("COMPS, %", ("comps", "accuracy"), ("comps", "ci"), 1),
    ("entity tracking, %", ("entity_tracking", "accuracy"), ("entity_tracking", "ci"), 1),
    ("wug, Spearman's rho", ("wug", "correlation"), ("wug", "ci"), 2),
    ("wug past, Spearman's rho", ("wug_past", "correlation"), ("wug_past", "ci"), 2),
    ("words of childhood, nats", ("aoa", "surprisal"), None, 2),
    ("eye tracking, % explained", ("reading", "eye_tracking"), None, 2),
    ("self-paced reading, % explained", ("reading", "self_paced"), None, 2),
    ("bits per byte", ("corpus", "bits_per_byte"), None, 3),
    ("repeated name", ("coreference", "repeated_name"), None, 3),
    ("any introduced name", ("coreference", "introduced_name"), None, 3),
    ("he or she", ("coreference", "he_or_she"), None, 3),
    ("teacher's score", ("stories", "score_mean"), ("stories", "score_ci"), 2),
    ("reader: sense", ("stories", "sense_mean"), ("stories", "sense_ci"), 2),
    ("words per story", ("stories", "length_mean"), ("stories", "length_ci"), 1),
    ("fraction that end", ("stories", "ended_eos_share"), ("stories", "ended_eos_ci"), 2),
    ("nats per word", ("stories", "entropy_per_word"), None, 2),
    ("distinct_4", ("stories", "distinct_4"), None, 3),
    ("clusters of 10, by shared phrases", ("stories", "story_clusters_10"), None, 1),
    ("copied fraction", ("stories", "copied_share"), None, 3),
)


def at(record: Record, path: Sequence[str] | None) -> Any:
    """The value at the end of a path of keys; None if it was not measured."""
    value: Any = record if path else None
    for key in path or ():
        value = value.get(key) if value else None
    return value


def comparison(records: Sequence[Record]) -> list[list[str]]:
    """One row per measure that was taken: its name, then the value and 95 % interval for each checkpoint."""
    rows = []
    for name, path, interval, decimals in ROWS:
        values = [at(record, path) for record in records]
        if any(value is not None for value in values):
            ends = (at(record, interval) for record in records)
            rows.append([name, *(with_ci(value, ci, decimals) for value, ci in zip(values, ends, strict=True))])
    return rows
