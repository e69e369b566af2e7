"""What other programs found out about a run: titled sentences and tables of text, one object per
line of the run's findings.jsonl."""

import contextlib
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from tinystory.report import page
from tinystory.run.errors import UserError
from tinystory.run.journal import Journal
from tinystory.run.records import FINDINGS, Record, read_records
from tinystory.run.text import printable


def keep_finding(
    run: Path,
    title: str,
    step: int,
    sentences: Sequence[str],
    table: Sequence[Sequence[str]] = (),
) -> None:
    """Append a finding, which replaces an earlier one of this title. table: the header, then the
    other rows."""
    finding = {"title": title, "step": step, "sentences": sentences, "table": table}
    with contextlib.closing(Journal(run / FINDINGS)) as journal:
        journal.append(finding)


def read_findings(run: Path) -> list[Record]:
    """The last finding of each title: `title`, `step` of the run, `sentences`, and `table`, the
    header and the other rows ([]: none). Raises UserError for a finding that is not of text."""
    by_title: dict[str, Record] = {}
    for record in read_records(run / FINDINGS):
        title, table = printable(record["title"]), record["table"]
        rows = [record["sentences"], *table]
        if not all(map(_is_text, rows)) or [] in table:
            raise UserError(
                f"{run / FINDINGS} holds a finding {title!r:.80}, which is not rows of text: delete its line"
            )
        sentences, *cells = ([printable(text) for text in row] for row in rows)
        by_title[title] = {
            "title": title,
            "step": record["step"],
            "sentences": sentences,
            "table": cells,
        }
    return list(by_title.values())


def findings_sections(run: Path) -> Iterator[str]:
    for finding in read_findings(run):
        header, *rows = finding["table"] or [[]]
        sentences = "".join(f"<p>{page.clip(sentence)}</p>" for sentence in finding["sentences"])
        note = f"After step {finding['step']}."
        yield page.section(escape(finding["title"]), note, sentences + page.table(header, rows))


def _is_text(row: object) -> bool:
    return isinstance(row, list) and all(isinstance(text, str) for text in row)
