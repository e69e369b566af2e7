"""The evaluations of one or several checkpoints, side by side: report.html, and rows for the terminal."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tinystory.report import page, plots
from tinystory.report.plots import Line, chart, number
from tinystory.runlog import atomic_write

# What is shown of a record: (name, path to the value, path to its interval, decimals).
ROWS = (
    ("BLiMP, %", ("blimp", "accuracy"), ("blimp", "ci"), 1),
    ("supplement, %", ("supplement", "accuracy"), ("supplement", "ci"), 1),
    ("entity tracking, %", ("entity_tracking", "accuracy"), ("entity_tracking", "ci"), 1),
    ("wug, Spearman's rho", ("wug", "correlation"), ("wug", "ci"), 2),
    ("eye tracking, % explained", ("reading", "eye_tracking"), None, 2),
    ("self-paced reading, % explained", ("reading", "self_paced"), None, 2),
    ("bits a byte", ("corpus", "bits_per_byte"), ("corpus", "ci"), 3),
    ("teacher's score", ("stories", "score_mean"), ("stories", "score_ci"), 2),
    ("words a story", ("stories", "length_mean"), ("stories", "length_ci"), 1),
    ("share that end", ("stories", "ended_eos_share"), ("stories", "ended_eos_ci"), 2),
    ("nats a word", ("stories", "entropy_per_word"), None, 2),
    ("distinct_4", ("stories", "distinct_4"), None, 3),
    ("self-BLEU", ("stories", "self_bleu"), None, 3),
    ("copied share", ("stories", "copied_share"), None, 3),
)
PAIRS = {"blimp": "BLiMP", "supplement": "BLiMP’s supplement", "entity_tracking": "Entity tracking"}


def value(record: dict, path: Sequence[str] | None) -> Any:
    """What is at the end of a path; None where it was not taken."""
    found = record if path else None
    for name in path or ():
        found = found.get(name) if found else None
    return found


def comparison(records: Sequence[dict]) -> list[list[str]]:
    """A row each of what was measured: its name, then each checkpoint's value and 95 % interval."""
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


def write_page(records: Sequence[dict], path: Path) -> None:
    """One self-contained page about these records, which are in the order given."""
    names = [record["name"] for record in records]
    charts = [_chart(records, *row[:3]) for row in ROWS] if len(records) > 1 else []
    sections = [
        page.section(
            "Side by side",
            "With 95 % intervals: of these texts or stories, not of another training run.",
            page.table(["", *names], comparison(records)),
        ),
        page.section(
            "Against the words read", "By the words that a checkpoint says it read and took in.", page.grid(charts)
        ),
        *(_phenomena(records, task) for task in PAIRS),
    ]
    text = page.PAGE.format(
        name="Evaluation",
        style=plots.palette() + plots.STYLE + page.STYLE,
        subtitle=escape(" · ".join(names)),
        sections="\n".join(filter(None, sections)),
    )
    atomic_write(path, text.encode("utf-8", "replace"))


def _chart(records: Sequence[dict], name: str, path: Sequence[str], interval: Sequence[str] | None) -> str:
    points = [(record["words"], value(record, path), value(record, interval)) for record in records if record["words"]]
    points = sorted((p for p in points if p[1] is not None), key=lambda p: p[0])
    if len(points) < 2:
        return ""
    x, y, ends = zip(*points, strict=True)
    errors = [
        (high - low) / 2 if (low, high) != (None, None) else None for low, high in (e or (None, None) for e in ends)
    ]
    return chart(name, [Line(x, y, "reward", "", False, errors)], x_name="words", log_x=True)


def _phenomena(records: Sequence[dict], task: str) -> str:
    """The accuracies of each phenomenon, and of what groups them, under a heading that opens."""
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


def _cell(row: dict | None) -> str:
    return f"{row['accuracy']:.1f} [{row['ci'][0]:.0f}, {row['ci'][1]:.0f}]" if row else number(None)
