"""Several servers of one model share the stories."""

import asyncio
import contextlib

import pytest
from fault_server import FaultServer, assert_one_clean_sentence, closed_port, error, graded, written
from test_faults import honest

from tinystory.config import InteractConfig
from tinystory.evaluate.open_grader import open_grader
from tinystory.run.errors import Stop, UserError
from tinystory.teacher import pool
from tinystory.teacher.client import Teacher

pytestmark = pytest.mark.usefixtures("short_pauses")


@contextlib.contextmanager
def servers(*scripts, models=("m",)):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(FaultServer(script, models=models)) for script in scripts]


def urls(fleet):
    return [server.url for server in fleet]


def stories(count, name="Dog"):
    return [f"{name} {i} ran." for i in range(count)]


good = lambda story, n: "2 1 3"  # noqa: E731


def test_servers_of_one_model_share_the_stories_by_how_fast_they_answer():
    """One server holds the requests that it got until the other has answered most of the
    stories."""

    class Slow(FaultServer):
        async def _answer(self, request, story, what):
            while story in stories(80) and sum(fast.good[each] for each in stories(80)) < 70:
                await asyncio.sleep(0.01)
            return await super()._answer(request, story, what)

    with contextlib.ExitStack() as stack:
        (fast,), slow = stack.enter_context(servers(good)), stack.enter_context(Slow(models=("m",)))
        teacher = stack.enter_context(Teacher(urls([fast, slow]), concurrency=4, deadline_s=10_000))
        assert all(grade.scores for grade in graded(teacher, "Once", stories(80)))
    answers = [sum(server.good[story] for story in stories(80)) for server in (fast, slow)]
    assert sum(answers) == 80 and answers[0] >= 70 and answers[1] >= 2
    assert max(fast.most_in_flight, slow.most_in_flight) <= 4


def test_every_story_is_graded_once_though_a_server_dies(capsys):
    """The port of a dead server refuses connections; the run goes on without it."""
    with servers(good) as (stays,), contextlib.ExitStack() as stack:
        with FaultServer(models=("m",)) as dies:
            config = InteractConfig(teacher_url=urls([dies, stays]), teacher_concurrency=4)
            opened = stack.enter_context(open_grader(config))
            stays.ready = lambda: sum(dies.good.values()) > 3
            graded(opened, "Once", stories(20))
            assert sum(dies.good.values()) > 3
        for i, story in enumerate(stories(30, "Cat")):
            opened.send(written(i, "Once", story))
        assert all(grade.scores for grade in opened.collect(Stop()))
        assert all(stays.good[story] == 1 for story in stories(30, "Cat"))
        assert "the other servers take over its requests" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["500", "reset", "malformed"])
def test_a_server_that_only_fails_is_left_out(fault, capsys):
    scripts = good, lambda story, n: fault
    with (
        servers(*scripts) as (fine, broken),
        Teacher(urls([fine, broken]), concurrency=8) as teacher,
    ):
        fine.ready = lambda: len(broken.requests) > pool.FAILURES
        assert all(grade.scores for grade in graded(teacher, "Once", stories(120)))
    assert "take over its requests" in capsys.readouterr().out


@pytest.mark.parametrize("status", [401, 402])
def test_a_server_that_refuses_the_key_leaves_the_run_to_the_others_and_the_last_one_ends_it(
    status,
):
    no = lambda story, n: error(status, "no more")  # noqa: E731
    with (
        servers(good, no) as (fine, refuses),
        Teacher(urls([fine, refuses]), concurrency=2) as teacher,
    ):
        assert all(grade.scores for grade in graded(teacher, "Once", stories(20)))
        assert len(refuses.requests) <= 1 + 2
        fine.script = no
        with pytest.raises(UserError) as caught:
            graded(teacher, "Once", stories(20, "Cat"))
    assert_one_clean_sentence(caught, fine.url, "no more")


def test_a_server_that_is_down_at_the_start_is_told_and_left_out(capsys):
    away = closed_port()
    with servers(good) as (there,), Teacher([away, there.url], concurrency=2) as teacher:
        assert [probe.url for probe in teacher.probes] == [there.url]
        told = capsys.readouterr().out
        assert away in told and told.count("warning: ") == 1 and "cannot be reached" in told
        assert all(grade.scores for grade in graded(teacher, "Once", stories(5)))
    with pytest.raises(UserError, match="cannot be reached"):
        Teacher([away, closed_port()])


def test_a_server_that_refuses_the_key_at_the_start_is_told_and_left_out(capsys):
    class Locked(FaultServer):
        async def _chat(self, request):
            return error(401, "no entry")

    with servers(good) as (there,), Locked(models=("m",)) as locked:
        with Teacher([locked.url, there.url]) as teacher:
            assert [probe.url for probe in teacher.probes] == [there.url]
            assert "refuses the key (HTTP 401: no entry)" in capsys.readouterr().out
        with pytest.raises(UserError, match="refuses the key"):
            Teacher([locked.url])


def test_a_run_resumed_with_several_servers_pays_for_no_reply_twice(tmp_path, capsys):
    kept = tmp_path / "replies.jsonl"
    script = lambda story, n: honest(story)  # noqa: E731
    with servers(script, script, script) as fleet:
        for count in (20, 50):
            with Teacher(urls(fleet), cache=kept, price_in=1.0) as teacher:
                grades = graded(teacher, "Once", stories(count))
        assert all(sum(server.good[story] for server in fleet) == 1 for story in stories(50))
        assert [grade.reply for grade in grades] == [honest(story) for story in stories(50)]
        with Teacher([fleet[1].url], cache=kept) as teacher:  # with the one that is left
            assert (
                graded(teacher, "Once", stories(50)) == grades
                or teacher.ledger.total["cached"] == 50
            )
    assert len(kept.read_text().splitlines()) == 50 + 3
    # with none at all, and no model named
    with pytest.raises(UserError) as caught:
        Teacher(urls(fleet), cache=kept)
    assert_one_clean_sentence(caught, "cannot be reached", "m", "--teacher-model")
    capsys.readouterr()
    with Teacher(urls(fleet), ["m"], cache=kept) as teacher:
        assert capsys.readouterr().out.count("cached replies are used until") == 3
        assert [grade.reply for grade in graded(teacher, "Once", stories(50))] == [
            grade.reply for grade in grades
        ]
        assert teacher.ledger.total["requests"] == 0


@pytest.mark.parametrize(
    "url, model, words",
    [
        (
            ["http://a/v1", "http://b/v1"],
            ["x", "y", "z"],
            "2 URLs, 2 of them different, and 3 models",
        ),
        (["http://a/v1", "http://a/v1"], (), "2 URLs, 1 of them different, and 1 models"),
    ],
)
def test_teachers_that_cannot_be_meant(url, model, words):
    with pytest.raises(UserError, match=words):
        Teacher(url, model)
