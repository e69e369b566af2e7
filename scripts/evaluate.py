"""Evaluate checkpoints (BabyLM's zero-shot tasks, bits per byte, measures of their stories), or
    judge runs.

    python scripts/evaluate.py runs/pretrain --blimp blimp_filtered --out report.json
    python scripts/evaluate.py runs/pretrain/checkpoints/chck_* --stories 200 --corpus builtin --out
    report.json
    python scripts/evaluate.py --stories 200 gpt4.jsonl people.jsonl         stories by anybody,
    side by side
    python scripts/evaluate.py --compare runs/interact --teacher-url URL     an LLM's blind choice:
    before or after? python scripts/evaluate.py --compare A B --teacher-url URL               ...
    the stories of A or of B?
    python scripts/evaluate.py --judge runs/a runs/b                         how much of the gain
    another judge sees

CHECKPOINT is a checkpoint, a run (its best or newest checkpoint) or a folder that transformers
wrote; A and B may also be .jsonl files of stories, whose lines have an `opening` and a `story`. The
default, also of --compare and --judge, is the newest run under runs/. Data files are BabyLM's own,
gzipped or not, and measures are defined as in its pipeline.
"""

import argparse
import contextlib
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from tinystory.config import SEEDS, InteractConfig, recorded_config
from tinystory.data.corpus import NAMES, open_corpus
from tinystory.data.openings import load_openings
from tinystory.evaluate import submission
from tinystory.evaluate.coreference import coreference, unseen_stories
from tinystory.evaluate.pairs import evaluate_pairs, evaluate_wug
from tinystory.evaluate.preference import (
    COMPARISON,
    compare,
    compared_pairs,
    keep_choices,
    win_rate,
)
from tinystory.evaluate.reader import PACKAGED, Reader
from tinystory.evaluate.reading_times import evaluate_reading_times
from tinystory.evaluate.second_judge import conclusion, judge_run
from tinystory.evaluate.stories import (
    OPENINGS,
    Sample,
    mean_of,
    read_samples,
    story_measures,
    write_stories,
)
from tinystory.evaluate.validation import bits_per_byte
from tinystory.ops.compute import pick_device, resolve
from tinystory.report.evaluation import comparison
from tinystory.report.judges import BEFORE_AFTER, judged_rows, preference_lines
from tinystory.report.run import write_report
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import UserError, command
from tinystory.run.folder import Record, atomic_write, newest_run, require_output
from tinystory.run.options import add_number, script_parser
from tinystory.run.text import aligned
from tinystory.student import checkpoint, memory
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grader
from tinystory.teacher.grader import open_grader

TASKS: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "blimp": (evaluate_pairs, "BLiMP: a .jsonl file, or a folder of them"),
    "supplement": (evaluate_pairs, "BLiMP's supplement"),
    "ewok": (evaluate_pairs, "EWoK"),
    "entity_tracking": (evaluate_pairs, "entity tracking"),
    "wug": (evaluate_wug, "wug test of adjective nominalisation"),
    "wug_past": (functools.partial(evaluate_wug, name="wug_past"), "wug test of past tenses"),
    "comps": (evaluate_pairs, "COMPS"),
    "reading": (evaluate_reading_times, "reading_data.csv"),
}
COMPARED = 40  # pairs by default
FEWER = "--stories or --max-new-tokens"


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    subject = parser.add_mutually_exclusive_group().add_argument
    subject("checkpoints", nargs="*", type=Path, default=[], metavar="CHECKPOINT")
    subject(
        "--compare", nargs="*", type=Path, metavar="RUN|A B", help="judge pairs, by --teacher-url"
    )
    subject("--judge", nargs="*", type=Path, metavar="RUN", help="show their stories to --reader")
    for task, (_, text) in TASKS.items():
        add(f"--{task.replace('_', '-')}", metavar="PATH", help=text)
    add(
        "--babylm",
        type=Path,
        metavar="FOLDER",
        help="all of these in BabyLM's full_eval or fast_eval",
    )
    add(
        "--aoa", metavar="FILE", help="cdi_childes.json: words' surprisals, for ages of acquisition"
    )
    add(
        "--predictions",
        type=Path,
        metavar="RESULTS/MODEL",
        help="where to write BabyLM's predictions",
    )
    add(
        "--corpus",
        nargs="+",
        metavar="NAME|FILE",
        help="text for bits per byte, copying and the built-in teacher",
    )
    add_number(
        parser,
        "--coreference",
        0,
        "[0, 100000]",
        "unseen built-in stories to measure coreference on",
    )
    add_number(
        parser,
        "--stories",
        0,
        "[0, 1e9]",
        "stories to write and measure, and files of some",
        files=".jsonl",
    )
    add(
        "--reader",
        metavar="NAME",
        help=f"read them for sense: {PACKAGED}, or a causal language model",
    )
    add(
        "--openings",
        metavar="FILE",
        help="their openings, a line each (default: the first file's, or eight built in)",
    )
    add_number(
        parser,
        "--max-new-tokens",
        InteractConfig.max_new_tokens,
        "[1, 1e6]",
        "longest story, in tokens",
    )
    add_number(
        parser, "--temperature", InteractConfig.temperature, "[0, 100]", "at which they are sampled"
    )
    add("--teacher-url", nargs="+", default=[], help="teacher that scores them (default: built in)")
    add(
        "--reward",
        default="",
        metavar="FILE.py:FUNCTION",
        help="the teacher of a --judge RUN that had this one",
    )
    add("--teacher-model", nargs="+", default=[], help="model name (default: the first listed)")
    add_number(
        parser,
        "--teacher-concurrency",
        InteractConfig.teacher_concurrency,
        "[1, 10000]",
        "requests in flight",
    )
    add_number(parser, "--seed", 0, SEEDS, "seed of the stories and of the teacher")
    add("--device", default="auto")
    add("--out", type=Path, help="report.json to write")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    options.count = max([0, *(value for value in options.stories if isinstance(value, int))])
    options.files = [value for value in options.stories if isinstance(value, Path)]
    story_files = [
        path for path in [*options.files, *(options.compare or [])] if path.suffix == ".jsonl"
    ][:1]
    openings = [story.opening for path in story_files for story in read_samples(path)] or OPENINGS
    options.openings = (
        load_openings(options.openings) if options.openings else [*dict.fromkeys(openings)]
    )
    if options.out:
        require_output(options.out)
    if options.compare is not None:
        compare_stories(options, options.compare or [newest_run()])
    elif options.judge is not None:
        judge_runs(options, options.judge or [newest_run()])
    else:
        evaluate(options)


def evaluate(options: argparse.Namespace) -> None:
    tasks = submission.find_tasks(options.babylm) if options.babylm else {}
    tasks |= {task: getattr(options, task) for task in TASKS if getattr(options, task)}
    measured = tasks or options.aoa or options.corpus or options.count or options.coreference
    if not options.files and not measured:
        raise UserError(
            "nothing to evaluate: give --blimp or another task, --corpus, --coreference N or --stories N; or files of "
            "stories, --stories FILE; or --compare or --judge"
        )
    if options.predictions and not (options.babylm or options.aoa):
        raise UserError(
            "--predictions needs the data that BabyLM asks for: give --babylm FOLDER or --aoa FILE"
        )
    checkpoints = options.checkpoints or ([newest_run()] if measured and not options.files else [])
    corpus = open_corpus(options.corpus) if options.corpus else None
    files = {path.name: read_samples(path)[: options.count or None] for path in options.files}
    reader = Reader(options.reader, options.device) if options.reader else None
    records, surprisals = list[dict[str, Any]](), list[dict[str, Any]]()
    with open_teacher(options) if options.count or files else contextlib.nullcontext() as grader:

        def measures(stories: Sequence[Sample]) -> dict[str, Any]:
            sense = (
                reader.measures([(story.opening, story.text) for story in stories])
                if reader
                else {}
            )
            return story_measures(stories, grader=grader, corpus=corpus) | sense

        for folder in tqdm(
            [checkpoint.find(path) for path in checkpoints], desc="checkpoints", disable=None
        ):
            student, tokenizer, history = checkpoint.load(folder, pick_device(options.device))
            words = history.get("words", 0) + history.get("interaction_words_in", 0)
            record: dict[str, Any] = {
                "name": name_of(folder),
                "checkpoint": str(folder),
                "words": words or None,
            }
            for task, data in tasks.items():
                record[task] = TASKS[task][0](student, tokenizer, data)
                if options.predictions and options.babylm:
                    submission.save_predictions(
                        options.predictions, folder, task, data, record[task]
                    )
                record[task].pop("predictions")
            if options.aoa:
                by_word = submission.word_surprisals(student, tokenizer, options.aoa)
                surprisals += [{"step": folder.name, "word_count": words} | row for row in by_word]
                finite = [
                    row["surprisal"] for row in by_word if row["surprisal"] == row["surprisal"]
                ]
                record["aoa"] = {"surprisal": mean_of(finite), "items": len(finite)}
            if options.coreference:
                record["coreference"] = coreference(
                    student, tokenizer, unseen_stories(options.coreference)
                )
            if seen := set(options.corpus or []) & set(history.get("corpus", [])):
                print(
                    f"{record['name']}: it was trained on {', '.join(sorted(seen))}, so that is no test of it"
                )
            if corpus:
                record["corpus"] = bits_per_byte(student, tokenizer, corpus.documents())
            if options.count:
                record["stories"] = measures(samples_of(folder, options))
            records.append(record)
        records += [
            {"name": name, "words": None, "stories": measures(stories)}
            for name, stories in files.items()
        ]
    if options.predictions and options.aoa:
        submission.save_surprisals(options.predictions, surprisals)
    print(*aligned([["", *(record["name"] for record in records)], *comparison(records)]), sep="\n")
    for record in records:
        if left_out := {
            task: record[task]["too_long"] for task in tasks if record.get(task, {}).get("too_long")
        }:
            print(f"{record['name']}: items longer than its context, left out: {left_out}")
    if options.out:
        text = (
            json.dumps({"tasks": tasks, "corpus": options.corpus, "checkpoints": records}, indent=1)
            + "\n"
        )
        atomic_write(options.out, text)


def compare_stories(options: argparse.Namespace, paths: Sequence[Path]) -> None:
    """Ask which stories are better, and print the second storyteller's win rate. Choices are kept
    in a run's folder."""
    if not options.teacher_url:
        raise UserError(
            "--compare needs a judge that sees two stories: give --teacher-url, of a model or of teach.py --compare"
        )
    options.count = options.count or COMPARED
    run = paths[0] if len(paths) == 1 else None
    pairs = compared_pairs(paths, lambda path: samples_of(path, options))
    settings = dict(concurrency=options.teacher_concurrency, seed=options.seed, template=COMPARISON)
    cache = run / "comparison_replies.jsonl" if run else None
    with Teacher(
        options.teacher_url, options.teacher_model or None, cache=cache, **settings
    ) as teacher:
        choices, second_place = compare(
            pairs, lambda texts: [grade.score for grade in teacher.grade_each(texts)]
        )
        by = str(teacher.model)
    rates = win_rate(choices)
    if not rates["pairs"]:
        raise UserError(
            f"{by} compared none of {len(pairs)} pairs: see scripts/doctor.py --teacher-url URL"
        )
    print(
        *preference_lines({by: rates}, BEFORE_AFTER if run else [name_of(path) for path in paths])
    )
    if second_place is not None:
        print(
            f"it preferred what came second in {second_place:.0%} of its answers (50 % without a bias)"
        )
    if None in choices:
        print(f"{choices.count(None)} pairs without an answer")
    if run:
        keep_choices(run, by, pairs, choices)
        print(f"report: {write_report(run)}")


def judge_runs(options: argparse.Namespace, runs: Sequence[Path]) -> None:
    """Show each run's stories and controls to a reader, and print how much of the gain it sees."""
    reader, pooled = Reader(options.reader or PACKAGED, options.device), list[Record]()
    typed = {name: getattr(options, name) for name in ("reward", "teacher_url", "teacher_model")}
    typed = {name: value for name, value in typed.items() if value}
    for run in runs:
        config: InteractConfig = recorded_config(InteractConfig, run, typed)
        corpus = (
            options.corpus
            or checkpoint.load(run / "checkpoints" / "start")[2].get("corpus")
            or ["builtin"]
        )
        if not options.corpus and (files := [name for name in corpus if name not in NAMES]):
            raise UserError(
                f"{run} would read {files[0]}, its student's corpus, and quote it as real stories; a run's folder may "
                f"come from somebody else, so if you trust it add --corpus {shlex.join(corpus)}"
            )
        compute = resolve(config.device, config.dtype)
        with open_grader(
            config, builtin_teacher, corpus=corpus, replies=run / "judge_replies.jsonl"
        ) as grader:
            records = judge_run(run, config, compute, reader, grader.grade_each, corpus)
        print_judged(str(run), records)
        print(f"report: {write_report(run)}")
        pooled += [record | {"index": record["index"] + len(pooled)} for record in records]
    if len(runs) > 1:
        print_judged(f"{len(runs)} runs together", pooled)


def print_judged(name: str, records: Sequence[Record]) -> None:
    print("", name, *aligned(judged_rows(records)), conclusion(records), sep="\n")


def samples_of(path: Path, options: argparse.Namespace) -> list[Sample]:
    """Stories from a file, or --stories by a student, with the same openings and random numbers for
    every student."""
    if path.suffix == ".jsonl":
        return read_samples(path)
    student, tokenizer, _ = checkpoint.load(checkpoint.find(path), pick_device(options.device))
    device = student.wte.weight.device
    memory.require_for_stories(options.count, options.max_new_tokens, student.config, device, FEWER)
    sampling = {
        name: getattr(options, name)
        for name in ("openings", "max_new_tokens", "temperature", "seed")
    }
    return write_stories(student, tokenizer, n_stories=options.count, **sampling)


def name_of(folder: Path) -> str:
    """RUN/chck_1M for RUN/checkpoints/chck_1M, else the folder's or file's own name."""
    folder = folder.resolve()
    return (
        f"{folder.parents[1].name}/{folder.name}"
        if folder.parent.name == "checkpoints"
        else folder.name
    )


def open_teacher(options: argparse.Namespace) -> AbstractContextManager[Grader]:
    names = ("teacher_url", "teacher_model", "teacher_concurrency", "seed")
    config = InteractConfig(**{name: getattr(options, name) for name in names})
    return open_grader(config, builtin_teacher, corpus=options.corpus or ["builtin"])


if __name__ == "__main__":
    main()
