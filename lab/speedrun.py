"""The speedrun: seconds to train a student from scratch until it tells stories, with compiled
kernels. lab/speedrun.md has the rules and explains how to take part.

python lab/speedrun.py                                       one seed of this checkout
python lab/speedrun.py --seeds N N N --against COMMIT        ratio to a commit, interleaved
python lab/speedrun.py --seeds N N N --against COMMIT --record "shorter contexts first"

Each run has two threads, no GPU and an empty cache of corpora, and consists of the user's commands
train_pretrain.py and train_interact.py with their defaults. --record adds a line to lab/speedrun.md
for each checkout after the first with means that satisfy the rules. Give several commits with the
oldest first, and a text of --record for each checkout after the oldest. The same teacher grades all
checkouts.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import numpy as np

from lab import recipes
from tinystory.config import PretrainConfig
from tinystory.evaluate.open_grader import open_grader
from tinystory.run.device import device_name
from tinystory.run.errors import UserError, command
from tinystory.run.options import script_parser
from tinystory.run.paths import ROOT, cache_dir

RECORDS = ROOT / "lab" / "speedrun.md"
THREADS = 2
# Bounds of the means over the seeds, of measures of lab/recipes.py. best_bits does not depend on a
# temperature, unlike the probabilities of names and pronouns. stories_before is the fraction of
# stories among the texts before interaction.
LEAST = {"reward": 0.65, "clusters": 39}
MOST = {"best_bits": 0.13, "stories_before": 0.6}
LEAST_SEEDS = 3
MOST_RATIO = 0.98  # the seconds of a record, divided by those of the record before, are below it
# Measures in the table of records; the others show whether stories became simpler.
RECORDED = (*LEAST, "repeated_name", "he_or_she", "best_bits")
MEASURES = (*RECORDED, "stories_before", "story", "distinct_4", "words", "largest")
STAGES = ("pretraining", "interaction")
LOAD = "from tinystory import ops; ops.load()"


@dataclass
class Side:
    """A timed checkout with its runs, one per seed: seconds by stage, and measures."""

    commit: str
    checkout: Path
    seconds: list[dict[str, float]] = field(default_factory=list)
    measures: list[dict[str, float]] = field(default_factory=list)

    def median_seconds(self) -> float:
        return median(sum(stages.values()) for stages in self.seconds)

    def means(self) -> dict[str, float]:
        return {name: fmean(run[name] for run in self.measures) for name in MEASURES}

    def meets_the_rules(self) -> bool:
        means = self.means()
        if len(self.measures) < LEAST_SEEDS:
            return False
        is_good = all(means[name] >= least for name, least in LEAST.items())
        return is_good and all(means[name] <= most for name, most in MOST.items())


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[0], metavar="N")
    add(
        "--against",
        nargs="+",
        default=[],
        metavar="COMMIT",
        help="commits of the records to beat, the oldest first",
    )
    add(
        "--record",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="text for each change after a commit of --against; adds lines to lab/speedrun.md",
    )
    options = parser.parse_args(argv)
    if options.record and len(options.record) != len(options.against):
        raise UserError(
            "--record needs one text per --against COMMIT, which says what the next checkout changed"
        )
    if options.record and git("status", "--porcelain"):
        raise UserError("--record needs a clean work tree, because the record names its commit")
    with tempfile.TemporaryDirectory() as scratch:
        sides = []
        try:
            for commit in options.against:
                checkout = Path(scratch, commit)
                git("worktree", "add", "--detach", str(checkout), commit)
                sides.append(Side(commit, checkout))
            sides.append(Side(git("rev-parse", "--short", "HEAD").strip(), ROOT))
            race(sides, options.seeds, Path(scratch))
        finally:
            for side in sides:
                if side.checkout != ROOT:
                    git("worktree", "remove", "--force", str(side.checkout))
    print_result(sides)
    if options.record:
        add_records(sides, options.record)


def race(sides: Sequence[Side], seeds: Sequence[int], scratch: Path) -> None:
    """Run and measure each side once per seed, interleaved."""
    for side in sides:
        start([sys.executable, "-c", LOAD], side.checkout)  # compiles the checkout's kernels
    for seed in seeds:
        for number, side in enumerate(sides):
            folder = scratch / f"{number}-{seed}"
            side.seconds.append(timed_run(side.checkout, folder, seed))
            side.measures.append(measured(folder))
            print(f"{side.commit}, seed {seed}: {line(side)}", flush=True)


def timed_run(checkout: Path, folder: Path, seed: int) -> dict[str, float]:
    """Seconds by stage. Leaves the students in folder/pretraining and folder/interaction."""
    cache = folder / "cache"
    cache.mkdir(parents=True)
    (cache / "kernels").symlink_to(cache_dir().absolute() / "kernels")
    pretrained = folder / "pretraining"
    arguments = {
        "pretraining": ["train_pretrain.py", "--out", pretrained],
        "interaction": ["train_interact.py", "--init", pretrained, "--out", folder / "interaction"],
    }
    seconds = {}
    for stage in STAGES:
        words = [sys.executable, *map(str, arguments[stage]), "--seed", str(seed)]
        began = time.perf_counter()
        start(words, checkout, TINYSTORY_CACHE=str(cache))
        seconds[stage] = time.perf_counter() - began
    return seconds


def start(words: list[str], checkout: Path, **variables: str) -> None:
    """Run a command in a checkout. Raises UserError, with the command's last lines, if it fails."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(THREADS),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(checkout),
    }
    done = subprocess.run(
        words, cwd=checkout, env=environment | variables, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{' '.join(words)} in {checkout} failed:\n{done.stderr[-2000:]}")


def measured(folder: Path) -> dict[str, float]:
    """MEASURES of the newest students in a timed run's folder, computed by this checkout's code and
    teacher."""
    by_stage = {}
    with open_grader(recipes.CONFIG, corpus=PretrainConfig().corpus) as grader:
        for stage in STAGES:
            row = recipes.Row("", folder / stage)
            by_stage[stage] = recipes.measure(row, grader, recipes.CONFIG, recipes.OPENINGS)
    measures = by_stage["interaction"] | {"stories_before": by_stage["pretraining"]["story"]}
    return {name: float(measures[name]) for name in MEASURES}


def line(side: Side) -> str:
    """A line on the last run of a side: seconds by stage, and measures."""
    seconds = side.seconds[-1]
    stages = ", ".join(f"{stage} {seconds[stage]:.1f} s" for stage in STAGES)
    measures = ", ".join(f"{name} {value:.3f}" for name, value in side.measures[-1].items())
    return f"{sum(seconds.values()):.1f} s ({stages}), {measures}"


def print_result(sides: Sequence[Side]) -> None:
    for i, side in enumerate(sides):
        verdict = "meets the rules" if side.meets_the_rules() else "does not meet the rules"
        means = ", ".join(f"{name} {mean:.3f}" for name, mean in side.means().items())
        print(f"{side.commit}: median {side.median_seconds():.1f} s, {verdict}: mean {means}")
        for other in sides[:i]:
            print(f"    ratio to {other.commit}: {ratio(other, side):.3f}")


def ratio(record: Side, challenger: Side) -> float:
    return challenger.median_seconds() / record.median_seconds()


def p_value(values: Sequence[float], least: float) -> float | None:
    """The p-value of a one-sided t-test: the probability of values as high as these if their
    expectation were `least`. None for fewer than two values, or if all are equal."""
    n = len(values)
    if n < 2 or stdev(values) == 0:
        return None
    t = (fmean(values) - least) / (stdev(values) / math.sqrt(n))
    # the probability between 0 and t, by the density of Student's distribution
    x = np.linspace(0.0, t, 10_001)
    logarithm = math.lgamma(n / 2) - math.lgamma((n - 1) / 2) - math.log((n - 1) * math.pi) / 2
    density = math.exp(logarithm) * (1 + x**2 / (n - 1)) ** (-n / 2)
    between = float(((density[1:] + density[:-1]) / 2 * np.diff(x)).sum())
    return 0.5 - between


def add_records(sides: Sequence[Side], changes: Sequence[str]) -> None:
    """Append a line to lab/speedrun.md for each side after the first that meets the rules, with the
    ratio to the previous record. changes: descriptions of the changes of the sides after the first.
    Raises UserError at the end if a side does not meet the rules."""
    record = sides[0]
    failed = []
    for challenger, change in zip(sides[1:], changes, strict=True):
        if challenger.meets_the_rules() and ratio(record, challenger) < MOST_RATIO:
            add_record(record, challenger, change)
            record = challenger
        else:
            failed.append(challenger.commit)
    if failed:
        raise UserError(
            f"no record: {', '.join(failed)}: the ratio of the seconds must be below {MOST_RATIO}, and the means over "
            f"{LEAST_SEEDS} seeds or more at least {LEAST} and at most {MOST}"
        )


def add_record(record: Side, challenger: Side, change: str) -> None:
    text = RECORDS.read_text()
    number = len(re.findall(r"^\| \d+ \|", text, re.M))
    p = p_value([run["reward"] for run in challenger.measures], LEAST["reward"])
    shown_p = "" if p is None else f"{p:.2g}"
    means = challenger.means()
    measures = " | ".join(f"{means[name]:.3f}" for name in RECORDED)
    cells = [
        str(number),
        challenger.commit,
        device_name("cpu"),
        f"{challenger.median_seconds():.0f}",
        f"{ratio(record, challenger):.3f}",
        measures,
        shown_p,
        change,
    ]
    row = f"| {' | '.join(cells)} |\n"
    RECORDS.write_text(text.rstrip("\n") + "\n" + row)
    print(row, end="")


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    main()
