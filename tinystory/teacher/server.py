"""OpenAI's chat completions as a server on this machine, for the teachers that are not language models.

Tokens are words, numbers and single other characters, each with the space before it, plus 3 per message.
"""

import asyncio
import json
import logging
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from aiohttp import http, web
from aiohttp.typedefs import Handler

from tinystory.run.errors import UserError
from tinystory.teacher.endpoint import PIECE

HOST = "127.0.0.1"
PORTS = "[0, 65535]"  # of an option
LONGEST_BODY = 256 * 1024  # bytes; a request has about 4,000
KEEP_ALIVE_S = 5.0  # between the spaces before an answer that takes long

Responder: TypeAlias = Callable[[list[dict]], Awaitable[str]]  # the reply to messages; it may raise Refused
CLIENT_ERRORS = (http.HttpProcessingError, web.RequestPayloadError, ConnectionError)  # garbage, or a hang-up

# aiohttp logs the errors of clients too, each with a traceback.
logger = logging.getLogger(__name__)
logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], CLIENT_ERRORS)))


@asynccontextmanager
async def listening(application: web.Application, port: int = 0) -> AsyncIterator[str]:
    """Serve on 127.0.0.1 for as long as the block runs, and yield the URL without a path. port: 0 takes a free one.

    Raises UserError if the port is not free.
    """
    runner = web.AppRunner(application, access_log=None, logger=logger, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, HOST, port).start()
        except OSError as error:
            raise UserError(f"port {port} cannot be had ({error.strerror}): choose another with --port") from None
        yield f"http://{HOST}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def until_stopped() -> None:
    """Returns at Ctrl-C or SIGTERM, for which a server ends as usual."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stopped.set)
    await stopped.wait()


class Refused(Exception):
    """The client's mistake, for an error response in OpenAI's format."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


def application(model: str, description: str, respond: Responder) -> web.Application:
    """The routes of a server whose only model is `model`."""
    entry = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "tinystory"}
    entry["description"] = description

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [entry]})

    async def chat(request: web.Request) -> web.StreamResponse:
        body = parse_body(await request.read())
        _check_model(body.get("model"), model)
        messages = _messages(body.get("messages"))
        _check_parameters(body)
        return await _kept_alive(request, completion(body, messages))

    async def completion(body: dict, messages: list[dict]) -> dict:
        longest = body.get("max_completion_tokens") or body.get("max_tokens")
        tokens = PIECE.findall(await respond(messages))
        n_reply = len(tokens[:longest])
        n_prompt = sum(len(PIECE.findall(message["content"])) + 3 for message in messages)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(tokens[:n_reply]), "refusal": None},
            "logprobs": None,
            "finish_reason": "stop" if n_reply == len(tokens) else "length",
        }
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [choice],
            "usage": dict(prompt_tokens=n_prompt, completion_tokens=n_reply, total_tokens=n_prompt + n_reply),
        }

    routes = web.Application(middlewares=[errors_as_json], client_max_size=LONGEST_BODY)
    routes.router.add_post("/v1/chat/completions", chat)
    routes.router.add_get("/v1/models", models)
    return routes


async def _kept_alive(request: web.Request, answer: Coroutine[Any, Any, dict]) -> web.StreamResponse:
    """The response with this answer. While the answer takes its time, as a human's does, a space is sent now and then:
    JSON may begin with spaces, the client sees that the server lives, and we see when the client does not."""
    task = asyncio.ensure_future(answer)
    try:
        done, _ = await asyncio.wait({task}, timeout=KEEP_ALIVE_S)
        if done:
            return web.json_response(task.result())
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        while not done:
            await response.write(b" ")
            done, _ = await asyncio.wait({task}, timeout=KEEP_ALIVE_S)
        await response.write(json.dumps(task.result()).encode())
        await response.write_eof()
        return response
    finally:
        task.cancel()


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error, including aiohttp's own, into {"error": {message, type, param, code}}."""
    try:
        return await handler(request)
    except Refused as error:
        refused = error
    except web.RequestPayloadError:
        refused = Refused("The body of the request cannot be read.")
    except web.HTTPException as error:  # an unknown URL or method, a body that is too long
        refused = Refused(f"{error.reason}: {request.method} {request.path}", status=error.status)
    body = {"message": refused.message, "type": "invalid_request_error", "param": refused.param, "code": refused.code}
    return web.json_response({"error": body}, status=refused.status)


def parse_body(body: bytes) -> dict:
    """The JSON object in a request's body."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise Refused(f"The body of the request is not valid JSON: {str(error)[:100]}.") from None
    if not isinstance(value, dict):
        raise Refused("The body of the request must be a JSON object.")
    return value


def _check_model(name: object, model: str) -> None:
    if not isinstance(name, str):
        raise Refused("You must provide a model: a string.", "model")
    if name != model:
        message = f"The model `{name[:100]}` does not exist; this server has `{model}`."
        raise Refused(message, "model", "model_not_found", 404)


def _messages(value: object) -> list[dict]:
    """The messages, each with a role and a content that is text."""
    if not isinstance(value, list) or not value:
        raise Refused("`messages` must be a list of at least one message.", "messages")
    for index, message in enumerate(value):
        match message:
            case {"role": str(), "content": str()}:
                continue
        raise Refused("A message needs a role and a content that is text.", f"messages[{index}]", "invalid_type")
    return value


def _check_parameters(body: dict) -> None:
    counts, unsupported = ("max_tokens", "max_completion_tokens"), ("stream", "logprobs", "tools", "functions")
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {  # True is an int too
        **{name: (lambda v: type(v) is int and v >= 1, "must be a whole number of at least 1.") for name in counts},
        **{name: (lambda v: not v, "is not supported by this model.") for name in unsupported},
        "n": (lambda v: v == 1, "must be 1: this model always gives the same answer."),
        "response_format": (lambda v: v == {"type": "text"}, "must be of type text: this model replies in no other."),
    }
    for name, (is_valid, requirement) in rules.items():
        if body.get(name) is not None and not is_valid(body[name]):
            raise Refused(f"`{name}` {requirement}", name, "invalid_value")
