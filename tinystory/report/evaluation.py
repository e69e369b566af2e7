"""A table for the terminal of the evaluations of checkpoints, side by side."""

from collections.abc import Sequence

from tinystory.evaluate.intervals import with_ci
from tinystory.run.folder import Record

# Name, task, keys of the value and its interval in the task's record, decimals.
ROWS = (
    ("BLiMP, %", "blimp", "accuracy", "ci", 1),
    ("supplement, %", "supplement", "accuracy", "ci", 1),
    ("EWoK, %", "ewok", "accuracy", "ci", 1),
    ("COMPS, %", "comps", "accuracy", "ci", 1),
    ("entity tracking, %", "entity_tracking", "accuracy", "ci", 1),
    ("wug, Spearman's rho", "wug", "correlation", "ci", 2),
    ("wug past, Spearman's rho", "wug_past", "correlation", "ci", 2),
    ("words of childhood, nats", "aoa", "surprisal", None, 2),
    ("eye tracking, % explained", "reading", "eye_tracking", None, 2),
    ("self-paced reading, % explained", "reading", "self_paced", None, 2),
    ("bits per byte", "corpus", "bits_per_byte", None, 3),
    ("repeated name", "coreference", "repeated_name", None, 3),
    ("any introduced name", "coreference", "introduced_name", None, 3),
    ("he or she", "coreference", "he_or_she", None, 3),
    ("teacher's score", "stories", "score_mean", "score_ci", 2),
    ("reader: sense", "stories", "sense_mean", "sense_ci", 2),
    ("words per story", "stories", "length_mean", "length_ci", 1),
    ("fraction that end", "stories", "ended_eos_share", "ended_eos_ci", 2),
    ("distinct_4", "stories", "distinct_4", None, 3),
    ("clusters of 10, by shared phrases", "stories", "story_clusters_10", None, 1),
    ("copied fraction", "stories", "copied_share", None, 3),
)


def comparison(records: Sequence[Record]) -> list[list[str]]:
    """One row per measure taken: its name, then the value and 95 % interval per checkpoint."""
    rows = []
    for name, task, value, interval, decimals in ROWS:
        measured = [record.get(task) or {} for record in records]
        if any(measures.get(value) is not None for measures in measured):
            rows.append(
                [name, *(with_ci(of.get(value), of.get(interval), decimals) for of in measured)]
            )
    return rows
