"""What bounds interaction at scale: the arithmetic of scripts/scale.py, and nothing that is measured.

A step is what train_interact.py does: write stories, read them under the frozen reference while the teacher grades,
wait for the last grade, update. Every part is a sum of a fixed cost and a cost per story, on the slowest GPU; the
parts' costs come from a benchmark (`measured`, `scaled`) or from a GPU's rates (`estimated`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tinystory.student.memory import parameters
from tinystory.student.model import StudentConfig

STUDENTS = {  # the demo's, one between, and the family of GPT-2
    "1M": StudentConfig(n_layer=4, n_head=4, n_embd=128, context=256, vocab_size=2048),
    "10M": StudentConfig(n_layer=6, n_head=5, n_embd=320, context=512, vocab_size=8192),
    "124M": StudentConfig(n_layer=12, n_head=12, n_embd=768, context=1024, vocab_size=50_257),
    "355M": StudentConfig(n_layer=24, n_head=16, n_embd=1024, context=1024, vocab_size=50_257),
    "774M": StudentConfig(n_layer=36, n_head=20, n_embd=1280, context=1024, vocab_size=50_257),
    "1.5B": StudentConfig(n_layer=48, n_head=25, n_embd=1600, context=1024, vocab_size=50_257),
}
PROMPT = 20  # tokens of an opening
HALF, FULL, ADAM = 2, 4, 28  # bytes per parameter: bfloat16, float32, and what Adam reads and writes
GRADING, REPLY = 150, 6  # tokens of a request that are in no prefix cache, and of a reply


class Cost(NamedTuple):
    """Seconds of a pass over stories on one GPU: `fixed`, and `each` per story; nothing for no story."""

    fixed: float
    each: float

    def __call__(self, stories: float) -> float:
        return self.fixed + self.each * stories if stories else 0.0

    def times(self, factor: float) -> "Cost":
        return Cost(self.fixed * factor, self.each * factor)


@dataclass(frozen=True)
class Student:
    """write: all stories of a step; read: under the reference; update: one gradient step."""

    parameters: int
    write: Cost
    read: Cost
    update: Cost
    source: str


@dataclass(frozen=True)
class Teacher:
    """per_s: stories per second of one server that is kept busy. latency: seconds of a reply. client_per_s: stories
    per second that our client, which is one process, can ask for."""

    per_s: float
    latency: float
    client_per_s: float
    source: str

    def seconds(self, stories: int, servers: int) -> tuple[float, str]:
        """From the last story's end to the last grade, when all end at once (later than if some end early); and what
        bounds it. Of Little's law, a server works on per_s * latency stories at a time, so stories go in waves."""
        at_once = max(1, round(self.per_s * self.latency))
        waves = math.ceil(stories / (at_once * servers))
        client = stories / self.client_per_s
        graded = max(self.latency, waves * at_once / self.per_s)
        if client > graded:
            return client, "client"
        return graded, "teacher's latency" if waves == 1 else "teacher's rate"

    def sustained(self, stories: int, servers: int) -> float:
        """Seconds for so many stories when there is always a next one."""
        return max(stories / (self.per_s * servers), stories / self.client_per_s)


@dataclass(frozen=True)
class Work:
    """A step: stories, PPO epochs over them, and stories per gradient step."""

    stories: int
    epochs: int
    minibatch: int  # 0 means all


class Step(NamedTuple):
    """Seconds of each part of a step, and of the whole step of a loop that asks one step ahead."""

    write: float
    read: float
    wait: float
    update: float
    exchange: float  # the sum of gradients over the GPUs
    bottleneck: str
    ahead: float

    @property
    def seconds(self) -> float:
        return self.write + self.read + self.wait + self.update + self.exchange

    @property
    def gain(self) -> float:
        return self.seconds / self.ahead


def step(student: Student, teacher: Teacher, work: Work, gpus: int, servers: int, link: float) -> Step:
    """link: bytes per second at which a GPU sends gradients. Stories and minibatches are split over the GPUs, the
    slowest of which counts; the teacher grades while the reference reads."""
    mine = math.ceil(work.stories / gpus)
    write, read = student.write(mine), student.read(mine)
    minibatch = min(work.minibatch or work.stories, work.stories)
    whole, rest = divmod(work.stories, minibatch)
    update = whole * student.update(math.ceil(minibatch / gpus)) + student.update(math.ceil(rest / gpus))
    updates = work.epochs * math.ceil(work.stories / minibatch)
    exchange = updates * 2 * (gpus - 1) / gpus * FULL * student.parameters / link  # a ring
    graded, why = teacher.seconds(work.stories, servers)
    parts = dict(write=write, read=read, wait=max(0.0, graded - read), update=work.epochs * update, exchange=exchange)
    names = dict(write="writing", read="reading", wait=why, update="updating", exchange="gradients")
    busy = sum(parts.values()) - parts["wait"]
    # Ahead: between the end of a story and the need for its grade lie a step, a reading and the waits of two steps.
    ahead = busy + max(0.0, graded - read - busy) / 2
    ahead = max(ahead, teacher.sustained(work.stories, servers))
    return Step(**parts, bottleneck=names[max(parts, key=parts.__getitem__)], ahead=ahead)


@dataclass(frozen=True)
class Gpu:
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
    return Student(
        n,
        write=Cost(tokens * (layer + HALF * n / gpu.bandwidth), tokens * (2 * n / gpu.flops + cached / gpu.bandwidth)),
        read=Cost(layer, forward),
        update=Cost(3 * layer + ADAM * n / gpu.bandwidth, 3 * forward),
        source="estimate",
    )


def estimated_teacher(parameters: int, gpu: Gpu, client_per_s: float) -> Teacher:
    """A language model on one such GPU that keeps the rubric in its prefix cache."""
    per_story = 2 * parameters * (GRADING + REPLY) / gpu.flops
    latency = 2 * parameters * GRADING / gpu.flops + REPLY * HALF * parameters / gpu.bandwidth
    return Teacher(1 / per_story, latency, client_per_s, "estimate")


def measured(lines: Sequence[dict[str, Any]], shapes: dict[str, StudentConfig], tokens: int) -> list[Student]:
    """One student per shape in the lines of `bench.py ppo`, writing stories of `tokens` tokens. Two batches give fixed
    costs and costs per story, one the latter alone."""
    of_shape: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["batch"]):
        of_shape.setdefault(line["shape"], []).append(line)

    def fit(laps: list[dict[str, Any]], seconds: Callable[[dict[str, Any]], float]) -> Cost:
        (few, least), (many, most) = ((lap["batch"], seconds(lap) * tokens / lap["new"]) for lap in (laps[0], laps[-1]))
        each = least / few
        if many > few:
            each = min(max((most - least) / (many - few), 0.0), each)  # two noisy figures give no negative cost
        return Cost(least - each * few, each)

    return [
        Student(
            parameters(shapes[shape]),
            write=fit(laps, lambda lap: lap["rollout_s"]),
            read=fit(laps, lambda lap: lap["reference_s"]),
            update=fit(
                laps, lambda lap: (lap["update_s"] - lap["reference_s"]) / 4
            ),  # its update: reading, four epochs
            source="measured",
        )
        for shape, laps in of_shape.items()
    ]


def scaled(students: Sequence[Student], shape: StudentConfig) -> Student:
    """The nearest of measured students with its seconds in proportion to the parameters."""
    n = parameters(shape)
    nearest = min(students, key=lambda student: abs(math.log(student.parameters / n)))
    x = n / nearest.parameters
    write, read, update = (cost.times(x) for cost in (nearest.write, nearest.read, nearest.update))
    return Student(n, write, read, update, source="measured" if x == 1 else f"scaled x{x:.3g}")
