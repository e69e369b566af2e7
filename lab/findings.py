"""The report's section on how a judge that was not the run's teacher sees its stories."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tinystory.evaluate.intervals import with_ci
from tinystory.evaluate.preference import run_preferences
from tinystory.evaluate.second_judge import GROUPS, conclusion, summary
from tinystory.report import page
from tinystory.report.charts import number
from tinystory.run.folder import JUDGED, Record, read_records

BEFORE_AFTER = ("the one before", "the story after interaction")


def judges_section(folder: Path) -> str:
    records, preferences = list(read_records(folder / JUDGED)), run_preferences(folder)
    header, *rows = judged_rows(records) if records else [[]]
    lines = ([conclusion(records)] if records else []) + preference_lines(preferences)
    return page.section(
        "A judge that was not the teacher",
        "Stories to the same openings, never trained on, and real ones, by the teacher and by a language model that "
        "reads them (sense, in nats per token: tinystory/evaluate/reader.py), with 95 % intervals. A gain that only "
        "the teacher sees is a gain at pleasing the teacher; one that a lower temperature gives too needs no training.",
        (page.table(header, rows) if records else "")
        + "".join(f"<p>{escape(line)}</p>" for line in lines),
    )


def judged_rows(records: Sequence[Record]) -> list[list[str]]:
    """A header, and per group: size, mean by each judge, and the fraction of the way from before to
    real stories."""
    tables = {measure: summary(records, measure) for measure in ("score", "sense")}
    rows = [
        [
            "Stories",
            "Number",
            "Teacher’s score",
            "of the way",
            "Sense, nats per token",
            "of the way",
        ]
    ]
    for name in GROUPS:
        cells = []
        for table in tables.values():
            row = table[name]
            cells += [
                with_ci(row["mean"], row["ci"]),
                number(None) if row["gap"] is None else f"{row['gap']:.0%}",
            ]
        rows.append([name, str(sum(record["group"] == name for record in records)), *cells])
    return rows


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
