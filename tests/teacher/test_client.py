"""The client against a server with every kind of fault: no score is lost or invented."""

import asyncio
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from fault_server import FaultServer, closed_port, error, graded, time_out_hanging_requests
from tqdm import tqdm

from tinystory.run.errors import UserError
from tinystory.teacher import api, pool
from tinystory.teacher.api import requested_pause
from tinystory.teacher.client import Teacher
from tinystory.teacher.endpoint import PATIENCE, Endpoint, Options, Probe
from tinystory.teacher.grade import Grade, Submission
from tinystory.teacher.grades import Grades, read_back
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.prompt import CRITERIA

pytestmark = pytest.mark.usefixtures("short_pauses")
LONG_S = 3000.0  # a deadline that nothing reaches: each request has a third of it


def test_every_story_is_scored_or_counted_exactly_once(monkeypatch):
    faults = "500 429 hang reset empty html malformed shape huge drip".split()
    faults += ["3/3 2/3 1", "2 2", "4 0 0"]
    dice = random.Random(1)
    plan = {}  # what each story's first requests get, before the honest reply
    for i in range(200):
        plan[f"Story {i}."] = dice.sample(faults, dice.choice([0, 0, 0, 1, 2]))
    for i in range(190, 200):
        plan[f"Story {i}."] = ["all good!"] * 9  # never readable

    def honest(story):
        i = int(story[6:-1])
        return f"{i % 4} {i // 4 % 4} {i // 16 % 4}"

    def script(story, n):
        return plan[story][n] if n < len(plan[story]) else honest(story)

    with (
        FaultServer(script) as server,
        Teacher([server.url], concurrency=32, deadline_s=LONG_S) as teacher,
    ):
        time_out_hanging_requests(server, monkeypatch)
        probes = teacher.ledger.total["requests"]
        grades = graded(teacher, "Once", list(plan))
        assert 2 < server.most_in_flight <= 32
    assert len(grades) == 200
    for story, grade in zip(plan, grades, strict=True):
        unread = [what for what in plan[story] if " " in what]  # complete replies without scores
        if len(unread) < 3:
            assert grade.error is None and grade.reply == honest(story)
            assert list(grade.scores.values()) == [int(digit) for digit in honest(story).split()]
            assert server.good[story] == len(unread) + 1
            assert grade.reply_words == 3 + sum(len(reply.split()) for reply in unread)
        else:
            assert grade.scores is None and grade.reply == "all good!" and server.good[story] == 3
            assert grade.reply_words == 6 and "3 replies" in grade.error
    assert teacher.ledger.total["requests"] == sum(server.seen.values()) - 1 + probes
    assert teacher.ledger.total["retries"] == sum(
        len([w for w in p if " " not in w]) for p in plan.values()
    )


def test_a_server_that_fails_on_a_story_costs_the_story_not_the_run():
    with FaultServer(lambda story, n: "500") as server, Teacher([server.url]) as teacher:
        (grade,) = graded(teacher, "Once", ["A dog ran."])
    assert grade.scores is None and grade.reply == "" and grade.reply_words == 0
    assert grade.error == "the teacher is overloaded or failing (HTTP 500: oops)"
    assert server.seen["A dog ran."] == pool.FAILURES


def test_a_hanging_request_is_cut_at_its_deadline():
    with FaultServer(lambda story, n: "drip") as server, Teacher([server.url]) as teacher:
        probe = teacher.probes[0]
        teacher.endpoints[0].probe = replace(probe, seconds=0.2 / PATIENCE)
        teacher.options.deadline_s = 0.6  # which a busy machine could take for the probe
        (grade,) = graded(teacher, "Once", ["A dog ran."])
    assert grade.scores is None and "too long" in grade.error
    assert server.seen["A dog ran."] <= 3  # fewer if a request was cut before the server read it


def test_the_client_waits_as_long_as_the_server_asks():
    busy = error(429, "slow down", headers={"Retry-After": "0.3"})
    with (
        FaultServer(lambda story, n: "3 3 3" if n else busy) as server,
        Teacher([server.url]) as teacher,
    ):
        (grade,) = graded(teacher, "Once", ["A dog ran."])
    assert grade.scores == dict.fromkeys(CRITERIA, 3)
    assert server.times[-1] - server.times[-2] >= 0.3


def test_a_wait_that_no_story_can_wait_for_ends_the_run_at_once():
    busy = error(429, "per day", headers={"Retry-After": "40000"})
    with (
        FaultServer(lambda story, n: busy) as server,
        Teacher([server.url]) as teacher,
        pytest.raises(UserError, match=r"per day.*no request for 40,000 s: continue after that"),
    ):
        graded(teacher, "Once", [f"Dog {i}." for i in range(30)])
    assert sum(server.seen.values()) <= 4


def test_a_servers_pause_is_read_in_each_form():
    in_20_s = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=20), usegmt=True)
    assert 15 < requested_pause({"retry-after": in_20_s}) <= 20
    for headers, seconds in (
        ({"retry-after-ms": "1500"}, 1.5),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "30"}, 30),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2s"}, 62),
        ({"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "30"}, 0),
    ):
        assert requested_pause(headers) == seconds


def test_what_is_no_number_of_seconds_asks_for_no_wait():
    nonsense = ["", "nan", "inf", "-5", "soon", "9" * 400, "Fri, 01 Jan 2021 00:00:00 GMT"]
    busy = {f"Dog {i}.": error(429, "slow", {"Retry-After": x}) for i, x in enumerate(nonsense)}
    script = lambda story, n: "3 3 3" if n else busy[story]  # noqa: E731
    with FaultServer(script) as server, Teacher([server.url]) as teacher:
        assert all(grade.scores for grade in graded(teacher, "Once", list(busy)))


def test_what_is_sent():
    with FaultServer(lambda story, n: "hm" if n == 0 else "1 1 1") as server:
        with Teacher([server.url], ["second"], seed=7, temperature=0.5, max_tokens=9) as teacher:
            assert graded(teacher, "Once", ["A dog\x00 ran."])[0].scores
        first, second = server.requests[1:]
        assert first["model"] == "second"
        assert first["temperature"] == 0.5
        assert first["max_tokens"] == 9
        assert first["seed"] == 7
        assert second == {**first, "seed": 8}
        assert read_back(first["messages"]) == ("Once", "A dog ran.")


def test_as_many_requests_are_in_flight_as_allowed():
    with FaultServer() as server, Teacher([server.url], concurrency=130) as teacher:
        graded(teacher, "Once", [f"Cat {i} ran." for i in range(600)])  # the limit rises
        server.ready = lambda: server.most_in_flight >= 130  # held until all are sent
        graded(teacher, "Once", [f"Dog {i} ran." for i in range(140)])
    assert server.most_in_flight == 130


def test_words_beyond_max_tokens_do_not_count(monkeypatch):
    # and no proxy is used for this machine's own address
    monkeypatch.setenv("HTTP_PROXY", closed_port())
    with (
        FaultServer(lambda story, n: "well " * 50) as server,
        Teacher([server.url], max_tokens=6) as teacher,
    ):
        (grade,) = graded(teacher, "Once", ["A dog ran."])
    assert grade.scores is None and grade.reply_words == 3 * 6


def test_an_empty_story_needs_no_teacher():
    with FaultServer() as server, Teacher([server.url]) as teacher:
        grades = graded(teacher, "Once", ["", " \n\t", "\x00\u200b"])
        assert grades == [Grade(dict.fromkeys(CRITERIA, 0), 0.0)] * 3
        assert len(server.requests) == 1  # the probe


def test_closing_leaves_nothing_in_flight():
    with FaultServer(lambda story, n: "hang") as server:
        teacher = Teacher([server.url], concurrency=8)
        teacher.endpoints[0].limit = 8.0
        futures = [teacher.submit(Submission("Once", f"Dog {i} ran.", i)) for i in range(20)]
        while server.in_flight < 8:
            time.sleep(0.01)
        teacher.close()
        teacher.close()  # closing twice does no harm
        assert all(future.cancelled() for future in futures) and not teacher._thread.is_alive()
        while server.in_flight:  # the server sees every connection closed
            time.sleep(0.01)
        assert len(server.requests) == 1 + 8


def test_a_long_wait_is_not_silent(monkeypatch):
    told = []
    monkeypatch.setattr("tinystory.teacher.client.SILENCE_S", 0.0)
    with FaultServer() as server, Teacher([server.url]) as teacher:
        monkeypatch.setattr(tqdm, "write", lambda text: told.append(text))
        server.ready = lambda: told  # replies are held until the line is printed
        assert all(grade.scores for grade in graded(teacher, "Once", ["A dog ran.", "A cat ran."]))
    assert told == ["first has graded 0 of 2 stories so far: the server, or this machine, is busy"]


def test_ctrl_c_ends_the_wait_for_grades():
    program = (
        "import signal, sys; from tinystory.teacher.client import Teacher\n"
        # background jobs start with SIGINT ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with Teacher([sys.argv[1]]) as teacher: teacher.grade_each([('Once', 'A dog ran.'), ('Once', 'A cat ran.')])"
    )
    with FaultServer(lambda story, n: "hang") as server:
        process = subprocess.Popen(
            [sys.executable, "-c", program, server.url], stderr=subprocess.PIPE, text=True
        )
        while server.in_flight < 2 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert errors.strip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in errors
    assert "Unclosed" not in errors


def at(most):
    """A server that takes so many requests at once."""
    probe, options = Probe(url="http://x", model="m"), Options(deadline_s=LONG_S)
    return Endpoint(probe, None, most, Ledger(0.0, 0.0, 0.0, (0, 0, 0)), options)


BUSY = api.Failure("is busy", again=True, busy=True)


def test_slots_never_exceed_the_limit_and_are_never_lost():
    async def run():
        each, dice, most = [at(4), at(2)], random.Random(0), 0
        servers = pool.ServerPool(each)

        async def story(i):
            nonlocal most
            for again in (False, True, True):
                async with servers.slot(first=again) as endpoint:
                    most = max(most, sum(server.taken for server in each))
                    assert endpoint.taken <= endpoint.most
                    await asyncio.sleep(dice.random() / 500)
                    endpoint.failed(BUSY) if dice.random() < 0.1 else endpoint.answered(0.0)

        tasks = [asyncio.create_task(story(i)) for i in range(200)]
        for _ in range(20):
            await asyncio.sleep(0.002)
            dice.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert 2 < most <= 6
        assert all(server.taken == 0 and 1 <= server.limit <= server.most for server in each)
        assert not any(
            isinstance(task.exception(), Exception) for task in tasks if not task.cancelled()
        )

    asyncio.run(run())


def test_an_overloaded_server_gets_fewer_requests_and_more_when_it_recovers(monkeypatch):
    """The server has room for 3 requests, then for all, then for 3, and the requests in flight
    follow."""
    monkeypatch.setattr(pool, "PAUSE_S", 0.0)  # so that no clock decides who is in flight
    at_once, server, in_flight = [], at(16), 0
    servers = pool.ServerPool([server])

    async def request(endpoint):
        nonlocal in_flight
        in_flight += 1
        at_once.append(in_flight)
        busy = in_flight > room
        for _ in range(100):  # meanwhile every other request that has a slot is sent
            await asyncio.sleep(0)
        in_flight -= 1
        if busy:
            raise BUSY
        yield

    async def ask(count):
        await asyncio.gather(*(servers.ask(request) for _ in range(count)))

    for room, count, last in (  # noqa: B007  (read by the server above)
        (3, 60, range(2, 12)),
        (99, 200, range(13, 17)),
        (3, 60, range(2, 12)),
    ):
        at_once.clear()
        asyncio.run(ask(count))
        assert max(at_once[-60:-20]) in last and int(server.limit) in last


def test_a_users_own_messages_reach_the_teacher_as_they_are_and_its_scores_count():
    protocol = Grades(user="Opening {opening}|Story {story}|Readability, Narrative, Creativity =")

    def other(request):
        return "3 1 2" if "Tom {story}" in str(request) else "0 0 1"

    with FaultServer(other=other) as server, Teacher([server.url], protocol=protocol) as teacher:
        (grade,) = graded(teacher, "Once", ["Tom {story}"])
    assert grade.scores == dict(zip(CRITERIA, (3, 1, 2), strict=True))
    assert grade.score == pytest.approx(6 / 9)
    content = "Opening Once|Story Tom {story}|Readability, Narrative, Creativity ="
    assert server.others[-1]["messages"] == [{"role": "user", "content": content}]
