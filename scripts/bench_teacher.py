"""Speed of the teacher's client, as one JSON line: medians over runs, on the built-in stories.

    python scripts/bench_teacher.py                                         our client beside the bare openai client
    python scripts/bench_teacher.py --teacher-url http://127.0.0.1:8080/v1  this server: rate, gain from prefix caching

Without a URL the teacher is a local server that answers immediately, so only the overhead of the clients is measured.
With a URL, stories are sent as many at a time as --concurrency allows; then one at a time, with the rubric first, as in
training, and with the rubric last: a server that caches prompt prefixes then has to process the rubric again.
"""

import argparse
import asyncio
import itertools
import json
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
from tinystory.studies.dummy_server import dummy_server
from tinystory.teacher.api import Server
from tinystory.teacher.client import Teacher
from tinystory.teacher.prompt import fence, render

OPENING, WORDS = "Once upon a time,", 80  # words per story
SAMPLING = dict(temperature=0.2, max_tokens=6, seed=0)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher-url", metavar="URL", help="measure the server at this URL, not our client")
    add("--stories", type=int, metavar="N", help="stories per run (default: 2000, or 16 with a URL)")
    add("--concurrency", type=int, default=64, metavar="N", help="requests in flight (default: 64)")
    add("--runs", type=int, default=3, metavar="N", help="timed runs, after a warm-up run (default: 3)")
    options = parser.parse_args(argv)
    count = options.stories or (16 if options.teacher_url else 2000)
    if min(count, options.concurrency, options.runs) < 1:
        raise UserError("--stories, --concurrency and --runs must be at least 1")
    if options.teacher_url:
        result: dict[str, Any] = server_speed(options.teacher_url, count, options.concurrency, options.runs)
    else:
        with dummy_server() as url:
            result = client_overhead(url, count, options.concurrency, options.runs)
    facts = dict(stories=count, runs=options.runs, concurrency=options.concurrency)
    print(json.dumps(facts | result), flush=True)


def client_overhead(url: str, count: int, concurrency: int, runs: int) -> dict[str, float]:
    """Stories per second and CPU milliseconds per story in this process, by our client (prompt, cache and parsing
    included) and by the bare openai client on both of its transports, alternating; ratio: our rate over the faster
    one's."""
    import openai

    async def bare(transport: type, prompts: list[dict]) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=transport()) as client:
            await gather(lambda prompt: client.chat.completions.create(model="m", **prompt), prompts, concurrency)

    def ours(stories: list[str]) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            Teacher(url, concurrency=concurrency, cache=Path(folder) / "replies.jsonl") as teacher,
        ):
            assert all(grade.scores for grade in teacher.grade(OPENING, stories, 0))

    clients = {
        "ours": ours,
        "aiohttp": lambda stories: asyncio.run(bare(openai.DefaultAioHttpClient, prompts_of(stories))),
        "httpx": lambda stories: asyncio.run(bare(openai.DefaultAsyncHttpxClient, prompts_of(stories))),
    }
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
    for stories in rounds(count, runs):
        for name, client in clients.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            client(stories)
            laps[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    result: dict[str, float] = {}
    for name, times in laps.items():
        seconds, cpu = (statistics.median(lap) for lap in zip(*times[1:], strict=True))
        result |= {f"{name}_per_s": round(count / seconds, 1), f"{name}_cpu_ms": round(1e3 * cpu / count, 3)}
    return result | dict(ratio=round(result["ours_per_s"] / max(result["aiohttp_per_s"], result["httpx_per_s"]), 3))


def server_speed(url: str, count: int, concurrency: int, runs: int) -> dict[str, Any]:
    """Stories per second with `concurrency` requests in flight; and median seconds per story, one request at a time,
    with the rubric first and with it last, alternating; every story is new to the server and the first of each order is
    not timed. Also the tokens per prompt, if the server counts them."""

    def rubric_last(prompt: dict) -> dict:
        rubric, story = (message["content"] for message in prompt["messages"])
        return prompt | {"messages": [{"role": "system", "content": story}, {"role": "user", "content": rubric}]}

    async def latencies(prompts: list[dict]) -> list[float]:
        server = Server(url, os.environ.get("OPENAI_API_KEY"), 300.0)

        async def latency(prompt: dict) -> float:
            start = time.perf_counter()
            reply = await server.chat(model=model, **prompt)
            tokens.extend(reply.tokens[:1] if reply.tokens else ())
            return time.perf_counter() - start

        seconds = await gather(latency, prompts, concurrency=1)
        await server.close()
        return seconds[1:]

    first: list[float] = []
    last: list[float] = []
    tokens: list[int] = []
    rates = []
    with Teacher(url, concurrency=concurrency) as teacher:
        model = teacher.probe().model
        for stories in rounds(3 * count + 2, runs):
            start = time.perf_counter()
            teacher.grade(OPENING, stories[:count], 0)
            rates.append(count / (time.perf_counter() - start))
            prompts = prompts_of(stories[count:])
            first += asyncio.run(latencies(prompts[::2]))
            last += asyncio.run(latencies(list(map(rubric_last, prompts[1::2]))))
    first_s, last_s = (statistics.median(seconds[count:]) for seconds in (first, last))
    result = dict(model=model, prompt_tokens=round(statistics.mean(tokens), 1) if tokens else None)
    result |= dict(one_per_s=round(statistics.median(rates[1:]), 3), ratio=round(last_s / first_s, 2))
    return result | dict(rubric_first_s=round(first_s, 3), rubric_last_s=round(last_s, 3))


def rounds(count: int, runs: int) -> Iterator[list[str]]:
    """The stories of the warm-up run and of each timed run; no story occurs twice."""
    documents = open_corpus(["builtin"]).documents()
    for _ in range(runs + 1):
        yield [" ".join(document.split()[:WORDS]) for document in itertools.islice(documents, count)]


def prompts_of(stories: Sequence[str]) -> list[dict]:
    fences = [fence(0, index, story) for index, story in enumerate(stories)]
    return [dict(messages=render(OPENING, s, fence=mark), **SAMPLING) for s, mark in zip(stories, fences, strict=True)]


async def gather(request: Callable[[dict], Awaitable], prompts: Sequence[dict], concurrency: int) -> list:
    """The results of all requests, in the order of completion, `concurrency` at a time."""
    waiting, replies = iter(prompts), []

    async def work() -> None:
        for prompt in waiting:
            replies.append(await request(prompt))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return replies


if __name__ == "__main__":
    main()
