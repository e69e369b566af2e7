"""The evaluations of one or several checkpoints side by side, as report.html and as a table for the terminal."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tinystory.report import page
from tinystory.report.charts import Line, chart, number
from tinystory.run.folder import Record

# Name, path to the value in a record, path to its interval, decimals.
ROWS = (
    ("BLiMP, %", ("blimp", "accuracy"), ("blimp", "ci"), 1),
    ("supplement, %", ("supplement", "accuracy"), ("supplement", "ci"), 1),
    ("entity tracking, %", ("entity_tracking", "accuracy"), ("entity_tracking", "ci"), 1),
    ("wug, Spearman's rho", ("wug", "correlation"), ("wug", "ci"), 2),
    ("eye tracking, % explained", ("reading", "eye_tracking"), None, 2),
    ("self-paced reading, % explained", ("reading", "self_paced"), None, 2),
    ("bits per byte", ("corpus", "bits_per_byte"), ("corpus", "ci"), 3),
    ("repeated name", ("coreference", "repeated_name"), None, 3),
    ("any introduced name", ("coreference", "introduced_name"), None, 3),
    ("he or she", ("coreference", "he_or_she"), None, 3),
    ("teacher's score", ("stories", "score_mean"), ("stories", "score_ci"), 2),
    ("reader: sense", ("stories", "sense_mean"), ("stories", "sense_ci"), 2),
    ("reader: half gain", ("stories", "half_gain_mean"), ("stories", "half_gain_ci"), 2),
    ("reader: order gain", ("stories", "order_gain_mean"), ("stories", "order_gain_ci"), 2),
    ("words per story", ("stories", "length_mean"), ("stories", "length_ci"), 1),
    ("fraction that end", ("stories", "ended_eos_share"), ("stories", "ended_eos_ci"), 2),
    ("nats per word", ("stories", "entropy_per_word"), None, 2),
    ("distinct_4", ("stories", "distinct_4"), None, 3),
    ("self-BLEU", ("stories", "self_bleu"), None, 3),
    ("clusters of 10", ("stories", "story_clusters_10"), None, 1),
    ("utility of 10", ("stories", "utility_10"), None, 2),
    ("copied fraction", ("stories", "copied_share"), None, 3),
)
PAIRS = {"blimp": "BLiMP", "supplement": "BLiMP’s supplement", "entity_tracking": "Entity tracking"}


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
        cells = []
        for record in records:
            value, ends = at(record, path), at(record, interval)
            cell = number(None) if value is None else f"{value:.{decimals}f}"
            cells.append(f"{cell} [{ends[0]:.{decimals}f}, {ends[1]:.{decimals}f}]" if ends else cell)
        if any(at(record, path) is not None for record in records):
            rows.append([name, *cells])
    return rows


def write_page(records: Sequence[Record], path: Path) -> None:
    """Write one self-contained page about the records, in the given order."""
    names = [record["name"] for record in records]
    drawings = [_chart(records, *row[:3]) for row in ROWS] if len(records) > 1 else []
    sections = [
        page.section(
            "Side by side",
            "With 95 % intervals over the texts or stories; they do not cover the variance between training runs.",
            page.table(["", *names], comparison(records)),
        ),
        page.section(
            "Against training words",
            "Words of pretraining and taken in during interaction, as recorded in each checkpoint.",
            page.grid(drawings),
        ),
        *(_phenomena(records, task) for task in PAIRS),
    ]
    page.write(path, "Evaluation", escape(" · ".join(names)), sections)


def _chart(records: Sequence[Record], name: str, path: Sequence[str], interval: Sequence[str] | None) -> str:
    points = [(record["words"], at(record, path), at(record, interval)) for record in records if record["words"]]
    points = sorted((point for point in points if point[1] is not None), key=lambda point: point[0])
    if len(points) < 2:
        return ""
    x, y, intervals = zip(*points, strict=True)
    errors = [(ends[1] - ends[0]) / 2 if ends else None for ends in intervals]
    return chart(name, [Line(x, y, "reward", "", False, errors)], x_name="words", log_x=True)


def _phenomena(records: Sequence[Record], task: str) -> str:
    """A collapsible section with the accuracy on each phenomenon and on each group of them."""
    records = [record for record in records if record.get(task)]
    if not records:
        return ""
    columns = {"Phenomenon": [record[task]["phenomena"] for record in records]}
    for kind in records[0][task]["groups"]:
        columns[kind.replace("_", " ")] = [record[task]["groups"].get(kind, {}) for record in records]
    tables = []
    for title, results in columns.items():
        rows = [
            [name, str(row["total"]), *(_cell(result.get(name)) for result in results)]
            for name, row in results[0].items()
        ]
        tables.append(page.table([title, "items", *(record["name"] for record in records)], rows))
    return page.details(PAIRS[task], "".join(reversed(tables)))


def _cell(row: Record | None) -> str:
    return f"{row['accuracy']:.1f} [{row['ci'][0]:.0f}, {row['ci'][1]:.0f}]" if row else number(None)
