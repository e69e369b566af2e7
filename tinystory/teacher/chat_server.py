"""A server of OpenAI's chat completions on this machine, for teachers that are not language models.
Each word, number or other character counts as a token, and each message as 3 more."""

import asyncio
import contextlib
import logging
import operator
import re
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from aiohttp import http, web
from aiohttp.typedefs import Handler

from tinystory.run.errors import UserError
from tinystory.teacher.api import parse_json

HOST = "127.0.0.1"
PORTS = "[0, 65535]"  # range of the option --port
# A word, number or other character, with the white space before it: about one token.
PIECE = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")
LONGEST_BODY = 256 * 1024  # maximum bytes of a request; most requests have about 4,000

# Function from the messages of a request to the reply; may raise Refused.
Responder: TypeAlias = Callable[[list[dict]], Awaitable[str]]
# Errors caused by a client: malformed requests and closed connections.
CLIENT_ERRORS = (http.HttpProcessingError, web.RequestPayloadError, ConnectionError)

# Without this filter, aiohttp would log CLIENT_ERRORS with a traceback.
logger = logging.getLogger(__name__)
logger.addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], CLIENT_ERRORS))
)


@contextlib.asynccontextmanager
async def listening(application: web.Application, port: int = 0) -> AsyncIterator[str]:
    """Yields the URL, without a path, of a server on 127.0.0.1 that runs during the block. port: 0
    takes a free port. Raises UserError if the server cannot listen on the port."""
    # handler_cancellation: when a client closes the connection, the handler is cancelled, so a
    # human never grades a story that no client waits for.
    runner = web.AppRunner(
        application, access_log=None, logger=logger, shutdown_timeout=1.0, handler_cancellation=True
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, HOST, port).start()
        except OSError as error:
            raise UserError(
                f"cannot listen on port {port} ({error.strerror}): choose another port with --port"
            ) from None
        yield f"http://{HOST}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def until_stopped(or_stdin_closed: bool = False) -> None:
    """Wait for Ctrl-C or SIGTERM. or_stdin_closed: also stop waiting when standard input is closed,
    which happens when the parent process ends; the parent must send no input."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stopped.set)
    if or_stdin_closed:
        loop.add_reader(0, stopped.set)
    await stopped.wait()


@dataclass(eq=False)
class Refused(Exception):
    """A client's mistake. The client receives it as an error response in OpenAI's format."""

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400


def application(model: str, description: str, respond: Responder) -> web.Application:
    """The routes of a server with the single model `model`."""
    entry = {
        "id": model,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "tinystory",
        "description": description,
    }

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [entry]})

    async def chat(request: web.Request) -> web.Response:
        body = parse_body(await request.read())
        _check(body, model)
        messages = body["messages"]
        whole = PIECE.findall(await respond(messages))
        reply = whole[: body.get("max_completion_tokens") or body.get("max_tokens")]
        n_prompt = sum(len(PIECE.findall(message["content"])) + 3 for message in messages)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(reply)},
            "finish_reason": "stop" if reply == whole else "length",
        }
        usage = {
            "prompt_tokens": n_prompt,
            "completion_tokens": len(reply),
            "total_tokens": n_prompt + len(reply),
        }
        answer = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [choice],
            "usage": usage,
        }
        return web.json_response(answer)

    routes = web.Application(middlewares=[errors_as_json], client_max_size=LONGEST_BODY)
    routes.router.add_post("/v1/chat/completions", chat)
    routes.router.add_get("/v1/models", models)
    return routes


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware that turns every error, including those of aiohttp, into a response {"error":
    {message, type, param, code}}."""
    try:
        return await handler(request)
    except Refused as error:
        refused = error
    except web.RequestPayloadError:
        refused = Refused("The body of the request cannot be read.")
    except web.HTTPException as error:  # an unknown URL or method, a body that is too long
        refused = Refused(f"{error.reason}: {request.method} {request.path}", status=error.status)
    body = {
        "message": refused.message,
        "type": "invalid_request_error",
        "param": refused.param,
        "code": refused.code,
    }
    return web.json_response({"error": body}, status=refused.status)


def parse_body(body: bytes) -> dict:
    """The JSON object in a request's body. Raises Refused for anything else."""
    value = parse_json(body)
    if not isinstance(value, dict):
        raise Refused("The body of the request must be a JSON object.")
    return value


def _is_message(value: object) -> bool:
    match value:
        case {"role": str(), "content": str()}:
            return True
    return False


def _is_limit(value: object) -> bool:
    return value is None or (type(value) is int and value >= 1)  # True is an int too


# Name of a field of a request -> test of the value, which is None if the field is missing.
RULES: dict[str, Callable[[Any], object]] = {
    "model": lambda value: isinstance(value, str),
    "messages": lambda value: isinstance(value, list) and value and all(map(_is_message, value)),
    "n": (None, 1).__contains__,
    "response_format": (None, {"type": "text"}).__contains__,
    "max_tokens": _is_limit,
    "max_completion_tokens": _is_limit,
    "stream": operator.not_,
    "logprobs": operator.not_,
    "tools": operator.not_,
    "functions": operator.not_,
}


def _check(body: dict, model: str) -> None:
    """Raises Refused for the first field that is invalid or asks for something unsupported."""
    for name, is_valid in RULES.items():
        value = body.get(name)
        if not is_valid(value):
            raise Refused(f"`{name}` cannot be {value!r:.100} here.", name)
    if body["model"] != model:
        message = f"The model `{body['model'][:100]}` does not exist; this server has `{model}`."
        raise Refused(message, "model", "model_not_found", 404)
