"""Score the coherence of stories by a reader: a language model that was not their
teacher.

python lab/judge.py runs/a runs/b             gain of these runs by the reader (default: the newest
                                              run)
python lab/judge.py ours.jsonl people.jsonl   stories from any source, side by side; each line has an
                                              `opening` and a `story`
python lab/judge.py --calibrate               how well the reader distinguishes real stories from
                                              corrupted ones
"""

import argparse
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch

from lab import findings
from lab.intervals import interval
from lab.reader import PACKAGED, Reader, mean_and_bootstrap_ci
from lab.second_judge import AFTER, BEFORE, conclusion, gain, judge_run, judged_rows
from tinystory.config import InteractConfig
from tinystory.config.record import recorded_config
from tinystory.data.corpus import recorded_corpus
from tinystory.data.openings import Openings, load_openings
from tinystory.evaluate.calibration import FULL, calibrate, table, verdict
from tinystory.evaluate.corruptions import corpus_documents, known_stories
from tinystory.evaluate.intervals import with_ci
from tinystory.evaluate.likelihood import Likelihood
from tinystory.evaluate.open_grader import open_grader
from tinystory.evaluate.stories import Sample, read_samples
from tinystory.ops.compute import resolve
from tinystory.run.errors import command
from tinystory.run.folder import newest_run
from tinystory.run.options import add_number, add_options, script_parser
from tinystory.run.records import Record
from tinystory.run.terminal import aligned
from tinystory.student import checkpoint

TITLE = "A judge that was not the teacher"
NOTE = (
    "Stories for the same held-out openings, and real stories, scored by the teacher and by a "
    "language model that was not the teacher (a coherence score in nats per token: "
    "lab/reader.py), with 95 % intervals. If only the teacher's score rises, the student has "
    "learned to please the teacher. If a lower temperature gives the same gain, no training was "
    "needed."
)
# Options that name a run's teacher and openings. If they are files, URLs or models, they must be
# given again, because a folder may not name them.
AGAIN = ("teacher_url", "teacher_model", "teacher_extra", "teacher_prompt", "reward", "openings")


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="RUN|FILE.jsonl")
    add(
        "--reader",
        default=PACKAGED,
        metavar="NAME",
        help=f"language model that judges: {PACKAGED}, or a causal model of the Hub or in a folder",
    )
    add("--calibrate", action="store_true", help="test the reader on texts of known quality")
    add_number(
        parser, "--per-kind", FULL, "[2, 1e6]", "number of texts of each kind for --calibrate"
    )
    add(
        "--corpus",
        nargs="+",
        metavar="NAME|FILE",
        help="corpus of the real stories and of the built-in teacher (default: the student's)",
    )
    add_options(parser, InteractConfig, AGAIN)
    add("--device", default="auto")
    options = parser.parse_args(argv)
    samples = {path.name: read_samples(path) for path in options.paths if path.suffix == ".jsonl"}
    runs = [path for path in options.paths if path.suffix != ".jsonl"]
    if not options.paths and not options.calibrate:
        runs = [newest_run()]
    reader = Reader(options.reader, options.device)
    if options.calibrate:
        calibrate_reader(options, reader)
    if samples:
        print(*aligned(sense_rows(reader, samples)), sep="\n")
    judge_runs(options, reader, runs)


def calibrate_reader(options: argparse.Namespace, reader: Reader) -> None:
    def grade(stories: Sequence[tuple[str, str]]) -> list[float | None]:
        coherences = reader.coherence(stories).tolist()
        return [None if math.isnan(coherence) else coherence for coherence in coherences]

    known = known_stories(corpus_documents(options.corpus or ["builtin"]), options.per_kind)
    result = calibrate(grade, known)
    print(*aligned(table(options.reader, result)), sep="\n")
    print(f"the reader {verdict(result)}")


def sense_rows(reader: Reader, samples: Mapping[str, Sequence[Sample]]) -> list[list[str]]:
    """A header, and a row per file of stories: name, number of stories, mean coherence."""
    rows = [["", "stories", "sense, nats per token"]]
    for name, stories in samples.items():
        coherences = reader.coherence([(story.opening, story.text) for story in stories])
        mean, ci = mean_and_bootstrap_ci(coherences)
        rows.append([name, str(len(stories)), with_ci(mean, ci)])
    return rows


def judge_runs(options: argparse.Namespace, reader: Reader, runs: Sequence[Path]) -> None:
    """Measure the coherence of each run's stories and controls, and print the gain."""
    typed = {name: value for name, value in vars(options).items() if name in AGAIN}
    gains: list[float] = []
    for run in runs:
        unused = ["init", "control", *(["corpus"] if options.corpus else [])]
        config: InteractConfig = recorded_config(InteractConfig, run, typed, unused)
        corpus = options.corpus or config.corpus or own_corpus(run)
        compute = resolve(config.device, config.dtype)
        with open_grader(
            config,
            corpus=corpus,
            replies=run / "judge_replies.jsonl",
            likelihood=functools.partial(likelihood, run, config, compute.device),
        ) as grader:
            records = judge_run(run, config, compute, reader, grader.grade_each, corpus)
        print_judged(str(run), records)
        findings.keep(run, TITLE, [conclusion(records), NOTE], judged_rows(records))
        gains.append(gain(records, AFTER, BEFORE)[0])
    if len(runs) > 1:
        print(f"\n{len(runs)} runs: a gain in coherence of {interval(gains)} nats per token")


def likelihood(run: Path, config: InteractConfig, device: torch.device) -> Likelihood:
    """The scorer of a run with --reward likelihood."""
    student, tokenizer, _ = checkpoint.load(run / "checkpoints" / "start", device)
    openings = Openings(load_openings(config.openings), config.seed, config.stories_per_opening)
    return Likelihood(student, tokenizer, openings.train, config)


def own_corpus(run: Path) -> Sequence[str]:
    """The corpus of a run's student. Raises UserError if it was a file."""
    start = run / "checkpoints" / "start"
    _, _, history = checkpoint.load(start)
    return recorded_corpus(history.get("corpus") or ["builtin"], start)


def print_judged(name: str, records: Sequence[Record]) -> None:
    print("", name, *aligned(judged_rows(records)), conclusion(records), sep="\n")


if __name__ == "__main__":
    main()
