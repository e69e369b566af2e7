"""Evaluate checkpoints on BabyLM's zero-shot tasks and on coreference, and write a submission.

python lab/babylm.py runs/demo/pretrain --blimp blimp_filtered --reading reading_data.csv
python lab/babylm.py chck_* --babylm full_eval --predictions results/small    files to submit
python lab/babylm.py runs/demo/pretrain --coreference 300                     names and pronouns
python lab/babylm.py I1/checkpoints/start I1 I2/checkpoints/start I2 --changes --blimp blimp_filtered

CHECKPOINT is a checkpoint, a run (its checkpoint `best`, or else the newest; default: the newest
run under runs/) or a folder saved by transformers. --changes takes pairs of checkpoints, before and
after a training, one pair per seed, and adds the mean change of each measure with its 95 % interval
over the pairs. If this interval is within ±d, the measure is the same within d. As the student
before an interaction, give RUN/checkpoints/start: it has the run's temperature, which alone changes
most measures. Data files are BabyLM's own, gzipped or not. Measures are defined as in BabyLM's
pipeline."""

import functools
import json
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)

from tqdm import tqdm

from lab import submission
from lab.coreference import coreference
from lab.intervals import interval
from lab.pairs import evaluate_pairs, evaluate_wug
from lab.reading_times import evaluate_reading_times
from scripts.evaluate import student_record
from tinystory.evaluate.corruptions import unseen_stories
from tinystory.evaluate.intervals import mean_of
from tinystory.ops.compute import pick_device
from tinystory.report.evaluation import comparison
from tinystory.run.errors import UserError, command
from tinystory.run.files import atomic_write
from tinystory.run.folder import newest_run, require_output
from tinystory.run.options import add_number, script_parser
from tinystory.run.records import Record
from tinystory.run.terminal import aligned
from tinystory.student import checkpoint


class Task(NamedTuple):
    evaluate: Callable[..., dict[str, Any]]
    help: str


TASKS = {
    "blimp": Task(evaluate_pairs, "BLiMP: a .jsonl file, or a folder of them"),
    "supplement": Task(evaluate_pairs, "BLiMP's supplement"),
    "ewok": Task(evaluate_pairs, "EWoK"),
    "entity_tracking": Task(evaluate_pairs, "entity tracking"),
    "wug": Task(evaluate_wug, "wug test of adjective nominalisation"),
    "wug_past": Task(functools.partial(evaluate_wug, name="wug_past"), "wug test of past tenses"),
    "comps": Task(evaluate_pairs, "COMPS"),
    "reading": Task(evaluate_reading_times, "reading_data.csv"),
}
# Name of the measure, task, keys of the value and of the interval in the task's record, decimals.
ROWS = (
    ("BLiMP, %", "blimp", "accuracy", "ci", 1),
    ("supplement, %", "supplement", "accuracy", "ci", 1),
    ("EWoK, %", "ewok", "accuracy", "ci", 1),
    ("COMPS, %", "comps", "accuracy", "ci", 1),
    ("entity tracking, %", "entity_tracking", "accuracy", "ci", 1),
    ("wug, Spearman's rho", "wug", "correlation", "ci", 2),
    ("wug past, Spearman's rho", "wug_past", "correlation", "ci", 2),
    ("words of childhood, nats", "aoa", "surprisal", None, 2),
    ("eye tracking, % explained", "reading", "eye_tracking", None, 2),
    ("self-paced reading, % explained", "reading", "self_paced", None, 2),
    ("repeated name", "coreference", "repeated_name", None, 3),
    ("any introduced name", "coreference", "introduced_name", None, 3),
    ("he or she", "coreference", "he_or_she", None, 3),
)


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, default=[], metavar="CHECKPOINT")
    for name, task in TASKS.items():
        add(f"--{name.replace('_', '-')}", metavar="PATH", help=task.help)
    add(
        "--babylm",
        type=Path,
        metavar="FOLDER",
        help="folder full_eval or fast_eval of BabyLM: evaluate all tasks in it",
    )
    add(
        "--aoa", metavar="FILE", help="cdi_childes.json: words' surprisals, for ages of acquisition"
    )
    add(
        "--predictions",
        type=Path,
        metavar="RESULTS/MODEL",
        help="folder for predictions in BabyLM's format",
    )
    add_number(
        parser,
        "--coreference",
        0,
        "[0, 100000]",
        "number of unseen built-in stories on which coreference is measured",
    )
    add("--changes", action="store_true", help="the checkpoints are pairs, before and after")
    add("--device", default="auto")
    add("--out", type=Path, help="report.json to write")
    options = parser.parse_args(argv)
    paths = submission.find_tasks(options.babylm) if options.babylm else {}
    for name in TASKS:
        path = getattr(options, name)
        if path:
            paths[name] = path
    require_work(options, paths)
    if options.out:
        require_output(options.out)
    stories = unseen_stories(options.coreference)
    folders = [checkpoint.find(path) for path in options.checkpoints or [newest_run()]]
    records: list[Record] = []
    surprisals: list[Record] = []
    for folder in tqdm(folders, desc="checkpoints", disable=None):
        student, tokenizer, history = checkpoint.load(folder, pick_device(options.device))
        record = student_record(folder, history)
        for name, path in paths.items():
            measures = TASKS[name].evaluate(student, tokenizer, path)
            if options.predictions and options.babylm:
                submission.save_predictions(options.predictions, folder, name, path, measures)
            del measures["predictions"]
            record[name] = measures
        if options.aoa:
            words = submission.word_surprisals(student, tokenizer, options.aoa)
            trained = {"step": folder.name, "word_count": record["words"] or 0}
            surprisals += [trained | word for word in words]
            known = [word["surprisal"] for word in words if not math.isnan(word["surprisal"])]
            record["aoa"] = {"surprisal": mean_of(known), "items": len(known)}
        if stories:
            record["coreference"] = coreference(student, tokenizer, stories)
        records.append(record)
    if options.predictions and options.aoa:
        submission.save_surprisals(options.predictions, surprisals)

    print(*aligned(comparison(records, ROWS)), sep="\n")
    if options.changes:
        print(*changes(records), sep="\n")
    for record in records:
        left_out = {}
        for name in paths:
            if record[name].get("too_long"):
                left_out[name] = record[name]["too_long"]
        if left_out:
            print(f"{record['name']}: left out items longer than the student's context: {left_out}")
    if options.out:
        report = {"tasks": paths, "checkpoints": records}
        atomic_write(options.out, json.dumps(report, indent=1) + "\n")


def require_work(options: Namespace, paths: Mapping[str, str | Path]) -> None:
    """Raises UserError if the options ask for nothing, contradict each other, or name data that do
    not exist. paths: of the tasks' data."""
    for name, path in paths.items():
        if not Path(path).exists():  # it would be noticed only after the tasks before it
            raise UserError(f"there is no {path}, from which {name} is to be evaluated")
    if not paths and not options.aoa and not options.coreference:
        raise UserError(
            "nothing to evaluate: give --babylm FOLDER, --blimp or another task, or --coreference N"
        )
    if options.predictions and not (options.babylm or options.aoa):
        raise UserError(
            "--predictions needs the data that BabyLM asks for: give --babylm FOLDER or --aoa FILE"
        )
    if options.changes and (len(options.checkpoints) < 4 or len(options.checkpoints) % 2):
        raise UserError(
            "--changes needs two pairs of checkpoints or more: BEFORE AFTER BEFORE AFTER"
        )


def changes(records: Sequence[Record]) -> list[str]:
    """A line for each measure: the mean change and its 95 % interval over the pairs. records: of
    the checkpoints, before and after in turn. Left out: measures that a record does not have."""
    lines = []
    for name, task, key, _, decimals in ROWS:
        values = [(record.get(task) or {}).get(key) for record in records]
        known = [value for value in values if value is not None]
        if len(known) < len(records):
            continue
        pairs = zip(known[::2], known[1::2], strict=True)
        change = interval([after - before for before, after in pairs])
        lines.append(f"change of {name}: {change.mean:+.{decimals}f} ± {change.half:.{decimals}f}")
    return lines


if __name__ == "__main__":
    main()
