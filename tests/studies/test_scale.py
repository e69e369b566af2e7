"""The arithmetic of scripts/scale.py: beside a simulation by events, at its limits, and as printed."""

import heapq
import itertools
import json

import pytest
from conftest import fails
from hypothesis import given
from hypothesis import strategies as st

from scripts import scale as command
from tinystory.student.memory import parameters
from tinystory.student.model import StudentConfig
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
from tinystory.studies.timing import SHAPES

H100 = Gpu(flops=4e14, bandwidth=2e12, layer_s=2e-5)
SECONDS = st.floats(0.001, 10.0)


def simulated(parts: Student, work: Work, servers: int, at_once: int, latency: float, ahead: bool) -> float:
    """Seconds per step of a loop on one GPU, step by step: each story takes the first slot that is free."""
    free = [0.0] * (servers * at_once)
    seconds = dict(rollout=parts.rollout(work.stories), reference=parts.reference(work.stories))
    now, graded, ends = 0.0, [], []

    def write() -> None:
        nonlocal now
        now += seconds["rollout"]
        for _ in range(work.stories):
            done = max(now, heapq.heappop(free)) + latency
            heapq.heappush(free, done)
        graded.append(max(free))
        now += seconds["reference"]

    if ahead:
        write()
    # A teacher that is a little slower than the rest falls behind a little more at each step, until all wait for it.
    for at in range(30 + 20 * work.stories // len(free)):
        write()
        now = max(now, graded[at])
        now += work.epochs * parts.update(work.stories)
        ends.append(now)
    return (ends[-1] - ends[-21]) / 20


@given(
    costs=st.tuples(*[st.tuples(SECONDS, st.floats(0.0, 0.1))] * 3), latency=SECONDS, stories=st.integers(1, 60),
    servers=st.integers(1, 5), at_once=st.integers(1, 8), epochs=st.integers(1, 4),
)  # fmt: skip
def test_a_step_takes_as_long_as_in_a_simulation(costs, latency, stories, servers, at_once, epochs):
    student = Student(0, *itertools.starmap(Cost, costs), source="measured")
    teacher = Teacher(at_once / latency, latency, 1e9, "given")
    work = Work(stories, epochs, 0)
    found = step(student, teacher, work, 1, servers, link=1.0)
    assert found.seconds == pytest.approx(simulated(student, work, servers, at_once, latency, ahead=False), rel=1e-6)
    # Ahead, the next step's stories take slots that a step leaves free, so steps differ: on average over 20 of them.
    ahead, edge = simulated(student, work, servers, at_once, latency, ahead=True), latency / 10
    assert found.ahead <= ahead + edge and ahead <= found.seconds * (1 + 1e-6)
    if stories % (servers * at_once) == 0:
        assert found.ahead == pytest.approx(ahead, abs=edge)


@given(
    name=st.sampled_from([*STUDENTS]), gpus=st.integers(1, 32), servers=st.integers(1, 32), stories=st.integers(1, 500)
)
def test_more_of_anything_is_no_slower_and_a_larger_student_is(name, gpus, servers, stories):
    teacher, work = estimated_teacher(8 * 10**9, H100, 1e9), Work(stories, 4, 0)

    def took(name=name, gpus=gpus, servers=servers, link=1e30):
        return step(estimated(STUDENTS[name], H100, 90), teacher, work, gpus, servers, link)

    here = took()
    assert here.seconds == pytest.approx(sum(here[:5])) and 1 <= here.gain <= 2 + 1e-9
    assert max(took(gpus=2 * gpus).seconds, took(servers=2 * servers).seconds) <= here.seconds * (1 + 1e-9)
    assert took(link=1e9).exchange >= here.exchange and (gpus > 1) == (here.exchange > 0)
    larger = [*STUDENTS][min([*STUDENTS].index(name) + 1, len(STUDENTS) - 1)]
    assert took(larger).rollout >= here.rollout and took(larger).update >= here.update


def test_limits_name_what_bounds_them():
    student = estimated(STUDENTS["124M"], H100, 90)
    work = Work(360, 4, 0)

    def bound(teacher: Teacher, servers: int = 1) -> str:
        return step(student, teacher, work, 1, servers, link=5e10).bottleneck

    assert bound(Teacher(1e9, 1e-6, 1e9, "")) == "update"
    assert bound(Teacher(1.0, 1.0, 1e9, "")) == "teacher's rate"
    assert bound(Teacher(1.0, 1.0, 1e9, ""), servers=360) == "teacher's latency"
    assert bound(Teacher(1e9, 1e-6, 10.0, "")) == "client"
    few = step(student, Teacher(1e9, 1e-6, 1e9, ""), work, 64, 1, link=1e6)
    assert few.bottleneck == "gradients" and few.exchange == pytest.approx(
        4 * 2 * 63 / 64 * 4 * student.parameters / 1e6
    )


def test_a_minibatch_that_is_smaller_than_the_gpus_leaves_some_idle():
    student = Student(0, Cost(0, 0), Cost(0, 0), Cost(0, 1.0), "measured")
    teacher = Teacher(1e9, 1e-9, 1e9, "")
    seconds = [step(student, teacher, Work(64, 1, 16), gpus, 1, link=1.0).update for gpus in (1, 16, 64)]
    assert seconds == [64, 4, 4]


def test_a_known_student_costs_what_its_flops_and_bytes_do():
    """GPT-2-small on an H100: 90 reads of its weights, and 6 FLOPs per parameter and token of 110."""
    n = parameters(STUDENTS["124M"])
    assert n == pytest.approx(124e6, rel=0.01) and parameters(STUDENTS["1.5B"]) == pytest.approx(1.56e9, rel=0.01)
    student = estimated(STUDENTS["124M"], Gpu(4e14, 2e12, 0.0), 90)
    assert student.rollout.fixed == pytest.approx(90 * 2 * n / 2e12)
    assert student.update.per_story == pytest.approx(6 * n * 110 / 4e14)


def test_measured_costs_come_back_from_the_lines_of_a_benchmark(monkeypatch):
    tiny = StudentConfig(n_layer=1, n_head=1, n_embd=16, context=64, vocab_size=300)
    monkeypatch.setitem(SHAPES, "tiny", tiny)

    def line(batch):  # writing 2 + 0.5 each, reading 1 + 0.1, a gradient step 3 + 0.2; four of them
        read = 1 + 0.1 * batch
        update = read + 4 * (3 + 0.2 * batch)
        return dict(shape="tiny", batch=batch, new=10, rollout_s=2 + 0.5 * batch, reference_s=read, update_s=update)

    (student,) = measured([line(64), line(16)], tokens=20)
    for cost, expected in zip(
        (student.rollout, student.reference, student.update), ((4, 1), (2, 0.2), (6, 0.4)), strict=True
    ):
        assert cost == pytest.approx(expected)
    (alone,) = measured([line(16)], tokens=10)
    assert alone.rollout == pytest.approx((0, 10 / 16)) and scaled([alone], tiny) == alone
    twice = scaled([alone, student], STUDENTS["1M"])
    assert twice.rollout.per_story / alone.rollout.per_story == pytest.approx(twice.parameters / alone.parameters)
    assert twice.source.startswith("scaled")


def test_the_table_says_what_is_measured_and_what_is_assumed(tmp_path, capsys):
    command.main(["--students", "1M", "1.5B", "--gpus", "1", "64", "--servers", "1", "64"])
    said = capsys.readouterr().out
    assert said.count("  estimate  ") == 8 and "an estimate is no measurement" in said and "assumed MFU of 0.4" in said
    assert said.count("cheapest") == said.count("fastest") == 2
    line = dict(shape="gpt2s", batch=16, new=90, rollout_s=0.9, reference_s=0.3, update_s=4.3, tokens=1440)
    (tmp_path / "ppo").write_text(json.dumps(line) + "\n")
    (tmp_path / "teacher").write_text(json.dumps(dict(one_per_s=8.0, latency_s=1.0)))
    measured = ["--bench", str(tmp_path / "ppo"), "--teacher-bench", str(tmp_path / "teacher")]
    command.main(["--students", "124M", "--gpus", "1", "--servers", "1", "3", "--story-price", "0.001", *measured])
    said = capsys.readouterr().out
    assert "estimate" not in said and said.count("scaled x1.27") == 2 and "teacher (measured): 8 stories/s" in said
    one, three = (float(row.split("|")[1].split()[-1]) for row in said.splitlines()[-2:])
    assert one > three


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mfu 0", "--mfu"),
        ("--mfu nan", "--mfu"),
        ("--gpu-price -1", "--gpu-price"),
        ("--gpus 0", "--gpus"),
        ("--bench no/such/file", "cannot read"),
        ("--bench pyproject.toml", "no line of"),
    ],
)
def test_mistakes_are_told_in_one_sentence(flags, words, capsys):
    assert words in fails(command.main, flags.split(), capsys)
