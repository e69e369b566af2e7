"""A run's stories by a judge that was not its teacher: a small language model that reads them.

    python scripts/judge.py runs/interact                          by the packaged SmolLM2
    python scripts/judge.py runs/a runs/b runs/c --reader NAME     by any causal model; the last table is of all runs

Beside the stories before and after stand controls that need no learning, graded by the run's teacher too: the student
that it began with at lower temperatures, and the best of four of its stories. judged.jsonl and the report keep all.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.config import InteractConfig
from tinystory.evaluate.reader import PACKAGED, Reader
from tinystory.evaluate.second_judge import conclusion, judge_run
from tinystory.ops.compute import resolve
from tinystory.report.judges import correlation_line, judged_rows
from tinystory.report.run import write_report
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import command
from tinystory.run.folder import Record, recorded_options
from tinystory.run.paths import usage
from tinystory.student import checkpoint
from tinystory.teacher.grader import open_grader


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=usage(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished interactions")
    parser.add_argument("--reader", default=PACKAGED, metavar="NAME", help=f"causal model (default: {PACKAGED})")
    options = parser.parse_args(argv)
    reader, pooled = Reader(options.reader), list[Record]()
    for run in options.runs:
        recorded = recorded_options(run)
        names = {f.name for f in dataclasses.fields(InteractConfig) if f.init}
        config = InteractConfig(**{name: value for name, value in recorded.items() if name in names})
        compute = resolve(config.device, config.dtype, config.pytorch_ops)
        corpus = checkpoint.load(run / "checkpoints" / "start", compute.device)[2].get("corpus")
        with open_grader(config, builtin_teacher, corpus=corpus, replies=run / "judge_replies.jsonl") as grader:
            records = judge_run(run, config, compute, reader, grader.grade_each)
        print_judged(str(run), records)
        print(f"report: {write_report(run)}")
        pooled += [record | {"index": record["index"] + len(pooled)} for record in records]
    if len(options.runs) > 1:
        print_judged(f"{len(options.runs)} runs together", pooled)


def print_judged(name: str, records: Sequence[Record]) -> None:
    print(f"\n{name}")
    rows = judged_rows(records)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(conclusion(records))
    print(correlation_line(records))


if __name__ == "__main__":
    main()
