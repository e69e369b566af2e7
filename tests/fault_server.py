"""A teacher with scripted faults, for the tests of the client and of whole runs."""

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
import traceback
from collections import Counter
from types import SimpleNamespace

import torch
from aiohttp import web
from conftest import LIMIT_S

from tinystory.teacher.api import ChatClient
from tinystory.teacher.grades import read_back
from tinystory.teacher.probe import TIMED_STORIES
from tinystory.teacher.prompt import CRITERIA

KEY = "sk-planted-0123456789"


class FaultServer:
    """An OpenAI-compatible server on a free port. `script(story, n)` is the response to the n-th
    request, from 0, for a story: a fault by name, a reply, or an aiohttp response. The story of the
    client's probe gets "2 1 3", and `other(request)` is the response to requests without a
    story."""

    def __init__(
        self,
        script=lambda story, n: "2 1 3",
        models=("first", "second"),
        other=lambda asked: "A fox.",
    ):
        self.script, self.models, self.other = script, models, other
        self.requests: list[dict] = []  # for stories
        self.others: list[dict] = []
        self.timed: list[dict] = []  # for the stories by which the client's probe measures the time
        self.times: list[float] = []
        self.seen = Counter()
        self.good = Counter()  # complete replies sent, per story
        self.in_flight = self.most_in_flight = 0
        self.hanging: set[str] = set()  # stories with a request that gets no whole answer
        self.delay = 0.0  # seconds before a good reply
        self.ready = lambda: True  # good replies are held until this is true
        self.port = 0  # any that is free

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
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}/v1"

    async def _models(self, request):
        if callable(self.models):
            return self.models()
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def _chat(self, request):
        body = await request.json()
        found = read_back(body["messages"])
        if any(story in body["messages"][-1]["content"] for _, story in TIMED_STORIES):
            self.timed.append(body)
            return await self._answer(
                request, "", self.other(body) if found is None else self.first()
            )
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
            what = (
                self.first()
                if story.startswith("a cat sat down") and n == 0
                else self.script(story, n)
            )
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
                self.hanging.add(story)
                while request.transport is not None and not request.transport.is_closing():
                    await asyncio.sleep(0.01)
                return web.Response()
            case "500":
                return web.json_response({"error": {"message": "oops"}}, status=500)
            case "429":
                return web.json_response(
                    {"error": {"message": "slow down"}}, status=429, headers={"Retry-After": "0"}
                )
            case "empty":
                return web.Response()
            case "html":
                return web.Response(
                    text="<html><body>3 3 3</body></html>", content_type="text/html"
                )
            case "malformed":
                return web.Response(text=whole[:-9], content_type="application/json")
            case "shape":
                return web.json_response({"choices": [{"message": "3 3 3"}]})
            case "huge":
                return web.Response(
                    text=completion("3 3 3 " * 1_000_000), content_type="application/json"
                )
            case "reset" | "drip":
                self.hanging |= {story} if what == "drip" else set()
                response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
                await response.prepare(request)
                with contextlib.suppress(ConnectionError):
                    for byte in whole if what == "drip" else whole[:20]:
                        await response.write(byte.encode())
                        await asyncio.sleep(0.05 if what == "drip" else 0)
                if request.transport is not None:
                    request.transport.abort()
                return response
        for _ in range(100 * LIMIT_S):
            if self.ready():
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.delay)
        self.good[story] += 1
        return web.Response(text=completion(what), content_type="application/json")


def time_out_hanging_requests(server, monkeypatch):
    """Only the client's requests that hang time out, so that no clock decides."""
    chat = ChatClient.chat

    async def timed(self, body):
        story = (read_back(body["messages"]) or ("", ""))[1]
        task = asyncio.ensure_future(chat(self, body))
        while not (await asyncio.wait({task}, timeout=0.01))[0]:
            if story in server.hanging:
                task.cancel()
                await asyncio.wait({task})
                server.hanging.discard(story)
                raise asyncio.TimeoutError
        return task.result()

    monkeypatch.setattr(ChatClient, "chat", timed)


def completion(reply):
    return json.dumps(
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": reply}}]}
    )


def with_logprobs(text, alternatives, before=()):
    """A chat completion with the log-probabilities of the first token after white space."""
    positions = [{"token": token, "logprob": 0.0, "top_logprobs": []} for token in before]
    entries = [{"token": token, "logprob": logprob} for token, logprob in alternatives]
    positions.append({"token": text, "logprob": -0.1, "top_logprobs": entries})
    choice = {
        "message": {"content": text},
        "finish_reason": "length",
        "logprobs": {"content": positions},
    }
    return web.Response(text=json.dumps({"choices": [choice]}), content_type="application/json")


def answers(probability):
    """A server that answers yes with a probability that depends on the last message."""

    def other(body):
        prompt = body["messages"][-1]["content"]
        p = probability(prompt)
        if not body.get("logprobs"):
            return "Yes." if p > 0.5 else "No."
        return with_logprobs("no", [("Yes", math.log(p)), ("no", math.log(1 - p))], before=(" ",))

    return other


def error(status, message, headers=None, **more):
    return web.json_response(
        {"error": {"message": message, **more}}, status=status, headers=headers
    )


def counted(reply, asked=500, said=6):
    """A completion from a server that counts tokens."""
    usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
    return web.json_response(
        {"choices": [{"message": {"content": reply}, "finish_reason": "stop"}], "usage": usage}
    )


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def graded(teacher, opening, stories):
    """The grades of stories that share an opening."""
    return teacher.grade_each([(opening, story) for story in stories])


def written(index, opening, text, tokens=()):
    """A story as `Grader.send` takes it."""
    tokens = torch.tensor(tokens, dtype=torch.int64)
    return SimpleNamespace(index=index, opening=opening, text=text, tokens=tokens)


def assert_one_clean_sentence(caught, *words):
    text = str(caught.value)
    assert text.isprintable() and len(text) < 600 and all(word in text for word in words), text
    for told in (text, repr(caught.value), "".join(traceback.format_exception(caught.value))):
        assert KEY not in told


class Picky(FaultServer):
    """Answers `refuse(asked)` if that is not None, and otherwise like any server."""

    def __init__(self, refuse, **more):
        super().__init__(**more)
        self.refuse, self.all = refuse, []

    async def _chat(self, request):
        asked = await request.json()
        self.all.append(asked)
        refused = self.refuse(asked)
        return await super()._chat(request) if refused is None else refused


def scored(teacher) -> bool:
    (grade,) = graded(teacher, "Once", ["A dog ran."])
    return grade.scores == dict(zip(CRITERIA, (2, 1, 3), strict=True))
