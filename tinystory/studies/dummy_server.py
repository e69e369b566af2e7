"""A local OpenAI-compatible teacher that gives every story the same scores, to time the client and the loop."""

import asyncio
import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

SLOTS = 8  # requests that it works on at a time, as a model's server does; the others wait


@contextlib.contextmanager
def dummy_server(latency: float = 0.0) -> Iterator[str]:
    """The URL of a server in its own process that replies "2 1 3" to every request, after `latency` seconds."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(sender, latency), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{receiver.recv()}/v1"
    finally:
        process.kill()
        process.join()


def serve(sender: Connection, latency: float) -> None:
    from aiohttp import web

    choice = dict(index=0, message={"role": "assistant", "content": "2 1 3"}, finish_reason="stop")
    usage = dict(prompt_tokens=500, completion_tokens=6, total_tokens=506)
    completion = dict(id="1", object="chat.completion", created=0, model="m", choices=[choice], usage=usage)
    models = dict(object="list", data=[dict(id="m", object="model", created=0, owned_by="tinystory")])
    slots = asyncio.Semaphore(SLOTS)

    async def answer(request: web.BaseRequest) -> web.Response:
        await request.read()
        if latency and request.method == "POST":
            async with slots:
                await asyncio.sleep(latency)
        return web.json_response(models if request.method == "GET" else completion)

    async def run() -> None:
        runner = web.ServerRunner(web.Server(answer, access_log=None))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        sender.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())
