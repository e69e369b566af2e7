"""Compare two stories for the same opening blindly and in both orders: which is better?

python lab/compare.py runs/demo/interact --teacher-url URL   before against after interaction
                                                             (default: the newest run)
python lab/compare.py A B --teacher-url URL                  the stories of A against those of B

A and B are checkpoints, runs, folders saved by transformers, or .jsonl files with an `opening` and
a `story` in each line. URL is the server of a language model. With --teacher-prompt
lab/preference.json, a small model answers a yes-or-no question, and the probability of its answer
counts. To compare the stories yourself, run scripts/teach.py with --teacher-prompt
lab/comparison.json, and give the URL of its page. The result about a run is saved in the run's
folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)

from lab import findings
from lab.preference import (
    BEFORE_AFTER,
    COMPARISON,
    compare,
    compared_pairs,
    preference_line,
    scores_of,
    win_rate,
)
from scripts.evaluate import TYPED, add_sampling, name_of, openings_of, samples_of
from tinystory.config.command_line import typed_config
from tinystory.evaluate.stories import Sample, read_samples
from tinystory.ops.compute import pick_device
from tinystory.run.errors import UserError, command
from tinystory.run.folder import newest_run
from tinystory.run.options import add_number, script_parser
from tinystory.student import checkpoint
from tinystory.teacher.client import Teacher
from tinystory.teacher.named_protocols import load_protocol

TITLE = "Stories before and after, compared blindly"
COMPARED = 40  # default number of stories


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="RUN|A B")
    add_number(
        parser, "--stories", COMPARED, "[1, 1e6]", "number of stories that each checkpoint writes"
    )
    add("--teacher-prompt", default=COMPARISON, metavar="FILE", help="what the judge is asked")
    add_sampling(parser)
    options = parser.parse_args(argv)
    config = typed_config(options, TYPED)
    if not config.teacher_url:
        raise UserError(
            "a comparison needs a judge that reads two stories: give --teacher-url, of a model or of scripts/teach.py "
            "--teacher-prompt lab/comparison.json"
        )
    protocol = load_protocol(options.teacher_prompt)
    paths = options.paths or [newest_run()]
    run = paths[0] if len(paths) == 1 else None
    samples = {path: read_samples(path) for path in paths if path.suffix == ".jsonl"}
    openings = openings_of(options.openings, list(samples.values()))

    def stories_of(path: Path) -> list[Sample]:
        if path in samples:
            return samples[path]
        folder = checkpoint.find(path)
        student, tokenizer, _ = checkpoint.load(folder, pick_device(config.device))
        return samples_of(student, tokenizer, openings, options)

    pairs = compared_pairs(paths, stories_of)
    cache = run / "comparison_replies.jsonl" if run else None
    with Teacher(
        config.teacher_url,
        config.teacher_model,
        cache=cache,
        concurrency=config.teacher_concurrency,
        seed=config.seed,
        protocol=protocol,
    ) as teacher:
        choices, second_place = compare(pairs, scores_of(teacher))
        judge = str(teacher.model)
    rates = win_rate(choices)
    if not rates["pairs"]:
        raise UserError(
            f"{judge} compared none of {len(pairs)} pairs: see scripts/doctor.py --teacher-url URL"
        )
    names = BEFORE_AFTER if run else [name_of(path) for path in paths]
    line = preference_line(judge, rates, names)
    print(line)
    if second_place is not None:
        print(
            f"{judge} preferred the second story in {second_place:.0%} of the answers (50 % without position bias)"
        )
    if None in choices:
        print(f"{choices.count(None)} pairs without an answer")
    if run:
        findings.keep(run, f"{TITLE} by {judge}", [line])


if __name__ == "__main__":
    main()
