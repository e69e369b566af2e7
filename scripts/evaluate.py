"""Measure checkpoints and stories by anybody: bits per byte, the teacher's score, diversity.

    python scripts/evaluate.py runs/pretrain/checkpoints/chck_* --stories 200 --corpus builtin
    python scripts/evaluate.py --stories 200 gpt4.jsonl people.jsonl    stories, side by side

CHECKPOINT is a checkpoint, a run (its best or newest checkpoint; the default is the newest run
under runs/) or a folder that transformers wrote. A .jsonl file of stories has an `opening` and a
`story` in each line.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from tinystory.config import SEEDS, InteractConfig
from tinystory.data.corpus import open_corpus
from tinystory.data.openings import load_openings
from tinystory.evaluate.stories import (
    OPENINGS,
    Sample,
    read_samples,
    story_measures,
    write_stories,
)
from tinystory.evaluate.validation import bits_per_byte
from tinystory.ops.compute import pick_device
from tinystory.report.evaluation import ROWS, comparison
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import UserError, command
from tinystory.run.files import atomic_write
from tinystory.run.folder import newest_run, require_output
from tinystory.run.options import add_number, script_parser
from tinystory.run.terminal import aligned
from tinystory.student import checkpoint, memory
from tinystory.teacher.grade import Grader
from tinystory.teacher.grader import open_grader

FEWER = "--stories or --max-new-tokens"


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, default=[], metavar="CHECKPOINT")
    add(
        "--corpus",
        nargs="+",
        metavar="NAME|FILE",
        help="text for bits per byte, and for the built-in teacher",
    )
    add_number(
        parser,
        "--stories",
        0,
        "[0, 1e9]",
        "stories to write and measure, and files of some",
        files=".jsonl",
    )
    add("--teacher-url", nargs="+", default=[], help="teacher that scores them (default: built in)")
    add("--teacher-model", nargs="+", default=[], help="model name (default: the first listed)")
    add_number(
        parser,
        "--teacher-concurrency",
        InteractConfig.teacher_concurrency,
        "[1, 10000]",
        "requests in flight",
    )
    add_sampling(parser)
    add("--out", type=Path, help="report.json to write")
    return parser.parse_args(argv)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of `samples_of` and `openings_of`."""
    parser.add_argument(
        "--openings",
        metavar="FILE",
        help="openings of the stories, a line each (default: the first file's, or eight built in)",
    )
    add_number(
        parser,
        "--max-new-tokens",
        InteractConfig.max_new_tokens,
        "[1, 1e6]",
        "longest story, in tokens",
    )
    add_number(
        parser,
        "--temperature",
        None,
        "[0, 100]",
        "at which they are sampled (default: each student's own)",
    )
    add_number(parser, "--seed", 0, SEEDS, "seed of the stories and of the teacher")
    parser.add_argument("--device", default="auto")


@command
def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    count = 0
    paths: list[Path] = []
    for value in options.stories:
        if isinstance(value, Path):
            paths.append(value)
        else:
            count = max(count, value)
    if not paths and not options.corpus and not count:
        raise UserError(
            "nothing to evaluate: give --corpus, --stories N, or files of stories, --stories FILE"
        )
    openings = openings_of(options.openings, paths)
    if options.out:
        require_output(options.out)
    checkpoints = options.checkpoints
    if not checkpoints and not paths:
        checkpoints = [newest_run()]
    corpus = open_corpus(options.corpus) if options.corpus else None
    files = {path.name: read_samples(path)[: count or None] for path in paths}

    records: list[dict[str, Any]] = []
    with open_teacher(options) if count or files else contextlib.nullcontext() as grader:
        folders = [checkpoint.find(path) for path in checkpoints]
        for folder in tqdm(folders, desc="checkpoints", disable=None):
            student, tokenizer, history = checkpoint.load(folder, pick_device(options.device))
            record = student_record(folder, history)
            trained_on = set(options.corpus or []) & set(history.get("corpus", []))
            if trained_on:
                names = ", ".join(sorted(trained_on))
                print(f"{record['name']}: it was trained on {names}, so that is no test of it")
            if corpus:
                record["corpus"] = bits_per_byte(student, tokenizer, corpus.documents())
            if count:
                stories = samples_of(folder, count, openings, options)
                record["stories"] = story_measures(stories, grader=grader)
            records.append(record)
        for name, stories in files.items():
            measures = story_measures(stories, grader=grader)
            records.append({"name": name, "words": None, "stories": measures})
    for line in aligned(comparison(records, ROWS)):
        print(line)
    if options.out:
        report = {"corpus": options.corpus, "checkpoints": records}
        atomic_write(options.out, json.dumps(report, indent=1) + "\n")


def student_record(folder: Path, history: dict[str, Any]) -> dict[str, Any]:
    """What identifies a checkpoint in a report: its name, its path, and the words it has read."""
    words = history.get("words", 0) + history.get("interaction_words_in", 0)
    return {"name": name_of(folder), "checkpoint": str(folder), "words": words or None}


def openings_of(file: str | None, paths: Sequence[Path]) -> Sequence[str]:
    """The openings in `file`; else those of the first file of stories among the paths; else
    OPENINGS."""
    if file:
        return load_openings(file)
    story_files = [path for path in paths if path.suffix == ".jsonl"]
    if not story_files:
        return OPENINGS
    openings = [story.opening for story in read_samples(story_files[0])]
    return list(dict.fromkeys(openings))


def samples_of(
    path: Path, count: int, openings: Sequence[str], options: argparse.Namespace
) -> list[Sample]:
    """The stories of a file, or `count` by a student, with the same random numbers for every
    student."""
    if path.suffix == ".jsonl":
        return read_samples(path)
    folder = checkpoint.find(path)
    student, tokenizer, history = checkpoint.load(folder, pick_device(options.device))
    device = student.wte.weight.device
    temperature = options.temperature
    if temperature is None:
        temperature = checkpoint.temperature(history)
    memory.require_for_stories(count, options.max_new_tokens, student.config, device, FEWER)
    return write_stories(
        student,
        tokenizer,
        openings=openings,
        n_stories=count,
        max_new_tokens=options.max_new_tokens,
        temperature=temperature,
        seed=options.seed,
    )


def name_of(folder: Path) -> str:
    """RUN/chck_1M for RUN/checkpoints/chck_1M, else the folder's or file's own name."""
    folder = folder.resolve()
    if folder.parent.name == "checkpoints":
        return f"{folder.parents[1].name}/{folder.name}"
    return folder.name


def open_teacher(options: argparse.Namespace) -> AbstractContextManager[Grader]:
    names = ("teacher_url", "teacher_model", "teacher_concurrency", "seed")
    config = InteractConfig(**{name: getattr(options, name) for name in names})
    return open_grader(config, builtin_teacher, corpus=options.corpus or ["builtin"])


if __name__ == "__main__":
    main()
