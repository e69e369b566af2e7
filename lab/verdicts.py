"""How often is a verdict of --control wrong? Random scores teach small students, so every verdict
"more than its control" or "less than its control" is wrong.

python lab/verdicts.py --seeds 20

For each seed, train_interact.py trains the same small student on random scores, with three controls
in random order. The command prints Markdown: by measure, the number of verdicts of each kind, with
three controls; and how many runs would be more or less than their first control by the 95 %
interval over openings alone. Finished runs are not repeated."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)

from lab.runs import folder_of, train, train_controls
from tinystory.evaluate.control import FEWEST_CONTROLS, Comparison, read_comparisons
from tinystory.run.errors import command
from tinystory.run.folder import locked
from tinystory.run.options import add_number, script_parser

WORDS = 150_000
PRETRAIN = "--n-layer 2 --n-embd 64 --n-head 1 --context 128 --vocab-size 512 --device cpu".split()
INTERACT = "--reward random --stories-per-step 64 --steps 3 --max-new-tokens 50".split()
INTERACT += ["--eval-every", "0", "--device", "cpu"]
VERDICTS = (
    "more than its control",
    "less than its control",
    "as its control",
    "not told apart at this size",
)


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--out", default="runs/verdicts", help="folder for the runs")
    add_number(parser, "--seeds", 20, "[1, 10000]", "number of runs")
    options = parser.parse_args(argv)
    out = folder_of(options.out)
    comparisons = []
    with locked(out):
        start = out / "pretrain"
        train(start, ["--words", str(WORDS), *PRETRAIN], words=WORDS)
        for seed in range(options.seeds):
            run = out / f"seed-{seed}"
            train(run, ["--init", str(start), "--seed", str(seed), *INTERACT])
            train_controls(run, "shuffled", count=FEWEST_CONTROLS)
            comparisons += read_comparisons(run)
    print_table(comparisons)


def print_table(comparisons: Sequence[Comparison]) -> None:
    print(f"| measure | {' | '.join(VERDICTS)} | apart by one control |")
    print("|---" * (len(VERDICTS) + 2) + "|")
    for measure in comparisons[0].differences():
        verdicts = Counter(each.differences()[measure].verdict for each in comparisons)
        apart = sum(is_apart(each, measure) for each in comparisons)
        counts = [str(verdicts[verdict]) for verdict in VERDICTS]
        print(f"| {measure} | {' | '.join(counts)} | {apart} |")


def is_apart(comparison: Comparison, measure: str) -> bool:
    """Whether the interval over openings of run minus first control excludes 0."""
    alone = replace(comparison, controls=comparison.controls[:1], shuffled=())
    of = alone.differences()[measure]
    return abs(of.by_teacher) > of.half


if __name__ == "__main__":
    main()
