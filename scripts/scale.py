"""What bounds interaction at scale: seconds per step, the bottleneck, hours and money, by student, GPUs and teachers.

    python scripts/scale.py                                                   an H100's peak rates, and what is assumed
    python scripts/scale.py --bench ppo.jsonl --teacher-bench teacher.json    rates measured here

ppo.jsonl holds lines of `bench.py ppo --json`, of one batch or, better, of two; teacher.json is the line of
`bench_teacher.py --teacher-url URL`. "Ahead" is a loop that does not exist here: the next stories are written while the
teacher grades, so each step learns from stories of the policy before the last update.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.config import INTERACT_PRESETS, add_number
from tinystory.run.errors import UserError, command
from tinystory.studies.scale import STUDENTS, forecast

NUMBERS = (
    (
        "--client-per-s",
        600.0,
        "(0, 1e9]",
        "stories per second of our client: bench_teacher.py's ours_per_s",
    ),
    ("--teacher-parameters", 8e9, "[1, 1e15]", "parameters of the estimated teacher"),
    ("--peak-tflops", 989.0, "(0, 1e9]", "peak of the GPU: an H100's in bfloat16"),
    ("--mfu", 0.4, "(0, 1]", "fraction of the peak that is assumed to be reached"),
    ("--bandwidth", 2000.0, "(0, 1e9]", "memory bandwidth that is assumed to be reached, in GB/s"),
    ("--layer-us", 20.0, "[0, 1e9]", "microseconds that a pass through a layer takes at least"),
    ("--link", 50.0, "(0, 1e9]", "GB/s at which each GPU sends gradients"),
    ("--gpu-price", 2.5, "[0, 1e9]", "price of a GPU-hour, in any currency"),
    ("--server-price", 2.5, "[0, 1e9]", "price of an hour of a teacher server"),
    ("--story-price", 0.0, "[0, 1e9]", "price of a grade, for a hosted teacher"),
    ("--stale", 0.9, "(0, 1]", "assumed worth of a step on stories of the last policy, where fresh ones are 1"),
)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=INTERACT_PRESETS, default="paper", help="sizes of a step, and how many (default: paper)")
    add("--students", nargs="+", choices=STUDENTS, default=["1M", "10M", "124M", "1.5B"], help="parameters")
    add("--gpus", nargs="+", type=int, default=[1, 8, 64], metavar="N", help="numbers of GPUs (default: 1 8 64)")
    add("--servers", nargs="+", type=int, default=[1, 8, 64], metavar="N", help="numbers of teacher servers")
    add("--bench", type=Path, metavar="FILE", help="lines of bench.py ppo --json, in place of an estimate")
    add("--teacher-bench", type=Path, metavar="FILE", help="a line of bench_teacher.py, in place of an estimate")
    for number in NUMBERS:
        add_number(parser, *number)
    options = parser.parse_args(argv)
    if min(*options.gpus, *options.servers) < 1:
        raise UserError("--gpus and --servers must be at least 1")
    forecast(options)


if __name__ == "__main__":
    main()
