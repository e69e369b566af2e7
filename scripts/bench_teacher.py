"""Speed of the teacher's client, as one JSON line: medians over runs, on the built-in stories.

    python scripts/bench_teacher.py                                         our client beside the bare openai client
    python scripts/bench_teacher.py --teacher-url http://127.0.0.1:8080/v1  this server: rate, gain from prefix caching
    python scripts/bench_teacher.py --latency 0.2                           one slow server, three, three unlike ones

Without a URL the teacher is a server started here that answers immediately, so only the overhead of the clients is
measured. With a URL, stories are sent as many at a time as --concurrency allows; then one at a time, with the rubric
first, as we do, and with the rubric last: a server that caches prompt prefixes does not have to process the rubric
again. With a latency, servers are started here that take so long for a reply and work on AT_ONCE requests at a time, as
a model's slots do; the others wait.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.data.corpus import open_corpus
from tinystory.run.errors import UserError, command
from tinystory.teacher.api import ChatClient
from tinystory.teacher.client import Teacher
from tinystory.teacher.prompt import fence, render

OPENING, WORDS = "Once upon a time,", 80  # words per story
AT_ONCE = 8  # requests that a slow server works on
SAMPLING = dict(temperature=0.2, max_tokens=6, seed=0)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-url", metavar="URL", help="measure the server at this URL, not our client")
    parser.add_argument("--latency", type=float, metavar="S", help="measure servers that take S seconds per reply")
    parser.add_argument("--stories", type=int, metavar="N", help="stories per run (default: 2000, or 16 with a URL)")
    parser.add_argument("--concurrency", type=int, default=64, metavar="N", help="requests in flight")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="timed runs, after a warm-up run (default: 3)")
    options = parser.parse_args(argv)
    count = options.stories or (16 if options.teacher_url else 2000)
    if min(count, options.concurrency, options.runs) < 1:
        raise UserError("--stories, --concurrency and --runs must be at least 1")
    if options.teacher_url:
        measured: dict[str, Any] = prefix(options.teacher_url, count, options.concurrency, options.runs)
    elif options.latency:
        measured = sharing(options.latency, count, options.runs)
    else:
        with local_server() as url:
            measured = overhead(url, count, options.concurrency, options.runs)
    print(json.dumps(dict(stories=count, runs=options.runs) | measured), flush=True)


def overhead(url: str, count: int, concurrency: int, runs: int) -> dict[str, float]:
    """Stories per second and CPU milliseconds per story in this process, by our client (prompt, cache and parsing
    included) and by the bare openai client on both of its transports, alternating; ratio: our rate over the faster
    one's."""
    import openai

    async def bare(transport: type, prompts: list[dict]) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=transport()) as client:
            await each(lambda asked: client.chat.completions.create(model="m", **asked), prompts, concurrency)

    def ours(stories: list[str]) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            Teacher(url, concurrency=concurrency, cache=Path(folder) / "replies.jsonl") as teacher,
        ):
            assert all(grade.scores for grade in teacher.grade(OPENING, stories))

    clients = {
        "ours": ours,
        "aiohttp": lambda stories: asyncio.run(bare(openai.DefaultAioHttpClient, questions(stories))),
        "httpx": lambda stories: asyncio.run(bare(openai.DefaultAsyncHttpxClient, questions(stories))),
    }
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
    for stories in rounds(count, runs):
        for name, ask in clients.items():
            began, worked = time.perf_counter(), time.process_time()
            ask(stories)
            laps[name].append((time.perf_counter() - began, time.process_time() - worked))
    found = dict(concurrency=concurrency)
    for name, times in laps.items():
        seconds, cpu = (statistics.median(lap) for lap in zip(*times[1:], strict=True))
        found |= {f"{name}_per_s": round(count / seconds, 1), f"{name}_cpu_ms": round(1e3 * cpu / count, 3)}
    return found | dict(ratio=round(found["ours_per_s"] / max(found["aiohttp_per_s"], found["httpx_per_s"]), 3))


def sharing(latency: float, count: int, runs: int) -> dict[str, float]:
    """Stories per second with one server, with three like it, and with three of which two take twice as long,
    alternating; of_three and of_unlike: the fraction of 3 and of 2 times the rate of one that this is."""
    with contextlib.ExitStack() as stack:
        even, odd = ([stack.enter_context(local_server(s)) for _ in range(3)] for s in (latency, 2 * latency))
        groups = {"one": even[:1], "three": even, "unlike": [even[0], *odd[:2]]}
        laps: dict[str, list[float]] = {name: [] for name in groups}
        for stories in rounds(count, runs):
            for name, urls in groups.items():
                with Teacher(urls, concurrency=AT_ONCE) as teacher:
                    teacher.probe()
                    began = time.perf_counter()
                    assert all(grade.scores for grade in teacher.grade(OPENING, stories))
                    laps[name].append(time.perf_counter() - began)
    rate = {name: count / statistics.median(seconds[1:]) for name, seconds in laps.items()}
    found = dict(latency_s=latency, at_once=AT_ONCE) | {f"{name}_per_s": round(each, 1) for name, each in rate.items()}
    return found | dict(
        of_three=round(rate["three"] / rate["one"] / 3, 3), of_unlike=round(rate["unlike"] / rate["one"] / 2, 3)
    )


def prefix(url: str, count: int, concurrency: int, runs: int) -> dict[str, Any]:
    """Stories per second with `concurrency` requests in flight; and median seconds per story, one request at a time,
    with the rubric first and with it last, alternating; every story is new to the server and the first of each order is
    not timed. Also the tokens per prompt, if the server counts them."""

    def swapped(prompt: dict) -> dict:
        rubric, story = (message["content"] for message in prompt["messages"])
        return prompt | {"messages": [{"role": "system", "content": story}, {"role": "user", "content": rubric}]}

    async def ask(prompts: list[dict]) -> list[float]:
        server = ChatClient(url, os.environ.get("OPENAI_API_KEY"), 300.0)

        async def timed(asked: dict) -> float:
            began = time.perf_counter()
            reply = await server.chat(model=model, **asked)
            tokens.extend(reply.tokens[:1] if reply.tokens else ())
            return time.perf_counter() - began

        seconds = await each(timed, prompts, concurrency=1)
        await server.close()
        return seconds[1:]

    laps: dict[str, list[float]] = {"first": [], "last": []}
    tokens: list[int] = []
    rates = []
    with Teacher(url, concurrency=concurrency) as teacher:
        model = teacher.probe().model
        for stories in rounds(3 * count + 2, runs):
            began = time.perf_counter()
            teacher.grade(OPENING, stories[:count])
            rates.append(count / (time.perf_counter() - began))
            prompts = questions(stories[count:])
            laps["first"] += asyncio.run(ask(prompts[::2]))
            laps["last"] += asyncio.run(ask(list(map(swapped, prompts[1::2]))))
    first, last = (statistics.median(times[count:]) for times in laps.values())
    found = dict(model=model, prompt_tokens=round(statistics.mean(tokens), 1) if tokens else None)
    found |= dict(concurrency=concurrency, one_per_s=round(statistics.median(rates[1:]), 3))
    return found | dict(rubric_first_s=round(first, 3), rubric_last_s=round(last, 3), ratio=round(last / first, 2))


def rounds(count: int, runs: int) -> Iterator[list[str]]:
    """The stories of the warm-up run and of each timed run; no story occurs twice."""
    documents = open_corpus(["builtin"]).documents()
    for _ in range(runs + 1):
        yield [" ".join(document.split()[:WORDS]) for document in itertools.islice(documents, count)]


def questions(stories: Sequence[str]) -> list[dict]:
    marks = [fence(0, index, story) for index, story in enumerate(stories)]
    return [dict(messages=render(OPENING, s, fence=mark), **SAMPLING) for s, mark in zip(stories, marks, strict=True)]


async def each(ask: Callable[[dict], Awaitable], prompts: Sequence[dict], concurrency: int) -> list:
    """The results of `ask` for all prompts, in the order of completion, `concurrency` at a time."""
    waiting, replies = iter(prompts), []

    async def work() -> None:
        for asked in waiting:
            replies.append(await ask(asked))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return replies


@contextlib.contextmanager
def local_server(latency: float = 0.0) -> Iterator[str]:
    """The URL of a server in its own process that replies "2 1 3" to every request."""
    ours, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(its, latency), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        process.kill()
        process.join()


def serve(pipe: multiprocessing.connection.Connection, latency: float) -> None:
    from aiohttp import web

    message = {"role": "assistant", "content": "2 1 3"}
    usage = {"prompt_tokens": 500, "completion_tokens": 6, "total_tokens": 506}
    completion = dict(id="1", object="chat.completion", created=0, model="m", usage=usage)
    completion["choices"] = [dict(index=0, message=message, finish_reason="stop")]
    slots = asyncio.Semaphore(AT_ONCE)
    listed = dict(object="list", data=[dict(id="m", object="model", created=0, owned_by="us")])

    async def answer(request: web.BaseRequest) -> web.Response:
        await request.read()
        if latency and request.method == "POST":
            async with slots:
                await asyncio.sleep(latency)
        return web.json_response(listed if request.method == "GET" else completion)

    async def run() -> None:
        runner = web.ServerRunner(web.Server(answer, access_log=None))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


if __name__ == "__main__":
    main()
