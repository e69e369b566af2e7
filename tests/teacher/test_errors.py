"""A failure that a retry cannot fix is one clear sentence without the key."""

import contextlib
import gc
import logging
import socket
import threading

import pytest
from aiohttp import web
from fault_server import (
    KEY,
    FaultServer,
    assert_one_clean_sentence,
    closed_port,
    error,
    graded,
)

from tinystory.config import InteractConfig
from tinystory.evaluate.open_grader import open_grader
from tinystory.run.errors import UserError
from tinystory.teacher import api
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Submission

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, 0),
        ({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "6m0s"}, 0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "120ms"}, 0.12),
        ({"x-ratelimit-remaining-tokens": "99", "x-ratelimit-reset-tokens": "2m59.5s"}, 179.5),
        ({"x-ratelimit-remaining-tokens": "-9", "x-ratelimit-reset-tokens": "soon"}, 0),
        ({"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "soon"}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "nan"}, 0),
    ],
)
def test_a_limit_per_minute_is_read_in_the_headers(headers, seconds):
    assert api.requested_pause(headers) == pytest.approx(seconds)


NOT_ONE = "not as an OpenAI-compatible API"
FATAL = {
    "refuses the key": lambda: error(
        401, f"Incorrect API key provided: {KEY}.\x1b[31m\nSee docs.", code="invalid"
    ),
    "no quota left": lambda: error(
        429, "You exceeded your current quota.", code="insufficient_quota"
    ),
    "has no such page or model": lambda: error(
        404, "The model `first` does not exist", code="model_not_found"
    ),
    "too short a context": lambda: error(
        400, "This model's maximum context length is 64 tokens.", type="invalid"
    ),
    f"{NOT_ONE}: check the URL (HTTP 302 http://127.0.0.1:9/": lambda: web.Response(
        status=302, headers={"Location": f"http://127.0.0.1:9/{KEY}"}
    ),
    "(HTTP 404): check the URL": lambda: web.Response(
        status=404, text="<h1>no</h1>", content_type="text/html"
    ),
    f"{NOT_ONE}: check the URL (HTTP 101)": lambda: web.Response(status=101),
}


@pytest.mark.parametrize("words", FATAL)
def test_a_failure_that_a_retry_cannot_fix_stops_everything(words, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with (
        FaultServer(lambda story, n: FATAL[words]()) as server,
        Teacher([server.url], concurrency=4) as teacher,
    ):
        with pytest.raises(UserError) as caught:
            graded(teacher, "Once", [f"Dog {i} ran." for i in range(50)])
        assert_one_clean_sentence(caught, server.url, words)
        assert len(server.requests) <= 1 + 4  # only those in flight
        with pytest.raises(UserError):
            teacher.submit(Submission("Once", "One more.", 50)).result()
        assert KEY not in repr(teacher) + repr(teacher.endpoints[0].client) + caplog.text
    del teacher
    gc.collect()
    assert "never retrieved" not in caplog.text  # a traceback that asyncio would print


def test_nothing_there():
    url = closed_port()
    with pytest.raises(UserError) as caught:
        Teacher([url])
    assert_one_clean_sentence(caught, f"{url}/v1", "cannot be reached", "start it")
    assert "teacher" not in [thread.name for thread in threading.enumerate()]  # it is closed


# of how openai hands aiohttp the proxy's password
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_away_is_named(scheme, monkeypatch):
    proxy = closed_port()
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", proxy.replace("//", f"//me:{KEY}@"))
    with pytest.raises(UserError) as caught:
        Teacher([f"{scheme}://teacher.example/v1"])
    assert_one_clean_sentence(
        caught, "teacher.example", proxy.rpartition(":")[2], "any proxy", "NO_PROXY"
    )


def test_a_server_that_goes_away_stops_the_run():
    with FaultServer() as server:
        teacher = Teacher([server.url])
    with teacher, pytest.raises(UserError) as caught:
        graded(teacher, "Once", ["A dog ran.", "A cat ran."])
    assert_one_clean_sentence(caught, "cannot be reached")


def test_not_http_at_all():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(UserError) as caught:
            Teacher([f"http://127.0.0.1:{listener.getsockname()[1]}/"])
    assert_one_clean_sentence(caught, "lost the connection")


@pytest.mark.parametrize(
    "models, words",
    [
        (
            lambda: web.Response(text="<html>Welcome to nginx</html>", content_type="text/html"),
            NOT_ONE,
        ),
        (lambda: web.json_response({"models": ["first"]}), NOT_ONE),
        (lambda: web.json_response({"data": [{"name": "first"}]}), NOT_ONE),
        (lambda: web.json_response({"detail": "Not Found"}, status=404), "check the URL"),
        (lambda: web.Response(text="[" * 100_000), NOT_ONE),
        (lambda: web.json_response({"data": []}), "lists no model"),
    ],
)
def test_no_openai_compatible_api(models, words):
    with (
        FaultServer(models=models) as server,
        pytest.raises(UserError) as caught,
    ):
        Teacher([server.url])
    assert_one_clean_sentence(caught, server.url, words)


def test_a_judges_server_gets_no_key_of_a_teacher(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY_1", KEY)
    keys = []

    class Server(FaultServer):
        async def _chat(self, request):
            keys.append(request.headers["Authorization"].removeprefix("Bearer "))
            return await super()._chat(request)

    with Server() as server:
        for role, expected in (("teacher", KEY), ("judge", "none")):
            with Teacher([server.url], role=role):
                assert set(keys) == {expected}
            keys.clear()
        monkeypatch.setenv("OPENAI_API_KEY_JUDGE", "the judge's")
        with Teacher([server.url], role="judge"):
            assert set(keys) == {"the judge's"}
    with FaultServer(lambda story, n: error(401, "no")) as server:
        server.other = lambda asked: error(401, "no")
        server.models = lambda: error(401, "no")
        with pytest.raises(UserError, match=r"set OPENAI_API_KEY_JUDGE$"):
            Teacher([server.url], ["first"], role="judge")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "http://h?k=1",
        "http://h:x/v1",
        "http://h:99999",
        "http://:8000/v1",
        "http://[",
        "http://h/v1\x1b",
        f"http://me:{KEY}@127.0.0.1:9/v1",
    ],
)
def test_invalid_urls(url):
    with pytest.raises(UserError, match="must look like") as caught:
        Teacher([url])
    assert_one_clean_sentence(caught, "OPENAI_API_KEY")


@pytest.mark.parametrize("url", [f"http://{'a' * 300}/v1", "http://a..b"])
def test_urls_that_no_server_can_have_are_one_sentence(url):
    with pytest.raises(UserError) as caught:
        Teacher([url])
    assert_one_clean_sentence(caught, url)


# of how openai hands aiohttp the proxy's password
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "proxy",
    [
        "::::x",
        f"ftp://u:{KEY}@h",
        f"http://u:{KEY}@h:99999",
        f"http://u:{KEY}/x@h",
        f"http://{'x' * 300}",
    ],
)
def test_an_impossible_proxy_is_one_sentence_without_its_password(proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(UserError) as caught:
        Teacher(["http://teacher.example/v1"])
    assert_one_clean_sentence(caught, "the proxies (HTTP_PROXY")


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "OPENAI_PROJECT_ID", "OPENAI_ORG_ID"])
@pytest.mark.parametrize("value", [f"{KEY}\nX: y", f"{KEY}\u20ac"])
def test_a_header_from_the_environment_that_cannot_be_sent_is_one_sentence(
    name, value, monkeypatch
):
    monkeypatch.setenv(name, value)
    with FaultServer() as server:
        with pytest.raises(UserError) as caught:
            Teacher([server.url])
        assert_one_clean_sentence(caught, "OPENAI_API_KEY and other variables")
        assert not server.requests


@pytest.mark.parametrize("key", ["", KEY])
def test_litellms_words_for_a_key_that_is_not_its_own_are_said_in_ours(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    no = lambda: error(400, "No connected db.", type="no_db_connection", code="400")  # noqa: E731
    with (
        FaultServer(models=no) as server,
        pytest.raises(UserError) as caught,
    ):
        Teacher([server.url])
    assert_one_clean_sentence(caught, server.url, "refuses the key", "set OPENAI_API_KEY")


def test_a_key_that_a_reply_echoes_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    kept = tmp_path / "replies.jsonl"
    with (
        FaultServer(lambda story, n: f"your key is {KEY}") as server,
        Teacher([server.url], cache=kept) as teacher,
    ):
        (grade,) = graded(teacher, "Once", ["A dog ran."])
    assert grade.reply == "your key is [key]" and KEY not in kept.read_text()


def test_a_header_from_the_environment_that_a_reply_echoes_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Team: stories\nX-Gateway-Key: {KEY}")
    kept = tmp_path / "replies.jsonl"
    with (
        FaultServer(lambda story, n: f"stories, {KEY}") as server,
        Teacher([server.url], cache=kept) as teacher,
    ):
        (grade,) = graded(teacher, "Once", ["A dog ran."])
    assert grade.reply == "stories, [key]" and KEY not in kept.read_text()


@pytest.mark.parametrize("key", ["0", "1", "3", "none"])
def test_a_dummy_key_is_no_secret_and_no_reply_loses_a_digit(key, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    kept = tmp_path / "replies.jsonl"
    with FaultServer(lambda story, n: "3 1 0") as server:
        for again in (False, True):  # from the server, then from the file
            with Teacher([server.url], cache=kept) as teacher:
                (grade,) = graded(teacher, "Once", ["A dog ran."])
            assert list(grade.scores.values()) == [3, 1, 0] and grade.reply == "3 1 0", again
        assert len(server.requests) == 2  # the probe's story and this one


def test_what_a_server_calls_its_models_is_shown_without_escape_sequences(capsys):
    with FaultServer(models=["\x1b]0;owned\x07good\x1b[31m\u202e", "\x1b"]) as server:
        config = InteractConfig(teacher_url=[server.url])
        with open_grader(config) as grader:
            assert grader.facts["scored_by"] == f"]0;ownedgood[31m at {server.url}"
            assert {request["model"] for request in server.requests} == {"]0;ownedgood[31m"}
        with (
            pytest.raises(UserError) as caught,
            open_grader(InteractConfig(teacher_url=["http://\x1b[31m"]), corpus=None),
        ):
            pass
    assert_one_clean_sentence(caught)
    assert capsys.readouterr().out.replace("\n", "").isprintable()
