"""Findings about a run from other programs (findings.jsonl): sentences and a table of text under a
title, one object per line."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinystory.report import page
from tinystory.run.journal import Journal
from tinystory.run.records import FINDINGS, Record, read_records


def keep_finding(
    run: Path,
    title: str,
    step: int,
    sentences: Sequence[str],
    table: Sequence[Sequence[str]] = (),
) -> None:
    """Append a finding to the run's findings.jsonl. It replaces an earlier finding with the same
    title. table: the header, then the other rows."""
    finding = {"title": title, "step": step, "sentences": sentences, "table": table}
    with contextlib.closing(Journal(run / FINDINGS)) as journal:
        journal.append(finding)


def read_findings(run: Path) -> list[Record]:
    """The last finding of each title, with the keys `title`, `step` (of the run), `sentences`, and
    `table` (the header, then the other rows; [] without a table). Raises UserError for a finding
    with anything but text."""
    by_title = {}
    for record in read_records(run / FINDINGS, check=_check):
        by_title[record["title"]] = record
    return list(by_title.values())


def findings_sections(run: Path) -> Iterator[str]:
    for finding in read_findings(run):
        header, *rows = finding["table"] or [[]]
        sentences = "".join(f"<p>{page.clip(sentence)}</p>" for sentence in finding["sentences"])
        note = f"After step {finding['step']}."
        yield page.section(page.clip(finding["title"]), note, sentences + page.table(header, rows))


def _check(finding: Record) -> None:
    """Raises ValueError if the sentences or the table are not lists of text."""
    for row in [finding["sentences"], *finding["table"]]:
        if not isinstance(row, list) or not all(isinstance(text, str) for text in row):
            raise ValueError("its sentences or table are not lists of text")
    if [] in finding["table"]:
        raise ValueError("a row of its table is empty")
