"""How far judges agree about the same stories: kappa, rank correlation, mean difference, and the effect of length.

    python scripts/agreement.py runs/interact rubric                       a run's teacher and the built-in one
    python scripts/agreement.py runs/interact http://127.0.0.1:8080/v1     ... and any endpoint, or scripts/teach.py
    python scripts/agreement.py runs/interact runs/teach/grades.jsonl my_reward.py:score
    python scripts/agreement.py grades.jsonl                               several graders of the same stories ("by")

The first judge determines the stories: those before and after of a run (all so far if it has not ended), or the lines
of a file, each with an opening, a story and scores. Grades by the other judges are read from a file or requested now.
Grades requested for a run's stories are saved in its folder and appear in its report.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.config import InteractConfig, add_number
from tinystory.evaluate.agreement import Key, Rater, agreement
from tinystory.report.judges import COLUMNS, agreement_rows, length_line
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
    add = parser.add_argument
    add("judges", nargs="+", metavar="JUDGE", help="run, file of graded stories, URL, rubric, or FILE.py:FUNCTION")
    add_number(parser, "--stories", 0, "[0, 1e9]", "compare only so many, the first; 0: all")
    add("--teacher-model", nargs="+", default=[], metavar="NAME", help="model of the endpoints")
    add_number(parser, "--teacher-concurrency", InteractConfig.teacher_concurrency, "[1, 10000]", "requests in flight")
    add("--teacher-prompt", default="", metavar="FILE", help="JSON file of the criteria for endpoints")
    add("--corpus", nargs="+", default=["builtin"], metavar="NAME|FILE", help="text for the built-in teacher")
    add("--out", type=Path, metavar="FILE.json", help="file to write (default: agreement.json in the run)")
    options = parser.parse_args(argv)

    run = Path(options.judges[0])
    if not run.exists():
        raise UserError(f"{run}: there is no such run or file; the first judge is one whose stories are graded already")
    files = {name: read_raters(name) for name in options.judges if Path(name).exists()}
    raters = list(files[options.judges[0]])
    keys = list(raters[0].ratings)[: options.stories or None]
    for name in options.judges[1:]:
        raters += files[name] if name in files else [grade(name, keys, options, run)]
    if len(raters) < 2:
        raise UserError("agreement needs two judges: name another one, or a file that several people graded")
    if run.is_dir():
        save_opinions(run, raters[1:], keys)
    results = [agreement(a, b) for a, b in itertools.combinations(raters, 2)]
    for result in results:
        print_result(result)
    out = options.out or (run / "agreement.json" if run.is_dir() else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, json.dumps(results, indent=1) + "\n")
    if (run / METRICS).exists():
        print(f"report: {write_report(run)}")


def print_result(result: Mapping[str, Any]) -> None:
    print(f"\n{' and '.join(result['judges'])}, {result['stories']} stories")
    table = [COLUMNS, *agreement_rows(result)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(length_line(result))


def read_raters(name: str) -> list[Rater]:
    """The raters of a run or of a file of graded stories: one, or one per name in the lines' "by"."""
    path, default = Path(name), Path(name).name
    if path.is_dir():
        default = scorer(read_config(path)) or default
        path = path / SAMPLES if (path / SAMPLES).exists() else path / STORIES
    raters: dict[str, Rater] = {}
    for number, record in enumerate(read_records(path), start=1):
        if not {"opening", "story", "scores"} <= record.keys():
            raise UserError(f"{path} line {number} has no opening, story and scores: give a run, or a file of grades")
        by = str(record.get("by") or default)
        rater = raters.setdefault(by, Rater(by))
        rater.add(record["opening"], record["story"], record["scores"], record.get("score"))
    if rated := [rater for rater in raters.values() if rater.ratings]:
        return rated
    raise UserError(f"{name} holds no story with scores: give a run whose teacher scores criteria, or a file of grades")


def grade(name: str, keys: Sequence[Key], options: argparse.Namespace, run: Path) -> Rater:
    """A judge's ratings, requested now. An endpoint's replies are cached beside the run, so none is paid for twice."""
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
    with open_grader(config, builtin_teacher, corpus=options.corpus, replies=replies) as grader:
        model = BUILTIN if name == BUILTIN else grader.facts.get("teacher", {}).get("model")
        rater = Rater(model or Path(name).name)
        for (opening, story), reply in zip(keys, grader.grade_each(keys), strict=True):
            rater.add(opening, story, reply.scores, reply.score)
    if not rater.ratings:
        raise UserError(f"{name} gave no scores: see scripts/doctor.py --teacher-url URL")
    return rater


def save_opinions(run: Path, raters: Sequence[Rater], keys: Sequence[Key]) -> None:
    """Save the raters' scores of a run's stories, in place of earlier ones by the same raters."""
    names = {rater.name for rater in raters}
    records = [record for record in read_records(run / OPINIONS) if record["judge"] not in names]
    for rater in raters:
        for key in keys:
            if key in rater.ratings:
                scores = dict(rater.scores(key)) or None
                record = {"judge": rater.name, "opening": key[0], "story": key[1], "scores": scores}
                records.append(record | {"score": None if scores else rater.ratings[key]})
    atomic_write(run / OPINIONS, "".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
