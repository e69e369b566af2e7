"""What bounds interaction at scale: a model of a step's seconds, and the table that it forecasts.

A step is what train_interact.py does: generate stories, compute their log-probabilities under the reference while the
teacher grades, wait for the last grade, update. Every part has a fixed cost and a cost per story, on the slowest GPU;
the costs come from a benchmark (`measured`, `scaled`) or from a GPU's rates (`estimated`).
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from tinystory.config import INTERACT_PRESETS, InteractConfig
from tinystory.run.errors import UserError
from tinystory.student.memory import parameters
from tinystory.student.model import StudentConfig
from tinystory.studies.timing import PROMPT, SHAPES

STUDENTS = {  # the demo's, one between, and the family of GPT-2
    "1M": StudentConfig(n_layer=4, n_head=4, n_embd=128, context=256, vocab_size=2048),
    "10M": StudentConfig(n_layer=6, n_head=5, n_embd=320, context=512, vocab_size=8192),
    "124M": StudentConfig(n_layer=12, n_head=12, n_embd=768, context=1024, vocab_size=50_257),
    "355M": StudentConfig(n_layer=24, n_head=16, n_embd=1024, context=1024, vocab_size=50_257),
    "774M": StudentConfig(n_layer=36, n_head=20, n_embd=1280, context=1024, vocab_size=50_257),
    "1.5B": StudentConfig(n_layer=48, n_head=25, n_embd=1600, context=1024, vocab_size=50_257),
}
HALF, FULL, ADAM = 2, 4, 28  # bytes per parameter: bfloat16, float32, and what Adam reads and writes
GRADING, REPLY = 150, 6  # tokens of a request that are in no prefix cache, and of a reply


class Cost(NamedTuple):
    """Seconds of a pass over stories on one GPU; none for no story."""

    fixed: float
    per_story: float

    def __call__(self, stories: float) -> float:
        return self.fixed + self.per_story * stories if stories else 0.0

    def times(self, factor: float) -> "Cost":
        return Cost(self.fixed * factor, self.per_story * factor)


class Student(NamedTuple):
    """rollout: all stories of a step; reference: their log-probabilities; update: one gradient step."""

    parameters: int
    rollout: Cost
    reference: Cost
    update: Cost
    source: str


class Teacher(NamedTuple):
    """per_s: stories per second of one busy server. latency: seconds of a reply. client_per_s: stories per second that
    our client, which is one process, can request."""

    per_s: float
    latency: float
    client_per_s: float
    source: str

    def seconds(self, stories: int, servers: int) -> tuple[float, str]:
        """From the last story's end to the last grade, when all end at once (later than if some end early); and what
        bounds it. By Little's law, a server works on per_s * latency stories at a time, so stories go in waves."""
        slots = max(1, round(self.per_s * self.latency))
        waves = math.ceil(stories / (slots * servers))
        client, graded = stories / self.client_per_s, max(self.latency, waves * slots / self.per_s)
        if client > graded:
            return client, "client"
        return graded, "teacher's latency" if waves == 1 else "teacher's rate"


class Work(NamedTuple):
    """A step: stories, PPO epochs over them, and stories per gradient step (0 means all)."""

    stories: int
    epochs: int
    minibatch: int


class Step(NamedTuple):
    """Seconds of each part of a step, and of the whole step of a loop that requests grades one step ahead."""

    rollout: float
    reference: float
    wait: float
    update: float
    exchange: float  # the sum of gradients over the GPUs
    bottleneck: str
    ahead: float

    @property
    def seconds(self) -> float:
        return sum(self[:5])

    @property
    def gain(self) -> float:
        return self.seconds / self.ahead


def step(student: Student, teacher: Teacher, work: Work, gpus: int, servers: int, link: float) -> Step:
    """link: bytes per second at which a GPU sends gradients. Stories and minibatches are split over the GPUs, the
    slowest of which counts; the teacher grades during the reference pass."""
    stories = math.ceil(work.stories / gpus)
    rollout, reference = student.rollout(stories), student.reference(stories)
    minibatch = min(work.minibatch or work.stories, work.stories)
    whole, rest = divmod(work.stories, minibatch)
    epoch = whole * student.update(math.ceil(minibatch / gpus)) + student.update(math.ceil(rest / gpus))
    updates = work.epochs * math.ceil(work.stories / minibatch)
    exchange = updates * 2 * (gpus - 1) / gpus * FULL * student.parameters / link  # a ring
    graded, bound = teacher.seconds(work.stories, servers)
    seconds = (rollout, reference, max(0.0, graded - reference), work.epochs * epoch, exchange)
    bounds = ("rollout", "reference", bound, "update", "gradients")
    busy = sum(seconds) - seconds[2]
    # Ahead: between the end of a story and the need for its grade lie a step, a reference pass and the waits of two
    # steps; and the teacher and the client always have a next story.
    ahead = busy + max(0.0, graded - reference - busy) / 2
    ahead = max(ahead, work.stories / (teacher.per_s * servers), work.stories / teacher.client_per_s)
    return Step(*seconds, bottleneck=bounds[seconds.index(max(seconds))], ahead=ahead)


class Gpu(NamedTuple):
    """Assumed rates: FLOP/s and bytes/s that are reached, and seconds per layer of a pass that no rate explains."""

    flops: float
    bandwidth: float
    layer_s: float


def estimated(shape: StudentConfig, gpu: Gpu, tokens: int) -> Student:
    """A student from the GPU's rates: 2 FLOPs per parameter and token forward, 4 more backward; a decoding step reads
    the weights once, and each story's keys and values, of half its tokens on average."""
    n, layer = parameters(shape), gpu.layer_s * shape.n_layer
    cached = 2 * HALF * shape.n_layer * shape.n_embd * (PROMPT + tokens / 2)  # bytes per story
    forward = 2 * n * (PROMPT + tokens) / gpu.flops
    per_story = tokens * (2 * n / gpu.flops + cached / gpu.bandwidth)
    rollout = Cost(tokens * (layer + HALF * n / gpu.bandwidth), per_story)
    return Student(
        n, rollout, Cost(layer, forward), Cost(3 * layer + ADAM * n / gpu.bandwidth, 3 * forward), "estimate"
    )


def estimated_teacher(parameters: int, gpu: Gpu, client_per_s: float) -> Teacher:
    """A language model on one such GPU that keeps the rubric in its prefix cache."""
    per_story = 2 * parameters * (GRADING + REPLY) / gpu.flops
    latency = 2 * parameters * GRADING / gpu.flops + REPLY * HALF * parameters / gpu.bandwidth
    return Teacher(1 / per_story, latency, client_per_s, "estimate")


def measured(lines: Sequence[dict[str, Any]], tokens: int) -> list[Student]:
    """One student per shape in the lines of `bench.py ppo`, writing stories of `tokens` tokens. Two batches give fixed
    costs and costs per story, one the latter alone."""
    by_shape: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["batch"]):
        by_shape.setdefault(line["shape"], []).append(line)

    def fit(laps: list[dict[str, Any]], seconds: Callable[[dict[str, Any]], float]) -> Cost:
        (few, least), (many, most) = ((lap["batch"], seconds(lap) * tokens / lap["new"]) for lap in (laps[0], laps[-1]))
        per_story = least / few
        if many > few:
            per_story = min(max((most - least) / (many - few), 0.0), per_story)  # noise gives no negative cost
        return Cost(least - per_story * few, per_story)

    students = []
    for shape, laps in by_shape.items():
        rollout, reference = fit(laps, itemgetter("rollout_s")), fit(laps, itemgetter("reference_s"))
        update = fit(
            laps, lambda lap: (lap["update_s"] - lap["reference_s"]) / 4
        )  # of a reference pass and four epochs
        students.append(Student(parameters(SHAPES[shape]), rollout, reference, update, "measured"))
    return students


def scaled(students: Sequence[Student], shape: StudentConfig) -> Student:
    """The nearest of measured students with its seconds in proportion to the parameters."""
    n = parameters(shape)
    nearest = min(students, key=lambda student: abs(math.log(student.parameters / n)))
    x = n / nearest.parameters
    rollout, reference, update = (cost.times(x) for cost in (nearest.rollout, nearest.reference, nearest.update))
    return Student(n, rollout, reference, update, "measured" if x == 1 else f"scaled x{x:.3g}")


# ---- the forecast ---------------------------------------------------------------------------------------------------

HEAD = (
    "student  rates       GPUs  servers |  rollout     ref.     wait   update    grads     step | bottleneck       "
    "    hours      cost   one step ahead"
)


def forecast(a: argparse.Namespace) -> None:
    """Print a table of the options of scripts/scale.py."""
    config = InteractConfig(**INTERACT_PRESETS[a.preset])
    tokens, work = config.max_new_tokens, Work(config.stories_per_step, config.epochs, config.minibatch_size)
    gpu = Gpu(a.peak_tflops * 1e12 * a.mfu, a.bandwidth * 1e9, a.layer_us * 1e-6)
    keys = ("shape", "batch", "new", "rollout_s", "reference_s", "update_s")
    students = measured(read_lines(a.bench, keys), tokens) if a.bench else []
    if a.teacher_bench:
        line = read_lines(a.teacher_bench, ("one_per_s", "latency_s"))[-1]
        teacher = Teacher(line["one_per_s"], line["latency_s"], a.client_per_s, "measured")
    else:
        teacher = estimated_teacher(int(a.teacher_parameters), gpu, a.client_per_s)
    print(
        f"{a.preset}: {config.steps} steps of {work.stories} stories of {tokens} tokens, {work.epochs} epochs\n"
        f"teacher ({teacher.source}): {teacher.per_s:.3g} stories/s per server, {teacher.latency:.3g} s per reply; "
        f"client: {teacher.client_per_s:g} stories/s"
    )
    if not students or teacher.source == "estimate":
        print(
            f"an estimate is no measurement: {a.peak_tflops:g} TFLOP/s at an assumed MFU of {a.mfu:g}, {a.bandwidth:g} "
            f"GB/s, {a.layer_us:g} us per layer"
        )
    print(HEAD)
    grades = config.steps * work.stories * a.story_price
    for name in a.students:
        student = scaled(students, STUDENTS[name]) if students else estimated(STUDENTS[name], gpu, tokens)
        steps = {(g, s): step(student, teacher, work, g, s, a.link * 1e9) for g in a.gpus for s in a.servers}
        hours = {key: config.steps * row.seconds / 3600 for key, row in steps.items()}
        cost = {(g, s): hours[g, s] * (g * a.gpu_price + s * a.server_price) + grades for g, s in steps}
        cheapest, fastest = min(cost, key=cost.__getitem__), min(hours, key=hours.__getitem__)
        for key, row in steps.items():
            pays = "pays" if row.gain * a.stale > 1 else ""
            best = "  cheapest" * (key == cheapest) + "  fastest" * (key == fastest)
            parts = "".join(f"{seconds:9.3f}" for seconds in (*row[:5], row.seconds))
            text = f"{name:>7}  {student.source:<12}{key[0]:>4}{key[1]:>9} |{parts} | {row.bottleneck:<18}"
            print(f"{text}{hours[key]:8.2f}{cost[key]:10.2f}{row.gain:7.2f}x {pays:<5}{best}".rstrip())


def read_lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The JSON objects of the file, one per line, that have all these keys; raises UserError if there is none."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): give a file of lines of JSON") from error
    if rows := [line for line in lines if all(key in line for key in keys)]:
        return rows
    raise UserError(f"no line of {path} has {', '.join(keys)}: {path} must hold what the benchmark printed")
