"""What a command found out about a run, for the run's report and model card."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from tinystory.report.run import write_report
from tinystory.run.journal import Journal
from tinystory.run.records import FINDINGS, read_metrics


def keep(
    run: Path, title: str, sentences: Sequence[str], table: Sequence[Sequence[str]] = ()
) -> None:
    """Append a finding to the run's findings.jsonl, where it replaces an earlier one of this title,
    and rewrite the report. table: the header, then the other rows."""
    metrics = read_metrics(run)
    step = metrics[-1]["step"] if metrics else 0
    finding = {"title": title, "step": step, "sentences": sentences, "table": table}
    with contextlib.closing(Journal(run / FINDINGS)) as journal:
        journal.append(finding)
    print(f"report: {write_report(run)}")
