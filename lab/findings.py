"""Saves the result of a lab command about a run, for the run's report."""

from collections.abc import Sequence
from pathlib import Path

from tinystory.report.findings import keep_finding
from tinystory.report.run import write_report
from tinystory.run.records import read_metrics


def keep(
    run: Path, title: str, sentences: Sequence[str], table: Sequence[Sequence[str]] = ()
) -> None:
    """Save a finding about a run's last step, and rewrite the report. See `keep_finding`."""
    metrics = read_metrics(run)
    step = metrics[-1]["step"] if metrics else 0
    keep_finding(run, title, step, sentences, table)
    print(f"report: {write_report(run)}")
