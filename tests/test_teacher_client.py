"""The client against a server that misbehaves in every way: nothing lost, nothing invented, no key told."""

import asyncio
import contextlib
import gc
import json
import logging
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter

import pytest
from aiohttp import web

from tinystory.errors import UserError
from tinystory.teacher import api, client
from tinystory.teacher.cache import Cache
from tinystory.teacher.client import Teacher
from tinystory.teacher.judgement import Judgement
from tinystory.teacher.probe import Probe
from tinystory.teacher.prompt import CRITERIA, read_back
from tinystory.teacher.slots import Slots

KEY = "sk-planted-0123456789"


class FaultServer:
    """An OpenAI-compatible server on a free port. `script(story, n)` says what the n-th request (from 0) for a story
    gets: a fault by name, a reply to send, or an aiohttp response. The client's first, probing story gets "2 1 3", and
    `other` says what questions without a story get."""

    def __init__(self, script=lambda story, n: "2 1 3", models=("first", "second"), other=lambda asked: "A fox."):
        self.script, self.models, self.other = script, models, other
        self.requests: list[dict] = []  # for stories
        self.others: list[dict] = []
        self.times: list[float] = []
        self.seen = Counter()
        self.good = Counter()  # replies wholly sent, by story
        self.in_flight = self.most_in_flight = 0

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self._call(self._start())
        return self

    def __exit__(self, *_):
        self._call(self.runner.cleanup())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def _start(self):
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}/v1"

    async def _models(self, request):
        if callable(self.models):
            return self.models()
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def _chat(self, request):
        body = await request.json()
        found = read_back(body["messages"])
        if found is None:
            self.others.append(body)
            return await self._answer(request, "", self.other(body))
        story = found[1]
        n = self.seen[story]
        self.seen[story] += 1
        self.requests.append(body)
        self.times.append(time.monotonic())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            what = self.first() if story.startswith("a cat sat down") and n == 0 else self.script(story, n)
            return await self._answer(request, story, what)
        finally:
            self.in_flight -= 1

    def first(self):
        return "2 1 3"

    async def _answer(self, request, story, what):
        whole = completion("2 1 3")
        match what:
            case web.Response():
                return what
            case "hang":
                while request.transport is not None and not request.transport.is_closing():
                    await asyncio.sleep(0.01)
                return web.Response()
            case "500":
                return web.json_response({"error": {"message": "oops"}}, status=500)
            case "429":
                return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0"})
            case "empty":
                return web.Response()
            case "html":
                return web.Response(text="<html><body>3 3 3</body></html>", content_type="text/html")
            case "malformed":
                return web.Response(text=whole[:-9], content_type="application/json")
            case "shape":
                return web.json_response({"choices": [{"message": "3 3 3"}]})
            case "huge":
                return web.Response(text=completion("3 3 3 " * 1_000_000), content_type="application/json")
            case "reset" | "drip":
                response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
                await response.prepare(request)
                with contextlib.suppress(ConnectionError):
                    for byte in whole if what == "drip" else whole[:20]:
                        await response.write(byte.encode())
                        await asyncio.sleep(0.05 if what == "drip" else 0)
                if request.transport is not None:
                    request.transport.abort()
                return response
        self.good[story] += 1
        return web.Response(text=completion(what), content_type="application/json")


def completion(reply):
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": reply}}]})


def error(status, message, headers=None, **more):
    return web.json_response({"error": {"message": message, **more}}, status=status, headers=headers)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "PAUSE_S", 0.01)
    monkeypatch.setattr(client, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_every_story_is_scored_or_counted_none_twice_none_lost():
    faults = ["500", "429", "hang", "reset", "empty", "html", "malformed", "shape", "huge", "drip", "3/3 2/3 1", "2 2"]
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

    done = []
    with FaultServer(script) as server, Teacher(server.url, concurrency=32, deadline_s=9.0) as teacher:
        teacher.probe()
        probes = teacher.ledger.total["requests"]
        judgements = teacher.judge("Once", list(plan), 0, progress=done.append)
        assert 2 < server.most_in_flight <= 32
    assert len(judgements) == 200 and sum(done) == 200
    for story, judgement in zip(plan, judgements, strict=True):
        unread = [what for what in plan[story] if " " in what]  # replies that came, and hold no scores
        if len(unread) < 3:
            assert judgement.error is None and judgement.reply == honest(story)
            assert list(judgement.scores.values()) == [int(digit) for digit in honest(story).split()]
            assert judgement.attempts == len(unread) + 1 == server.good[story]
            assert judgement.reply_words == 3 + sum(len(reply.split()) for reply in unread)
        else:
            assert judgement.scores is None and judgement.reply == "all good!" and judgement.attempts == 3
            assert judgement.reply_words == 6 and "3 replies" in judgement.error
    assert teacher.ledger.total["requests"] == sum(server.seen.values()) - 1 + probes
    assert teacher.ledger.total["failures"] == teacher.ledger.total["retries"]
    assert teacher.ledger.total["failures"] == sum(len([w for w in p if " " not in w]) for p in plan.values())


def test_a_server_that_never_answers_well_costs_the_story_not_the_run():
    with FaultServer(lambda story, n: "500") as server, Teacher(server.url) as teacher:
        (judgement,) = teacher.judge("Once", ["A dog ran."], 0)
    assert judgement.scores is None and judgement.reply == "" and judgement.attempts == judgement.reply_words == 0
    assert judgement.error == "the teacher is in trouble (HTTP 500: oops)"
    assert server.seen["A dog ran."] == client.FAILURES


def test_a_hanging_request_is_cut_at_its_deadline():
    with FaultServer(lambda story, n: "drip") as server, Teacher(server.url, deadline_s=0.6, attempts=2) as teacher:
        (judgement,) = teacher.judge("Once", ["A dog ran."], 0)
    assert judgement.scores is None and "too long" in judgement.error and server.seen["A dog ran."] == 2


@pytest.mark.parametrize("headers", [{"retry-after-ms": "300"}, {"Retry-After": "0.3"}])
def test_the_server_says_when_to_come_back(headers):
    busy = error(429, "slow down", headers=headers)
    with FaultServer(lambda story, n: "3 3 3" if n else busy) as server, Teacher(server.url) as teacher:
        (judgement,) = teacher.judge("Once", ["A dog ran."], 0)
    assert judgement.scores == dict.fromkeys(CRITERIA, 3)
    assert server.times[-1] - server.times[-2] >= 0.3


def test_retry_after_in_every_form():
    late = time.time() + 30
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(late))
    assert api._retry_after({"retry-after": date}) == pytest.approx(30, abs=5)
    assert api._retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    for nonsense in ("", "nan", "inf", "-5", "soon", "9" * 400, "Fri, 99 Xxx 2025 00:00:00 GMT"):
        assert api._retry_after({"retry-after": nonsense}) is None


def test_what_is_sent():
    with FaultServer(lambda story, n: "hm" if n == 0 else "1 1 1") as server:
        with Teacher(server.url, "second", seed=7, temperature=0.5, max_tokens=9) as teacher:
            assert teacher.judge("Once", ["A dog\x00 ran."], 5)[0].attempts == 2
        first, second = server.requests[1:]
        assert (first["model"], first["temperature"], first["max_tokens"], first["seed"]) == ("second", 0.5, 9, 7)
        assert second == {**first, "seed": 8}
        assert read_back(first["messages"]) == ("Once", "A dog ran.")


def test_words_beyond_the_cap_are_not_the_students(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", closed_port())  # and a proxy is not asked for this machine's own address
    with FaultServer(lambda story, n: "well " * 50) as server, Teacher(server.url, max_tokens=6) as teacher:
        (judgement,) = teacher.judge("Once", ["A dog ran."], 0)
    assert judgement.scores is None and judgement.reply_words == 3 * 6


def test_an_empty_story_needs_no_teacher():
    with FaultServer() as server, Teacher(server.url) as teacher:
        judgements = teacher.judge("Once", ["", " \n\t", "\x00\u200b"], 0)
        assert judgements == [Judgement(dict.fromkeys(CRITERIA, 0), 0.0, "", 0, 0, 0.0, None)] * 3
        assert len(server.requests) == 1  # the probe


def test_the_probe_says_what_it_found():
    with FaultServer() as server, Teacher(server.url.removesuffix("/v1")) as teacher:
        found = teacher.probe()
        assert found is teacher.probe()  # once
        assert (found.url, found.model, found.token_cap, found.refused) == (server.url, "first", "max_tokens", ())
        assert (found.reply, found.scored, found.thinks, found.tokens) == ("2 1 3", True, False, None)
        assert (found.structure, found.held_to, found.seed, found.logprobs) == ("nothing", "nothing", True, False)
        assert Probe.load(found.dump()) == found and Probe.load('{"url": ""}') is Probe.load("no") is None
        assert len(server.requests) == 1 and len(server.others) == 4  # two structures, a seed twice
        line = str(found)
        assert line.isprintable() and f"first at {server.url}: scored a story" in line and "obeys no structure" in line


def test_the_probe_is_asked_once_for_a_run(tmp_path):
    with FaultServer() as server:
        for _ in range(2):
            with Teacher(server.url, cache=tmp_path / "replies.jsonl") as teacher:
                found = teacher.probe()
        assert found.scored and len(server.requests) == 1 and len(server.others) == 4
        with Teacher(server.url, "second", cache=tmp_path / "replies.jsonl") as teacher:
            assert teacher.probe().model == "second"
        assert len(server.requests) == 2


def numbers_if_held(asked, *fields):
    """What vLLM's or llama.cpp's server would say: animals, or what it is held to."""
    return "1 0 2" if set(fields) & asked.keys() else "fox, owl, badger"


@pytest.mark.parametrize("field", ["structured_outputs", "grammar"])
def test_a_server_that_obeys_is_held_to_numbers(field):
    with (
        FaultServer(other=lambda asked: numbers_if_held(asked, field)) as server,
        Teacher(server.url) as teacher,
    ):
        assert teacher.probe().structure == teacher.probe().held_to == "numbers"
        assert len(server.others) == 3
        assert teacher.judge("Once", ["A dog ran."], 0)[0].scores
        assert server.requests[-1]["structured_outputs"] == {"regex": "[0-3] [0-3] [0-3]"}
        assert server.requests[-1]["grammar"] == 'root ::= [0-3] " " [0-3] " " [0-3]'


@pytest.mark.parametrize("plain", [True, False])
def test_json_is_for_models_that_give_no_plain_numbers(plain):
    graded = json.dumps(dict.fromkeys(CRITERIA, 2))

    class Json(FaultServer):
        async def _chat(self, request):
            asked = await request.json()
            if "response_format" in asked:
                self.requests.append(asked)
                schema = asked["response_format"]["json_schema"]["schema"]
                assert set(schema["properties"]) == set(schema["required"]) == set(CRITERIA)
                return web.Response(text=completion(graded), content_type="application/json")
            if not plain and read_back(asked["messages"]):
                return web.Response(text=completion("Well, I like it!"), content_type="application/json")
            return await super()._chat(request)

    with Json() as server, Teacher(server.url, max_tokens=6) as teacher:
        found = teacher.probe()
        assert (found.structure, found.held_to, found.scored) == ("json", "nothing" if plain else "json", True)
        (judgement,) = teacher.judge("Once", ["A dog ran."], 0)
        assert judgement.score == pytest.approx(2 / 3)
        assert ("response_format" in server.requests[-1]) != plain
        assert server.requests[-1]["max_tokens"] == teacher.max_tokens == (6 if plain else 44)


def test_an_option_that_is_accepted_and_ignored_is_not_obeyed():
    dice = random.Random(0)
    animals = ["fox", "3 3 3!", "owl", "1, 2 and 3", '{"readability": 3}', "A hare."]
    with FaultServer(other=lambda asked: dice.choice(animals)) as server, Teacher(server.url) as teacher:
        assert teacher.probe().structure == "nothing"
        teacher.judge("Once", ["A dog ran."], 0)
        assert not {"response_format", "grammar", "structured_outputs"} & server.requests[-1].keys()


@pytest.mark.parametrize("refuse", [True, False])
def test_seed_and_logprobs(refuse):
    count = iter(range(100))

    def other(asked):
        if asked.get("logprobs") and refuse:
            return error(400, "logprobs are not supported by this model")
        choice = {"message": {"content": f"A fox {next(count)}."}}
        if asked.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": "A", "logprob": -0.1}]}
        return web.json_response({"choices": [choice]})

    with FaultServer(other=other) as server, Teacher(server.url) as teacher:
        assert (teacher.probe().seed, teacher.probe().logprobs) == (False, not refuse)
        assert len(server.requests) + len(server.others) <= 6


def test_what_a_server_refuses_by_name_is_left_out():
    class Strict(FaultServer):
        async def _chat(self, request):
            for name in ("temperature", "seed", "max_tokens"):
                if name in await request.json():
                    other = " Use 'max_completion_tokens'." if name == "max_tokens" else ""
                    return error(400, f"Unsupported parameter: '{name}'.{other}", code="unsupported_parameter")
            return await super()._chat(request)

    with Strict() as server, Teacher(server.url) as teacher:
        found = teacher.probe()
        assert (found.refused, found.token_cap) == (("seed", "temperature"), "max_completion_tokens")
        assert "no seed" in str(found) and "no temperature" in str(found)
        assert teacher.judge("Once", ["A dog ran."], 0)[0].error is None
        assert not {"seed", "temperature"} & server.requests[-1].keys()


def thought(text, thoughts="Let me see. The story ...", finish="length"):
    message = {"role": "assistant", "content": text, "reasoning_content": thoughts}
    return web.json_response({"choices": [{"message": message, "finish_reason": finish}]})


@pytest.mark.parametrize("answer", [("", None), (None, "Hm, a cat."), ("<think>\nOkay, the user wants", "")])
def test_a_model_that_only_thinks_is_refused_with_a_reason(answer):
    class Thinker(FaultServer):
        async def _chat(self, request):
            self.requests.append(await request.json())
            return thought(*answer)

    with Thinker() as server, Teacher(server.url) as teacher, pytest.raises(UserError) as caught:
        teacher.probe()
    assert_one_clean_sentence(caught, server.url, "thinks before it answers", "16 tokens", "--teacher-max-tokens")
    assert len(server.requests) == 2


def test_a_model_that_can_be_told_not_to_think_is():
    class Qwen(FaultServer):
        async def _chat(self, request):
            asked = await request.json()
            if asked.get("chat_template_kwargs") != {"enable_thinking": False}:
                return thought(None)
            return await super()._chat(request)

    with Qwen() as server, Teacher(server.url) as teacher:
        found = teacher.probe()
        assert found.thinks and found.quiet and found.scored and "told not to think" in str(found)
        assert teacher.judge("Once", ["A dog ran."], 0)[0].scores == dict(zip(CRITERIA, (2, 1, 3), strict=True))


def test_a_server_that_wants_the_other_token_cap_gets_it():
    message = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."

    class Picky(FaultServer):
        async def _chat(self, request):
            if "max_tokens" in await request.json():
                return error(400, message, code="unsupported_parameter")
            return await super()._chat(request)

    with Picky() as server, Teacher(server.url) as teacher:
        assert teacher.probe().token_cap == "max_completion_tokens"
        assert teacher.judge("Once", ["A dog ran."], 0)[0].error is None
        assert all(request["max_completion_tokens"] == 16 for request in server.requests)


# Errors that the user can mend.

NOT_ONE = "not as an OpenAI-compatible API"
FATAL = {
    "refuses the key": lambda: error(401, f"Incorrect API key provided: {KEY}.\x1b[31m\nSee docs.", code="invalid"),
    "no quota left": lambda: error(429, "You exceeded your current quota.", code="insufficient_quota"),
    "does not have what was asked for": lambda: error(404, "The model `first` does not exist", code="model_not_found"),
    "too short a context": lambda: error(400, "This model's maximum context length is 64 tokens.", type="invalid"),
    "redirects to": lambda: web.Response(status=302, headers={"Location": f"http://127.0.0.1:9/{KEY}"}),
    NOT_ONE: lambda: web.Response(status=404, text="<h1>no</h1>", content_type="text/html"),
}


def assert_one_clean_sentence(caught, *words):
    text = str(caught.value)
    assert text.isprintable() and len(text) < 600 and all(word in text for word in words), text
    for told in (text, repr(caught.value), "".join(traceback.format_exception(caught.value))):
        assert KEY not in told


@pytest.mark.parametrize("words", FATAL)
def test_what_cannot_be_mended_by_asking_again_stops_everything(words, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with FaultServer(lambda story, n: FATAL[words]()) as server, Teacher(server.url, concurrency=4) as teacher:
        with pytest.raises(UserError) as caught:
            teacher.judge("Once", [f"Dog {i} ran." for i in range(50)], 0)
        assert_one_clean_sentence(caught, server.url, words)
        assert len(server.requests) <= 1 + 4  # those on their way, and no more
        with pytest.raises(UserError):
            teacher.submit("Once", "One more.", 50).result()
        assert KEY not in repr(teacher) + repr(teacher._server) + caplog.text
    del teacher
    gc.collect()
    assert "never retrieved" not in caplog.text  # a traceback that asyncio would print


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_nothing_there():
    url = closed_port()
    with Teacher(url) as teacher, pytest.raises(UserError) as caught:
        teacher.probe()
    assert_one_clean_sentence(caught, f"{url}/v1", "cannot be reached", "start it")


def test_a_server_that_goes_away_stops_the_run():
    with FaultServer() as server:
        teacher = Teacher(server.url)
        teacher.probe()
    with teacher, pytest.raises(UserError) as caught:
        teacher.judge("Once", ["A dog ran.", "A cat ran."], 0)
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
        with Teacher(f"http://127.0.0.1:{listener.getsockname()[1]}/") as teacher, pytest.raises(UserError) as caught:
            teacher.probe()
    assert_one_clean_sentence(caught, "broke off")


@pytest.mark.parametrize(
    "models, words",
    [
        (lambda: web.Response(text="<html>Welcome to nginx</html>", content_type="text/html"), NOT_ONE),
        (lambda: web.json_response({"models": ["first"]}), NOT_ONE),
        (lambda: web.json_response({"data": [{"name": "first"}]}), NOT_ONE),
        (lambda: web.json_response({"detail": "Not Found"}, status=404), NOT_ONE),
        (lambda: web.Response(text="[" * 100_000), NOT_ONE),
        (lambda: web.json_response({"data": []}), "lists no model"),
    ],
)
def test_no_openai_compatible_api(models, words):
    with FaultServer(models=models) as server, Teacher(server.url) as teacher, pytest.raises(UserError) as caught:
        teacher.probe()
    assert_one_clean_sentence(caught, server.url, words)


def test_a_model_that_is_not_listed():
    with FaultServer() as server, Teacher(server.url, "third") as teacher, pytest.raises(UserError) as caught:
        teacher.submit("Once", "A dog ran.", 0)
    assert_one_clean_sentence(caught, "'third'", "first, second")


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://h:x/v1", "http://[", "http://h?key=1"]
)
def test_urls_that_are_none(url):
    with pytest.raises(UserError, match="must look like"):
        Teacher(url)


def test_a_url_or_key_that_must_not_be(monkeypatch):
    with pytest.raises(UserError) as caught:
        Teacher(f"http://me:{KEY}@127.0.0.1:9/v1")
    assert_one_clean_sentence(caught, "OPENAI_API_KEY")
    with pytest.raises(UserError) as caught:
        Teacher("http://127.0.0.1:9/v1", api_key=f"{KEY}\nX: y")
    assert_one_clean_sentence(caught, "OPENAI_API_KEY")


def test_a_key_that_a_reply_echoes_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    kept = tmp_path / "replies.jsonl"
    with FaultServer(lambda story, n: f"your key is {KEY}") as server, Teacher(server.url, cache=kept) as teacher:
        (judgement,) = teacher.judge("Once", ["A dog ran."], 0)
    assert judgement.reply == "your key is [key]" and KEY not in kept.read_text()


# Stopping.


def test_closing_leaves_nothing_on_its_way():
    with FaultServer(lambda story, n: "hang") as server:
        teacher = Teacher(server.url, concurrency=8)
        futures = [teacher.submit("Once", f"Dog {i} ran.", i) for i in range(20)]
        while server.in_flight < 8:
            time.sleep(0.01)
        teacher.close()
        teacher.close()  # twice does no harm
        assert all(future.cancelled() for future in futures) and not teacher._thread.is_alive()
        while server.in_flight:  # the server sees every connection closed
            time.sleep(0.01)
        assert len(server.requests) == 1 + 8


def test_ctrl_c_ends_a_waiting_judge():
    program = (
        "import sys; from tinystory.teacher.client import Teacher\n"
        "with Teacher(sys.argv[1]) as teacher: teacher.judge('Once', ['A dog ran.', 'A cat ran.'], 0)"
    )
    with FaultServer(lambda story, n: "hang") as server:
        process = subprocess.Popen([sys.executable, "-c", program, server.url], stderr=subprocess.PIPE, text=True)
        while server.in_flight < 2 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert errors.strip().endswith("KeyboardInterrupt") and "never retrieved" not in errors and "Unclosed" not in errors


def test_slots_never_exceed_their_number_and_are_never_lost():
    async def run():
        slots, dice, most = Slots(6), random.Random(0), 0

        async def story(i):
            nonlocal most
            for again in (False, True, True):
                async with slots.one(first=again):
                    most = max(most, slots.taken)
                    await asyncio.sleep(dice.random() / 500)
                    slots.narrow() if dice.random() < 0.1 else slots.widen()

        tasks = [asyncio.create_task(story(i)) for i in range(200)]
        for _ in range(20):
            await asyncio.sleep(0.002)
            dice.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert slots.taken == 0 and 1 < most <= 6 and 1 <= slots.limit <= 6
        assert not any(isinstance(task.exception(), Exception) for task in tasks if not task.cancelled())

    asyncio.run(run())


# The cache.


def test_no_reply_is_paid_for_twice(tmp_path):
    kept = tmp_path / "run" / "replies.jsonl"
    stories = [f"Dog {i} ran." for i in range(30)]
    script = lambda story, n: "hm" if "1" in story and n == 0 else f"{n} 1 1"  # noqa: E731
    with FaultServer(script) as server:
        with Teacher(server.url, cache=kept) as teacher:
            before = teacher.judge("Once", stories[:20], 0)
        lines = kept.read_bytes()
        kept.write_bytes(lines + b'{"key": "torn')  # killed while writing
        with Teacher(server.url, cache=kept) as teacher:
            after = teacher.judge("Once", stories, 100)  # other indices: the mark is no part of the question
            assert teacher.ledger.total["cached"] == sum(judgement.attempts for judgement in before)
        assert kept.read_bytes().startswith(lines + b"{") and b"torn" not in kept.read_bytes()
        paid = {story: server.seen[story] for story in stories}
        assert paid == {story: 2 if "1" in story else 1 for story in stories}
        for old, new in zip(before, after, strict=False):
            assert (old.scores, old.reply, old.attempts, old.reply_words) == (
                new.scores,
                new.reply,
                new.attempts,
                new.reply_words,
            )
        for other in ({"seed": 9}, {"temperature": 0.9}, {"max_tokens": 9}, {"model": "second"}):
            with Teacher(server.url, cache=kept, **other) as teacher:
                teacher.judge("Once", stories[:1], 0)
                assert teacher.ledger.total["cached"] == 0
        with Teacher(server.url, cache=kept) as teacher:
            teacher.judge("Twice", stories[:1], 0)
            assert teacher.ledger.total["cached"] == 0


def test_the_first_reply_to_a_question_stands(tmp_path):
    cache = Cache(tmp_path / "replies.jsonl")
    assert cache.put("question", "1 1 1") == cache.put("question", "2 2 2") == cache.get("question") == "1 1 1"
    cache.close()
    with contextlib.closing(Cache(tmp_path / "replies.jsonl")) as cache:
        assert cache.get("question") == "1 1 1"
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_cache_cut_anywhere_keeps_its_whole_lines(tmp_path, cut):
    path = tmp_path / "replies.jsonl"
    with contextlib.closing(Cache(path)) as cache:
        for i in range(5):
            cache.put(str(i), "\u2028 1 1\n" * i)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    with contextlib.closing(Cache(path)) as cache:
        assert [cache.get(str(i)) for i in range(len(cache))] == ["\u2028 1 1\n" * i for i in range(len(cache))]
        assert len(cache) == whole[: len(whole) - cut].count(b"\n")
        for i in range(5):
            cache.put(str(i), "\u2028 1 1\n" * i)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"hello\n", b"[]\n", b'{"key": 1, "reply": "1 1 1"}\n', b"\xff\n", b"\n"])
def test_another_file_is_not_a_cache(tmp_path, line):
    path = tmp_path / "notes.txt"
    path.write_bytes(line)
    with pytest.raises(UserError, match=r"notes\.txt line 1"):
        Cache(path)
    assert path.read_bytes() == line
    with pytest.raises(UserError, match="cannot be kept"):
        Cache(path / "replies.jsonl").put("question", "1 1 1")


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "replies.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.closing(Cache(path)) as cache:
        cache.put("question", "1 1 1")
        whole = path.read_bytes()
        try:
            for room in (10, 0):  # a line that is written in part, and one that is not at all
                resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, limits[1]))
                with pytest.raises(UserError, match="cannot be written"):
                    cache.put("another", "2 2 2")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == whole and cache.get("another") is None
        cache.put("another", "2 2 2")
    with contextlib.closing(Cache(path)) as cache:
        assert (cache.get("question"), cache.get("another")) == ("1 1 1", "2 2 2")


# What it costs.


def counted(reply, asked=500, said=6):
    """A completion by a server that counts tokens."""
    usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
    return web.json_response({"choices": [{"message": {"content": reply}, "finish_reason": "stop"}], "usage": usage})


class Counting(FaultServer):
    def __init__(self, script=lambda story, n: counted("2 1 3"), **more):
        super().__init__(script, other=lambda asked: counted("A fox.", 20, 3), **more)

    def first(self):
        return counted("2 1 3")


def test_stats_and_cost_are_what_the_server_counted(tmp_path):
    stories = [f"Dog {i} ran." for i in range(10)]
    prices = dict(price_in=2.0, price_out=8.0, cache=tmp_path / "replies.jsonl")
    script = lambda story, n: "500" if story == stories[3] and n == 0 else counted("2 1 3")  # noqa: E731
    with Counting(script) as server, Teacher(server.url, **prices) as teacher:
        teacher.probe()
        teacher.stats()
        assert all(judgement.scores for judgement in teacher.judge("Once", stories + stories[:2], 0))
        stats = teacher.stats()
        sent = len(server.requests) - 1
        assert stats["requests"] == sent and stats["retries"] == 1 and stats["cached"] == 12 + 1 - sent
        assert (stats["tokens_in"], stats["tokens_out"]) == (500 * (sent - 1), 6 * (sent - 1))
        assert 0 < stats["latency_p50"] <= stats["latency_p90"] <= stats["latency_p99"]
        spent = teacher.ledger.cost
        assert teacher.stats() == {
            **dict.fromkeys(("requests", "retries", "cached", "tokens_in", "tokens_out"), 0),
            **dict.fromkeys(("latency_p50", "latency_p90", "latency_p99")),
            "cost": spent,
        }
    with Counting() as server, Teacher(server.url, **prices) as teacher:  # what was paid for stays paid for
        kept = 10 * (500 * 2 + 6 * 8) / 1e6
        assert kept <= teacher.ledger.cost <= spent


def test_a_forecast_is_the_probe_times_the_stories():
    with Counting() as server, Teacher(server.url, concurrency=4, price_in=1.0, price_out=2.0) as teacher:
        short, long = teacher.forecast(1000, "Once"), teacher.forecast(1000, "Once " * 50)
        assert len(server.requests) == 1  # the probe's
        assert short["stories"] == 1000 and short["words"] == 3001 and long["words"] == 3050
        longer = 1 + client.STORY_WORDS - len(" ".join(client.FIRST_STORY).split())
        assert short["tokens_in"] == round(1000 * (500 + longer * client.TOKENS_A_WORD))
        assert short["tokens_out"] == long["tokens_out"] == 6000
        assert long["tokens_in"] - short["tokens_in"] == round(1000 * 49 * client.TOKENS_A_WORD)
        assert short["cost"] == pytest.approx((short["tokens_in"] + 2 * short["tokens_out"]) / 1e6, rel=1e-6)
        assert short["hours"] == pytest.approx(1000 * teacher.probe().seconds / 4 / 3600)


@pytest.mark.parametrize("counts", [True, False])
def test_a_budget_is_never_passed_whatever_goes_wrong(counts):
    """The server's own count of all that it was asked stays within the budget, and comes close to it."""
    stories = [f"Dog {i} ran." for i in range(400)]
    dice = random.Random(3)
    billed = Counter()

    def script(story, n):
        what = dice.choice(["2 1 3"] * 6 + ["500", "reset", "malformed"])
        if what != "500":  # a bad gateway: the answer was made and paid for, and came in pieces
            billed.update(tokens_in=500, tokens_out=6)
        return counted("2 1 3") if what == "2 1 3" and counts else what

    def bill():
        return (billed["tokens_in"] * 1.0 + billed["tokens_out"] * 3.0) / 1e6

    with Counting(script) as server, Teacher(server.url, price_in=1.0, price_out=3.0, budget_cost=0.06) as teacher:
        teacher.probe()
        billed.update(tokens_in=teacher.ledger.total["tokens_in"], tokens_out=teacher.ledger.total["tokens_out"])
        teacher.judge("Once", stories[:1], 0)
        assert teacher.affords(1) and not teacher.affords(400)
        with pytest.raises(UserError) as caught:
            teacher.judge("Once", stories, 1)
        assert_one_clean_sentence(caught, "--budget-cost 0.06", "--resume")
        assert bill() <= teacher.ledger.cost <= 0.06 and not teacher.affords(1)
        assert teacher.ledger.cost > 0.06 - teacher.ledger.price(teacher._most_in, 16)
    assert (teacher.ledger._held["tokens_in"], teacher.ledger._held["tokens_out"]) == (0, 0)
