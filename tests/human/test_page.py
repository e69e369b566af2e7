"""The server: a trainer's client gets a person's grades, and strangers get nothing."""

import asyncio
import http.client
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import LIMIT_S

from lab import compare
from scripts import teach
from tinystory.human import grading_queue
from tinystory.human.grading_queue import GradingQueue
from tinystory.human.lesson import Lesson
from tinystory.human.page_server import page, serve
from tinystory.run.errors import UserError
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Submission
from tinystory.teacher.grades import Grades
from tinystory.teacher.named_protocols import load_protocol
from tinystory.teacher.probe import HUMAN
from tinystory.teacher.prompt import Criterion

EVIL = "</script><script>alert(1)</script><b onmouseover=x>"


@contextmanager
def serving(queue, folder=None):
    """Runs the server on a separate thread; yields the URL."""
    ready, addresses = threading.Event(), []
    loop, ended = asyncio.new_event_loop(), asyncio.Event()

    async def run():
        lesson = Lesson(queue, folder or Path("no run"))
        async with serve(lesson, style="p { color: red }") as address:
            addresses.append(address)
            loop.call_soon(ready.set)
            await ended.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert ready.wait(LIMIT_S)
        yield addresses[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(LIMIT_S)
        loop.close()
        queue.close()


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setattr(grading_queue, "GRACE_S", 0.05)
    with serving(GradingQueue(tmp_path / "grades.jsonl", Grades())) as address:
        yield address


def ask(url, method, path, body=None, **headers):
    """(status, headers, text) of one request."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=LIMIT_S)
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


def shown(url, who="ada"):
    """The story on a person's page, once there is one."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        item = json.loads(ask(url, "GET", f"/state?who={who}")[2])["item"]
        if item:
            return item
        time.sleep(0.02)
    raise AssertionError("no story came")


def test_a_trainers_client_waits_for_the_person(url, short_pauses):
    with Teacher([url]) as teacher:
        probe = teacher.probes[0]
        assert probe.model == HUMAN and probe.scored
        # 20 s each
        assert teacher.forecast(64, "Once") == "64 stories, about 21 min of grading"
        # the probe bothered nobody
        assert json.loads(ask(url, "GET", "/state?who=ada")[2])["item"] is None
        marks = ("cat", "alert", "dog")
        stories = ["a cat sat.", EVIL, "a dog ran."]
        futures = [
            teacher.submit(Submission("Once upon a time,", story, i))
            for i, story in enumerate(stories)
        ]
        given = {}
        for scores in (
            {"readability": 3, "coherence": 2, "creativity": 1},
            None,
            dict.fromkeys(Grades().names, 0),
        ):
            story = shown(url)
            given[next(mark for mark in marks if mark in story["story"])] = scores
            asked = {
                **story,
                "who": "ada",
                "action": "grade" if scores else "skip",
                "scores": scores,
            }
            assert ask(url, "POST", "/do", asked)[0] == 200
        for mark, future in zip(marks, futures, strict=True):
            grade = future.result(LIMIT_S)
            assert grade.scores == given[mark]
            assert grade.scores is not None or "skipped" in grade.reply  # no score, and no guess


def test_a_person_may_take_longer_than_any_timeout(url, short_pauses):
    with Teacher([url], deadline_s=6.0) as teacher:  # 2 s per request
        future = teacher.submit(Submission("Once upon a time,", "a cat sat.", 0))
        story = shown(url)
        time.sleep(7)
        asked = {
            **story,
            "who": "ada",
            "action": "grade",
            "scores": dict.fromkeys(Grades().names, 2),
        }
        assert ask(url, "POST", "/do", asked)[0] == 200
        assert future.result(LIMIT_S).score == 2 / 3 and teacher.ledger.stats()["retries"] == 0


def test_a_trainer_with_other_criteria_is_told_so(url, short_pauses):
    humour = Grades((Criterion("humour", "Is it funny?", ("no", "a bit", "yes", "very")),))
    with pytest.raises(UserError, match="same --teacher-prompt"):
        Teacher([url], protocol=humour)


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "[::"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/", "/state?who=ada", "/v1/models"])
def test_strangers_get_nothing(url, headers, status, path):
    code, _, text = ask(url, "GET", path, **headers)
    assert code == status and ("answers only requests for" in text) == (status == 403)


def test_the_page_runs_its_own_script_only(url):
    status, headers, text = ask(url, "GET", "/")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert text.count("<script") == 1
    assert "p { color: red }" in text
    assert "src=" not in text
    assert "http" not in text
    assert text == page("p { color: red }")


@pytest.mark.parametrize(
    "body, status, words",
    [
        ({"who": "", "action": "back"}, 400, "The name must have"),
        ({"who": "x" * 41, "action": "back"}, 400, "The name must have"),
        ({"who": "a\nb", "action": "back"}, 400, "The name must have"),
        ({"who": "ada", "action": "back"}, 400, "nothing to go back to"),
        ({"who": "ada", "action": "grade", "key": "none", "scores": {}}, 400, "give a score"),
        ({"who": "ada", "action": "skip", "key": ["x"]}, 400, "load the page again"),
        ([], 400, "must be a JSON object"),
    ],
)
def test_wrong_requests_of_a_page_are_said_and_break_nothing(url, body, status, words):
    code, _, text = ask(url, "POST", "/do", body)
    assert code == status and words in json.loads(text)["error"]["message"]
    assert ask(url, "GET", "/state?who=ada")[0] == 200


def test_it_listens_on_this_machine_alone_and_a_port_in_use_is_one_sentence(url, tmp_path):
    assert url.startswith("http://127.0.0.1:")

    async def again():
        lesson = Lesson(GradingQueue(tmp_path / "more.jsonl", Grades()), tmp_path / "run")
        async with serve(lesson, int(url.rpartition(":")[2])):
            pass

    with pytest.raises(UserError, match="--port"):
        asyncio.run(again())


def test_a_person_compares_stories_blindly_through_the_same_page(
    tmp_path, monkeypatch, short_pauses, capsys
):
    monkeypatch.setattr(grading_queue, "GRACE_S", 0.05)
    for name, word in (("a", "plain"), ("b", "fine")):
        lines = [
            json.dumps({"opening": f"Day {i},", "story": f"a {word} tale."}) + "\n"
            for i in range(3)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    protocol = load_protocol(compare.COMPARISON)
    with serving(GradingQueue(tmp_path / "grades.jsonl", protocol)) as url:
        files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
        asker = threading.Thread(
            target=compare.main, args=([*files, "--teacher-url", f"{url}/v1"],)
        )
        asker.start()
        places = []
        for _ in range(2 * 3):
            story = shown(url)
            places.append("fine" in story["story"].rpartition("\n")[2])
            scores = {"preference": 3 if places[-1] else 0}
            asked = {**story, "who": "ada", "action": "grade", "scores": scores}
            assert ask(url, "POST", "/do", asked)[0] == 200
        asker.join(60)
    assert places.count(True) == 3 and places not in ([True, False] * 3, [False, True] * 3)
    assert "human preferred b.jsonl in 3 of 3 pairs, a.jsonl in 0" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--port", "70000"], ["--teacher-prompt", "nowhere"]])
def test_a_wrong_option_is_one_sentence(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        teach.main(argv)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
