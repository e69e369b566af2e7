"""The evaluations of one or several checkpoints side by side, as report.html and as a table for the terminal."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tinystory.report import charts, page
from tinystory.report.charts import Line, chart, number
from tinystory.run.folder import Record, atomic_write

# The measures shown: (name, path to the value in a record, path to its interval, decimals).
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


def value(record: Record, path: Sequence[str] | None) -> Any:
    """The value at the end of a path; None if it was not measured."""
    found: Any = record if path else None
    for name in path or ():
        found = found.get(name) if found else None
    return found


def comparison(records: Sequence[Record]) -> list[list[str]]:
    """One row per measure that was taken: its name, then the value and 95 % interval for each checkpoint."""
    rows = []
    for name, path, interval, decimals in ROWS:
        cells = []
        for record in records:
            found, ends = value(record, path), value(record, interval)
            cell = number(None) if found is None else f"{found:.{decimals}f}"
            cells.append(
                f"{cell} [{ends[0]:.{decimals}f}, {ends[1]:.{decimals}f}]" if ends and found is not None else cell
            )
        if any(value(record, path) is not None for record in records):
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
            "Against the words read", "Words read and taken in, as recorded in each checkpoint.", page.grid(drawings)
        ),
        *(_phenomena(records, task) for task in PAIRS),
    ]
    text = page.PAGE.format(
        name="Evaluation",
        style=charts.palette() + charts.STYLE + page.STYLE,
        subtitle=escape(" · ".join(names)),
        sections="\n".join(filter(None, sections)),
    )
    atomic_write(path, text.encode("utf-8", "replace"))


def _chart(records: Sequence[Record], name: str, path: Sequence[str], interval: Sequence[str] | None) -> str:
    points = [(record["words"], value(record, path), value(record, interval)) for record in records if record["words"]]
    points = sorted((p for p in points if p[1] is not None), key=lambda p: p[0])
    if len(points) < 2:
        return ""
    x, y, ends = zip(*points, strict=True)
    errors = [(each[1] - each[0]) / 2 if each else None for each in ends]
    return chart(name, [Line(x, y, "reward", "", False, errors)], x_name="words", log_x=True)


def _phenomena(records: Sequence[Record], task: str) -> str:
    """A collapsible section with the accuracy on each phenomenon and on each group of them."""
    there = [record for record in records if record.get(task)]
    if not there:
        return ""
    parts = {"phenomena": "Phenomenon"} | {kind: kind.replace("_", " ") for kind in there[0][task]["groups"]}
    tables = []
    for part, title in parts.items():
        found = [
            record[task][part] if part == "phenomena" else record[task]["groups"].get(part, {}) for record in there
        ]
        rows = [[name, str(row["total"]), *(_cell(each.get(name)) for each in found)] for name, row in found[0].items()]
        tables.append(page.table([title, "items", *(record["name"] for record in there)], rows))
    return page.details(PAIRS[task], "".join(reversed(tables)))


def _cell(row: Record | None) -> str:
    return f"{row['accuracy']:.1f} [{row['ci'][0]:.0f}, {row['ci'][1]:.0f}]" if row else number(None)
