"""Speed of the teacher's client or of a teacher, as one JSON line: medians over runs, on the built-in stories.

    python scripts/bench_teacher.py                                         our client beside the bare openai client
    python scripts/bench_teacher.py --teacher-url http://127.0.0.1:8080/v1  this server: stories per second, latency

Without a URL the teacher is a local server that answers immediately, so only the overhead of the clients is measured.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.config import add_number
from tinystory.data.corpus import open_corpus
from tinystory.run.errors import command
from tinystory.teacher.client import Teacher
from tinystory.teacher.prompt import fence, render

OPENING, WORDS = "Once upon a time,", 80  # words per story


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-url", metavar="URL", help="measure the server at this URL, not our client")
    add_number(parser, "--stories", 0, "[0, 1e6]", "stories per run; 0: 2000, or 16 with a URL")
    add_number(parser, "--concurrency", 64, "[1, 10000]", "requests in flight")
    add_number(parser, "--runs", 3, "[1, 1e6]", "timed runs, after a warm-up run")
    options = parser.parse_args(argv)
    count = options.stories or (16 if options.teacher_url else 2000)
    facts = dict(stories=count, runs=options.runs, concurrency=options.concurrency)
    if options.teacher_url:
        result = server_speed(options.teacher_url, count, options.concurrency, options.runs)
    else:
        with instant_server() as url:
            result = client_overhead(url, count, options.concurrency, options.runs)
    print(json.dumps(facts | result), flush=True)


def server_speed(url: str, count: int, concurrency: int, runs: int) -> dict[str, float]:
    """Stories per second with `concurrency` requests in flight, and seconds per story with one."""
    with Teacher(url, concurrency=concurrency) as many, Teacher(url, concurrency=1) as one:
        clients = {"many": lambda stories: many.grade(OPENING, stories), "one": lambda s: one.grade(OPENING, s)}
        seconds = {name: lap[0] for name, lap in take_turns(clients, count, runs).items()}
    return dict(one_per_s=round(count / seconds["many"], 3), latency_s=round(seconds["one"] / count, 3))


def client_overhead(url: str, count: int, concurrency: int, runs: int) -> dict[str, float]:
    """Stories per second and CPU milliseconds per story in this process, by our client (prompt, cache and parsing
    included) and by the bare openai client on aiohttp, the faster of its transports; ratio: our rate over its rate."""
    import openai

    def ours(stories: list[str]) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            Teacher(url, concurrency=concurrency, cache=Path(folder) / "replies.jsonl") as teacher,
        ):
            assert all(grade.scores for grade in teacher.grade(OPENING, stories))

    async def bare(stories: list[str]) -> None:
        slots, transport = asyncio.Semaphore(concurrency), openai.DefaultAioHttpClient()
        async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=transport) as client:

            async def request(index: int, story: str) -> None:
                prompt: dict[str, Any] = dict(messages=render(OPENING, story, fence=fence(0, index, story)))
                async with slots:
                    await client.chat.completions.create(model="m", temperature=0.2, max_tokens=6, seed=0, **prompt)

            await asyncio.gather(*itertools.starmap(request, enumerate(stories)))

    laps = take_turns({"ours": ours, "bare": lambda stories: asyncio.run(bare(stories))}, count, runs)
    result = {f"{name}_per_s": round(count / seconds, 1) for name, (seconds, _) in laps.items()}
    result |= {f"{name}_cpu_ms": round(1e3 * cpu / count, 3) for name, (_, cpu) in laps.items()}
    return result | dict(ratio=round(laps["bare"][0] / laps["ours"][0], 3))


def take_turns(clients: dict[str, Callable[[list[str]], Any]], count: int, runs: int) -> dict[str, list[float]]:
    """Per client, the median seconds and CPU seconds for `count` stories, new ones each time, after a warm-up run."""
    documents = open_corpus(["builtin"]).documents()
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
    for _ in range(runs + 1):
        for name, client in clients.items():
            stories = [" ".join(document.split()[:WORDS]) for document in itertools.islice(documents, count)]
            start, cpu_start = time.perf_counter(), time.process_time()
            client(stories)
            laps[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return {name: [statistics.median(lap) for lap in zip(*times[1:], strict=True)] for name, times in laps.items()}


@contextlib.contextmanager
def instant_server() -> Iterator[str]:
    """The URL of a server in its own process that replies "2 1 3" to every request at once."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(sender,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{receiver.recv()}/v1"
    finally:
        process.kill()
        process.join()


def serve(sender: Connection) -> None:
    from aiohttp import web

    choice = dict(index=0, message={"role": "assistant", "content": "2 1 3"}, finish_reason="stop")
    usage = dict(prompt_tokens=500, completion_tokens=6, total_tokens=506)
    completion = dict(id="1", object="chat.completion", created=0, model="m", choices=[choice], usage=usage)
    models = dict(object="list", data=[dict(id="m", object="model", created=0, owned_by="tinystory")])

    async def answer(request: web.BaseRequest) -> web.Response:
        await request.read()
        return web.json_response(models if request.method == "GET" else completion)

    async def run() -> None:
        runner = web.ServerRunner(web.Server(answer, access_log=None))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        sender.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


if __name__ == "__main__":
    main()
