"""What bounds interaction at scale: seconds per step, the bottleneck, hours and money, by student, GPUs and teachers.

    python scripts/scale.py                                                   an H100's peak rates, and what is assumed
    python scripts/scale.py --bench ppo.jsonl --teacher-bench teacher.json    rates measured here
    python scripts/scale.py --check runs/pretrain                             predicted / measured, with slow teachers

ppo.jsonl holds lines of `bench.py ppo --json`, of one batch or, better, of two; teacher.json is the line of
`bench_teacher.py --latency S` or `--teacher-url URL`. "Ahead" is a loop that we do not have: the next stories are
written while the teacher grades, so each step learns from stories of the policy before the last update.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.bench import SHAPES
from scripts.bench_teacher import AT_ONCE, local_server
from tinystory.config import INTERACT_PRESETS, InteractConfig
from tinystory.run.errors import UserError, command
from tinystory.run.folder import read_metrics
from tinystory.run.paths import ROOT
from tinystory.studies.scale import (
    STUDENTS,
    Cost,
    Gpu,
    Student,
    Teacher,
    Work,
    estimated,
    estimated_teacher,
    measured,
    scaled,
    step,
)

STUDENT_KEYS = ("shape", "batch", "new", "rollout_s", "reference_s", "update_s")
HEAD = (
    "student  rates       GPUs  servers |    write     read     wait   update    grads     step | bottleneck       "
    "    hours      cost   one step ahead"
)
PARTS = ("rollout_s", "reference_s", "teacher_s", "update_s")
STEPS, STORIES, TOKENS = 7, 48, 60  # of each run of --check; few stories end before 60 tokens
CHECKS = (
    (1, 0.1),
    (1, 1.0),
    (1, 4.0),
    (3, 1.0),
    (3, 4.0),
    (6, 1.0),
)  # servers, seconds of grading: the student's are 1
NUMBERS = {  # flag: (default, least, help)
    "--client-per-s": (600.0, 1e-9, "stories per second that our client can ask for: bench_teacher.py's ours_per_s"),
    "--teacher-parameters": (8e9, 1.0, "parameters of the estimated teacher"),
    "--peak-tflops": (989.0, 1e-9, "peak of the GPU: an H100's in bfloat16"),
    "--mfu": (0.4, 1e-9, "fraction of the peak that is assumed to be reached"),
    "--bandwidth": (2000.0, 1e-9, "memory bandwidth that is assumed to be reached, in GB/s"),
    "--layer-us": (20.0, 0.0, "microseconds that a pass through a layer takes at least"),
    "--link": (50.0, 1e-9, "GB/s at which each GPU sends gradients"),
    "--gpu-price": (2.5, 0.0, "price of a GPU-hour, in any currency"),
    "--server-price": (2.5, 0.0, "price of an hour of a teacher server"),
    "--story-price": (0.0, 0.0, "price of a grade, for a hosted teacher"),
    "--stale": (0.9, 1e-9, "assumed worth of a step on stories of the last policy, where fresh ones are 1"),
}


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
    add("--stories-per-s", type=float, metavar="X", help="the same by hand: stories per second of a server, with ...")
    add("--latency", type=float, metavar="S", help="... seconds per reply")
    for flag, (default, _, help) in NUMBERS.items():
        add(flag, type=float, default=default, metavar="X", help=f"{help} (default: {default:g})")
    add("--check", type=Path, metavar="CHECKPOINT", help="train a few steps from it with slow teachers, and compare")
    a = parser.parse_args(argv)
    for flag, (_, least, _) in NUMBERS.items():
        if not getattr(a, flag[2:].replace("-", "_")) >= least:
            raise UserError(f"{flag} must be {'above 0' if least else 'at least 0'}")
    if min(*a.gpus, *a.servers) < 1:
        raise UserError("--gpus and --servers must be at least 1")
    if (a.stories_per_s is None) != (a.latency is None) or min(a.stories_per_s or 1, a.latency or 1) <= 0:
        raise UserError("--stories-per-s and --latency go together, and are above 0")
    if a.check:
        check(a.check)
    else:
        forecast(a)


def forecast(a: argparse.Namespace) -> None:
    """Print the table."""
    config = InteractConfig(**INTERACT_PRESETS[a.preset])
    tokens, work = config.max_new_tokens, Work(config.stories_per_step, config.epochs, config.minibatch_size)
    gpu = Gpu(a.peak_tflops * 1e12 * a.mfu, a.bandwidth * 1e9, a.layer_us * 1e-6)
    known = measured(read_lines(a.bench, STUDENT_KEYS), SHAPES, tokens) if a.bench else []
    if a.teacher_bench:
        line = read_lines(a.teacher_bench, ("one_per_s",))[-1]
        latency = line["latency_s" if "latency_s" in line else "rubric_first_s"]
        teacher = Teacher(line["one_per_s"], latency, a.client_per_s, "measured")
    elif a.stories_per_s:
        teacher = Teacher(a.stories_per_s, a.latency, a.client_per_s, "given")
    else:
        teacher = estimated_teacher(int(a.teacher_parameters), gpu, a.client_per_s)
    print(
        f"{a.preset}: {config.steps} steps of {work.stories} stories of {tokens} tokens, {work.epochs} epochs\n"
        f"teacher ({teacher.source}): {teacher.per_s:.3g} stories/s per server, {teacher.latency:.3g} s per reply; "
        f"client: {teacher.client_per_s:g} stories/s"
    )
    if not known or teacher.source == "estimate":
        print(
            f"an estimate is no measurement: {a.peak_tflops:g} TFLOP/s at an assumed MFU of {a.mfu:g}, {a.bandwidth:g} "
            f"GB/s, {a.layer_us:g} us per layer"
        )
    print(HEAD)
    for name in a.students:
        student = scaled(known, STUDENTS[name]) if known else estimated(STUDENTS[name], gpu, tokens)
        steps = {(g, s): step(student, teacher, work, g, s, a.link * 1e9) for g in a.gpus for s in a.servers}
        hours = {at: config.steps * took.seconds / 3600 for at, took in steps.items()}
        grades = config.steps * work.stories * a.story_price
        cost = {(g, s): hours[g, s] * (g * a.gpu_price + s * a.server_price) + grades for g, s in steps}
        for at, took in steps.items():
            pays = "pays" if took.gain * a.stale > 1 else ""
            best = "  cheapest" * (at == min(cost, key=cost.__getitem__))
            best += "  fastest" * (at == min(hours, key=hours.__getitem__))
            parts = (took.write, took.read, took.wait, took.update, took.exchange, took.seconds)
            text = f"{name:>7}  {student.source:<12}{at[0]:>4}{at[1]:>9} |" + "".join(f"{part:9.3f}" for part in parts)
            text += f" | {took.bottleneck:<18}{hours[at]:8.2f}{cost[at]:10.2f}{took.gain:7.2f}x {pays:<5}{best}"
            print(text.rstrip())


def read_lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The JSON objects of the file, one per line, that have all these keys; raises UserError if there is none."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): give a file of lines of JSON") from error
    found = [line for line in lines if all(key in line for key in keys)]
    if not found:
        raise UserError(f"no line of {path} has {', '.join(keys)}: {path} must hold what the benchmark printed")
    return found


# --- runs here --------------------------------------------------------------------------------------------------------
def check(init: Path) -> None:
    """Print predicted and measured seconds per step, with teachers of several speeds. The student's own seconds are
    from the runs before and after each, with a teacher that answers at once."""
    fast = train(init, latency=0.0, servers=1)
    for servers, share in CHECKS:
        waves = -(-STORIES // (AT_ONCE * servers))
        latency = share * (fast["rollout_s"] + fast["reference_s"] + fast["update_s"]) / waves
        slow = train(init, latency, servers)
        again = train(init, latency=0.0, servers=1)
        own = {name: (fast[name] + again[name]) / 2 for name in fast}
        write, read, update = (Cost(own[name], 0.0) for name in ("rollout_s", "reference_s", "update_s"))
        client = STORIES / (own["reference_s"] + own["teacher_s"])
        teacher = Teacher(AT_ONCE / latency, latency, client, "given")
        took = step(Student(0, write, read, update, "measured"), teacher, Work(STORIES, 1, 0), 1, servers, link=1.0)
        seconds = sum(slow.values())
        print(
            f"{servers} x {AT_ONCE} at once, {latency:.3f} s per reply: predicted {took.seconds:.3f} s, waiting "
            f"{took.wait:.3f} ({took.bottleneck}); measured {seconds:.3f}, waiting {slow['teacher_s']:.3f}; ratio "
            f"{took.seconds / seconds:.3f}",
            flush=True,
        )
        fast = again


def train(init: Path, latency: float, servers: int) -> dict[str, float]:
    """Median seconds of each part of a step of train_interact.py, the first step apart, with such servers."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        urls = [stack.enter_context(local_server(latency)) for _ in range(servers)]
        how: dict[str, object] = dict(steps=STEPS, stories_per_step=STORIES, max_new_tokens=TOKENS)
        how |= dict(
            eval_every=0, eval_stories=1, epochs=1, teacher_concurrency=AT_ONCE, init=init, out=Path(folder) / "run"
        )
        flags = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, str(ROOT / "train_interact.py"), *flags, "--no-calibrate", "--teacher-url", *urls]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the run with teachers at {latency:g} s failed: {done.stderr.strip().splitlines()[-1]}")
        steps = read_metrics(Path(folder) / "run")[1:]
    return {name: statistics.median(record[name] for record in steps) for name in PARTS}


if __name__ == "__main__":
    main()
