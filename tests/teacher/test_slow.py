"""Slow servers: every story is scored, and no request is thrown away. Time is simulated: the clock of
the client's event loop jumps to the next timer as soon as nothing else is left to do."""

import asyncio
import selectors
import threading

import pytest
from fault_server import graded

from tinystory.teacher import client
from tinystory.teacher.answers import YesNo
from tinystory.teacher.api import BUSY, ChatClient, Failure, Reply
from tinystory.teacher.client import Teacher
from tinystory.teacher.prompt import Criterion

CONCURRENCY = 16
IN_FLIGHT = 5 * (CONCURRENCY - 1)  # at most, when a limit is reached in each of five minutes


class JumpingSelector(selectors.DefaultSelector):
    """Waits in simulated time."""

    now = 0.0

    def select(self, timeout=None):
        events = super().select(0 if timeout else timeout)
        if timeout and not events:
            self.now += timeout
        return events


class SimulatedLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.selector = JumpingSelector()
        super().__init__(self.selector)

    def time(self):
        return self.selector.now


class LimitedServer(ChatClient):
    """A server that stands in for ChatClient, and takes `most` requests per minute. announces:
    whether its answers say when none is left."""

    def __init__(self, most: int, announces: bool):
        self.most, self.announces = most, announces
        super().__init__("http://x", "")
        self.began, self.taken, self.refused = 0.0, 0, 0

    async def models(self):
        return ["limited"]

    async def chat(self, body):
        await asyncio.sleep(0.5)
        now = asyncio.get_running_loop().time()
        if now - self.began >= 60:
            self.began, self.taken = now, 0
        left_s = self.began + 60 - now
        if self.taken == self.most:
            self.refused += 1
            self.pause(left_s)
            raise Failure("busy", status=429, again=True, busy=True)
        self.taken += 1
        if self.announces and self.taken == self.most:
            self.pause(left_s)
        return [Reply("2 1 3")]


class SlowServer(ChatClient):
    """A server that stands in for ChatClient. It computes `slots` answers at once, on `processors`
    processors that the answers share, and an answer takes `seconds` of one processor."""

    def __init__(self, slots: int, processors: int, seconds: float, logprobs=None):
        super().__init__("http://x", "")
        self.slots = asyncio.Semaphore(slots)
        self.processors = asyncio.Semaphore(processors)
        self.seconds = seconds
        self.logprobs = logprobs
        self.loading = 0  # number of requests that are refused while the model is loaded
        self.in_flight = self.most_in_flight = self.received = self.answered = 0

    async def models(self):
        if self.loading:
            self.loading -= 1
            raise Failure("is overloaded or failing", status=BUSY[1], again=True, busy=True)
        return ["slow"]

    async def chat(self, body):
        self.received += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            async with self.slots:
                for _ in range(10):  # in turn with the other answers
                    async with self.processors:
                        await asyncio.sleep(self.seconds / 10)
            self.answered += 1
            return [Reply("2 1 3", self.logprobs)]
        finally:
            self.in_flight -= 1


@pytest.fixture
def teacher_of(monkeypatch):
    """The clock stands still while stories are sent, however busy the machine is."""
    monkeypatch.setattr(asyncio, "new_event_loop", SimulatedLoop)

    def open_teacher(server: SlowServer, **options) -> Teacher:
        monkeypatch.setattr(client, "ChatClient", lambda *_: server)
        teacher = Teacher(["http://x"], concurrency=CONCURRENCY, **options)
        all_sent = threading.Event()
        grades, wait = teacher.grades, teacher._wait

        def grades_at_once(*arguments):
            all_sent.clear()
            teacher._loop.call_soon_threadsafe(all_sent.wait)
            return grades(*arguments)

        def wait_after_all(*arguments):
            all_sent.set()
            return wait(*arguments)

        teacher.grades, teacher._wait = grades_at_once, wait_after_all
        return teacher

    return open_teacher


@pytest.mark.parametrize(
    "slots, processors, seconds",
    [(1, 1, 20.0), (8, 1, 47.0), (1, 1, 109.0), (4, 4, 30.0), (64, 64, 60.0), (64, 64, 0.5)],
)
def test_a_slow_server_loses_no_story_and_no_request(teacher_of, slots, processors, seconds):
    server = SlowServer(slots, processors, seconds)
    with teacher_of(server) as teacher:
        grades = graded(teacher, "Once", [f"Dog {i} ran." for i in range(40)])
    assert all(grade.scores for grade in grades)
    assert server.received == server.answered == teacher.ledger.total["requests"]
    assert server.most_in_flight >= min(2, CONCURRENCY)
    if processors == 64:  # in flight is then no hindrance, so the limit rises
        assert server.most_in_flight == CONCURRENCY


def test_a_forecast_is_an_upper_bound_until_the_rate_is_measured(teacher_of):
    """Sixteen answers at once take 20 s each; the probe has two requests in flight."""
    server = SlowServer(16, 16, 20.0)
    with teacher_of(server) as teacher:
        assert "at most 50 min of grading" in teacher.forecast(300, "Once")
        graded(teacher, "Once", [f"Dog {i} ran." for i in range(400)])
        assert "about 7 min of grading" in teacher.forecast(300, "Once")


@pytest.mark.parametrize(
    "announces, options, most_refused",
    [(True, {}, IN_FLIGHT), (False, {}, IN_FLIGHT), (False, {"per_minute": 10}, 0)],
)
def test_a_limit_per_minute_is_kept(teacher_of, announces, options, most_refused):
    """A hundred stories at 20 a minute: a limit that is announced, one that is only enforced, and
    one that the user gives. Requests that are in flight when the limit is reached are refused."""
    server = LimitedServer(20, announces)
    with teacher_of(server, **options) as teacher:
        grades = graded(teacher, "Once", [f"Dog {i} ran." for i in range(100)])
    assert all(grade.scores for grade in grades)
    assert server.refused <= most_refused


def test_the_time_limit_is_per_reply(teacher_of):
    questions = tuple(Criterion(f"q{i}", "Is it a story?") for i in range(80))
    server = SlowServer(8, 8, 0.15, logprobs=(("Yes", -0.1), ("No", -2.5)))
    with teacher_of(server, protocol=YesNo(questions), deadline_s=9.0) as teacher:
        (grade,) = graded(teacher, "Once", ["A dog ran."])
    assert grade.error is None and len(grade.scores) == 80


def test_a_server_that_loads_its_model_is_waited_for(teacher_of):
    server = SlowServer(8, 8, 0.15)
    server.loading = 20
    with teacher_of(server) as teacher:
        assert teacher.probes[0].model == "slow"
