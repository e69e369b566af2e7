"""How far judges agree about the same stories: kappa, rank correlation, who gives more, and how length matters.

    python scripts/agreement.py runs/interact rubric                       a run's teacher and the built-in one
    python scripts/agreement.py runs/interact http://127.0.0.1:8080/v1     ... and any endpoint, or scripts/teach.py
    python scripts/agreement.py runs/interact runs/teach/grades.jsonl my_reward.py:score
    python scripts/agreement.py runs/teach/grades.jsonl                    the people who graded there, with each other

The first judge's stories count: of a run its stories before and after (of one that has not ended, all so far), of a
file each line with an opening, a story and scores. The others' grades of them are read, or asked for now. What is asked
of a run's stories is kept beside it, and its report shows it.
"""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.config import InteractConfig
from tinystory.evaluate.agreement import Judge, agreement
from tinystory.report.agreement import COLUMNS, length_line, rows, write_agreement
from tinystory.report.run import scorer, write_report
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import UserError, command
from tinystory.run.folder import METRICS, OPINIONS, SAMPLES, STORIES, atomic_write, read_config, read_records
from tinystory.run.paths import usage
from tinystory.teacher.grader import open_grader

BUILTIN = "rubric"


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=usage(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "judges", nargs="+", metavar="JUDGE", help="a run, a file of graded stories, a URL, rubric, or FILE.py:FUNCTION"
    )
    parser.add_argument("--stories", type=int, default=0, metavar="N", help="ask about the first N only (default: all)")
    parser.add_argument("--teacher-model", nargs="+", default=[], metavar="NAME", help="model of the endpoints")
    parser.add_argument("--teacher-concurrency", type=int, default=InteractConfig.teacher_concurrency, metavar="N")
    parser.add_argument("--teacher-prompt", default="", metavar="FILE", help="JSON file of what endpoints grade")
    parser.add_argument(
        "--corpus", nargs="+", default=["builtin"], metavar="NAME|FILE", help="what the built-in teacher has read"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="page to write (default: agreement.html in the run)"
    )
    options = parser.parse_args(argv)

    run = Path(options.judges[0])
    if not run.exists():
        raise UserError(f"{run}: there is no such run or file; the first judge is one whose stories are graded already")
    read = [read_judges(name) if Path(name).exists() else None for name in options.judges]
    first = read[0] or []
    told = [*first[0].scores, *first[0].wholes] if first else []
    told = told[: options.stories or None]
    judges = [*first]
    for name, others in zip(options.judges[1:], read[1:], strict=True):
        judges += others if others is not None else [ask(name, told, options, run)]
    if len(judges) < 2:
        raise UserError("agreement needs two judges: name another one, or a file that several people graded")
    if run.is_dir():
        keep_opinions(run, judges[1:], told)
    comparisons = [agreement(a, b) for a, b in itertools.combinations(judges, 2)]
    for found in comparisons:
        print(f"\n{found['judges'][0]} and {found['judges'][1]}, {found['stories']} stories")
        table = [COLUMNS, *rows(found)]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        for row in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print(length_line(found))
    out = options.out or (run / "agreement.html" if run.is_dir() else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_agreement(comparisons, out)
        atomic_write(out.with_suffix(".json"), json.dumps(comparisons, indent=1) + "\n")
        print(f"page: {out}")
    if (run / METRICS).exists():
        print(f"report: {write_report(run)}")


def read_judges(name: str) -> list[Judge]:
    """The judges of a run or of a file of graded stories: one, or as many as there are names beside the grades."""
    path, own = Path(name), Path(name).name
    if path.is_dir():
        own = scorer(read_config(path)) or own
        path = path / SAMPLES if (path / SAMPLES).exists() else path / STORIES
    judges: dict[str, Judge] = {}
    for number, record in enumerate(read_records(path), start=1):
        if not {"opening", "story", "scores"} <= record.keys():
            raise UserError(f"{path} line {number} has no opening, story and scores: give a run, or a file of grades")
        by = str(record.get("by") or own)
        judge = judges.setdefault(by, Judge(by, {}, {}))
        judge.add(record["opening"], record["story"], record["scores"], record.get("score"))
    if not any(judge.scores or judge.wholes for judge in judges.values()):
        raise UserError(
            f"{name} holds no story with scores: give a run whose teacher scores criteria, or a file of grades"
        )
    return [judge for judge in judges.values() if judge.scores or judge.wholes]


def ask(name: str, told: Sequence[tuple[str, str]], options: argparse.Namespace, run: Path) -> Judge:
    """A judge that is asked now. An endpoint's replies are kept beside the run, so nobody pays for one twice."""
    config = InteractConfig(
        teacher_model=options.teacher_model,
        teacher_concurrency=options.teacher_concurrency,
        teacher_prompt=options.teacher_prompt,
    )
    if name.startswith(("http://", "https://")):
        config.teacher_url = [name]
    elif name != BUILTIN:
        config.reward = name
    replies = (run if run.is_dir() else run.parent) / "second_replies.jsonl" if config.teacher_url else None
    with contextlib.ExitStack() as stack:
        grader = stack.enter_context(open_grader(config, builtin_teacher, corpus=options.corpus, replies=replies))
        title = BUILTIN if name == BUILTIN else grader.facts.get("teacher", {}).get("model") or Path(name).name
        judge = Judge(title, {}, {})
        for (opening, story), grade in zip(told, grader.grade_each(told), strict=True):
            judge.add(opening, story, grade.scores, grade.score)
    if not judge.scores and not judge.wholes:
        raise UserError(f"{name} gave no scores: see scripts/doctor.py --teacher-url URL")
    return judge


def keep_opinions(run: Path, judges: Sequence[Judge], told: Sequence[tuple[str, str]]) -> None:
    """Write what other judges say of a run's stories, in place of what the same ones said before."""
    names = {judge.name for judge in judges}
    records = [record for record in read_records(run / OPINIONS) if record["judge"] not in names]
    for judge in judges:
        for opening, story in told:
            if judge.knows(opening, story):
                scores, score = judge.scores.get((opening, story)), judge.wholes.get((opening, story))
                said = {"scores": scores and dict(scores), "score": score}
                records.append({"judge": judge.name, "opening": opening, "story": story, **said})
    atomic_write(run / OPINIONS, "".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
