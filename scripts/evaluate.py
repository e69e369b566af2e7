"""Evaluate checkpoints and files of stories: bits per byte, the teacher's score, diversity.

    python scripts/evaluate.py runs/demo/interact/checkpoints/start runs/demo/interact --stories 200
    python scripts/evaluate.py gpt4.jsonl people.jsonl      two files of stories, side by side

CHECKPOINT is a checkpoint, a run (its checkpoint `best`, or else the newest; default: the newest
run under runs/) or a folder saved by transformers. Each line of a .jsonl file is an object with an
`opening` and a `story`."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tinystory  # isort: skip  # noqa: F401  (first: it says which package is missing)
from tqdm import tqdm

from tinystory.config import InteractConfig
from tinystory.config.command_line import typed_config
from tinystory.data.corpus import open_corpus
from tinystory.data.openings import load_openings
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.open_grader import open_grader
from tinystory.evaluate.stories import (
    OPENINGS,
    Sample,
    read_samples,
    sample_stories,
    story_measures,
)
from tinystory.evaluate.validation import bits_per_byte
from tinystory.ops.compute import pick_device
from tinystory.report.evaluation import ROWS, comparison, unequal_counts
from tinystory.run.errors import UserError, command
from tinystory.run.files import atomic_write
from tinystory.run.folder import newest_run, require_output
from tinystory.run.options import add_number, add_options, script_parser
from tinystory.run.terminal import aligned, wrapped
from tinystory.student import checkpoint
from tinystory.student.model import Student

# Options of train_interact.py that this script has too.
TYPED = (
    "teacher_url",
    "teacher_model",
    "teacher_concurrency",
    "max_new_tokens",
    "seed",
    "device",
)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="CHECKPOINT|FILE.jsonl")
    add(
        "--corpus",
        nargs="+",
        metavar="NAME|FILE",
        help="corpus for bits per byte, to which the built-in teacher is fitted too",
    )
    add_number(
        parser,
        "--stories",
        0,
        "[0, 1e6]",
        "number of stories to sample from each checkpoint, and to read from each file; 0: none from a "
        "checkpoint, all of a file",
    )
    add_sampling(parser)
    add("--out", type=Path, help="report.json to write")
    return parser.parse_args(argv)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of `samples_of`, `openings_of` and the grader."""
    parser.add_argument(
        "--openings",
        metavar="FILE",
        help="file with one opening per line (default: the openings of the first .jsonl file, or eight "
        "built-in openings)",
    )
    add_number(
        parser,
        "--temperature",
        1.0,
        "[0, 100]",
        "sampling temperature; 1: each student's own distribution",
    )
    add_options(parser, InteractConfig, TYPED)


@command
def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    config = typed_config(options, TYPED)
    count = options.stories
    if options.out:
        require_output(options.out)
    samples = {path: read_samples(path) for path in options.paths if path.suffix == ".jsonl"}
    paths = options.paths or [newest_run()]
    # checked before the teacher starts, which takes seconds
    folders = {path: checkpoint.find(path) for path in paths if path not in samples}
    if not samples and not options.corpus and not count:
        raise UserError(
            "nothing to evaluate: give --corpus, --stories N, or a .jsonl file of stories"
        )
    openings = openings_of(options.openings, list(samples.values()))
    corpus = open_corpus(options.corpus) if options.corpus else None

    records: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        grader = None
        if count or samples:
            teacher = open_grader(config, corpus=options.corpus or ["builtin"])
            grader = stack.enter_context(teacher)
        for path in tqdm(paths, desc="evaluated", disable=None):
            if path in samples:
                record: dict[str, Any] = {"name": path.name, "words": None}
                stories = samples[path][: count or None]
            else:
                folder = folders[path]
                student, tokenizer, history = checkpoint.load(folder, pick_device(config.device))
                record = student_record(folder, history)
                trained_on = set(options.corpus or []) & set(history.get("corpus", []))
                if trained_on:
                    names = ", ".join(sorted(trained_on))
                    print(
                        f"{record['name']} was trained on {names}, so these are not held-out texts for it"
                    )
                if corpus:
                    record["corpus"] = bits_per_byte(student, tokenizer, corpus.documents())
                stories = []
                if count:
                    stories = samples_of(student, tokenizer, openings, options)
            if stories:
                record["stories"] = story_measures(stories, grader=grader)
            records.append(record)
    for line in aligned(comparison(records, ROWS)):
        print(line)
    note = unequal_counts(records)
    if note:
        print(wrapped(note))
    if options.out:
        report = {"corpus": options.corpus, "checkpoints": records}
        atomic_write(options.out, json.dumps(report, indent=1) + "\n")


def student_record(folder: Path, history: dict[str, Any]) -> dict[str, Any]:
    """The fields that identify a checkpoint in a report: name, path, and number of training
    words."""
    words = history.get("words", 0) + history.get("interaction_words_in", 0)
    return {"name": name_of(folder), "checkpoint": str(folder), "words": words or None}


def openings_of(file: str | None, samples: Sequence[Sequence[Sample]]) -> Sequence[str]:
    """The openings in `file`, or else the openings of the first samples, or else OPENINGS."""
    if file:
        return load_openings(file)
    if samples:
        return list(dict.fromkeys(story.opening for story in samples[0]))
    return OPENINGS


def samples_of(
    student: Student,
    tokenizer: Tokenizer,
    openings: Sequence[str],
    options: argparse.Namespace,
) -> list[Sample]:
    """--stories stories by a student, with the same random numbers for every student."""
    config = typed_config(options, TYPED)
    return sample_stories(
        student,
        tokenizer,
        openings=openings,
        n_stories=options.stories,
        max_new_tokens=config.max_new_tokens,
        temperature=options.temperature,
        seed=config.seed,
    )


def name_of(folder: Path) -> str:
    """The name shown for a path: RUN/chck_1M for RUN/checkpoints/chck_1M, otherwise the name of the
    folder or file."""
    folder = folder.resolve()
    if folder.parent.name == "checkpoints":
        return f"{folder.parents[1].name}/{folder.name}"
    return folder.name


if __name__ == "__main__":
    main()
