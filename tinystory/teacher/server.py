"""OpenAI's chat completions as a server on this machine, for the teachers that are not language models.

Tokens are words, numbers and single other characters, each with the space before it, plus 3 per message.
"""

import asyncio
import itertools
import json
import logging
import math
import re
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from aiohttp import http, web
from aiohttp.typedefs import Handler

from tinystory.run.errors import UserError

HOST = "127.0.0.1"
LONGEST_BODY = 256 * 1024  # bytes; a request has about 4,000
BREATH_S = 5.0  # between the spaces before an answer that takes long
ROLES = ("system", "developer", "user", "assistant", "tool")
TOKEN = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")

Reply: TypeAlias = Callable[[list[dict], list[str] | None], Awaitable[str]]
FAULTS_OF_CLIENTS = (http.HttpProcessingError, web.RequestPayloadError, ConnectionError)  # garbage, or a hang-up


def _our_fault(record: logging.LogRecord) -> bool:
    """Whether what aiohttp logs is a fault of ours. It logs those of clients as errors too, each with a traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], FAULTS_OF_CLIENTS))


logger = logging.getLogger(__name__)
logger.addFilter(_our_fault)


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


def require_port(port: int) -> None:
    """Raises UserError if there can be no such port."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} is not a port: give a number from 0 to 65535")


async def until_stopped() -> None:
    """Returns at Ctrl-C or SIGTERM, for which a server ends as usual."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, ended.set)
    await ended.wait()


class Refused(Exception):
    """The client's mistake, for an error response in OpenAI's format."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


def application(model: str, description: str, criteria: Sequence[str], reply: Reply) -> web.Application:
    """The routes of a server whose only model is `model`. reply(messages, keys) answers one request: as text, or with
    the JSON object that has these keys, which are `criteria` in the order asked for; it may raise Refused."""
    entry = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "tinystory"}
    entry["description"] = description

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [entry]})

    async def one_model(request: web.Request) -> web.Response:
        _check_model(request.match_info["model"], model)
        return web.json_response(entry)

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def chat(request: web.Request) -> web.StreamResponse:
        asked = parsed(await request.read())
        messages, keys = _checked(asked, model, criteria)
        return await _sent(request, _completion(asked, messages, keys))

    async def _completion(asked: dict, messages: list[dict], keys: list[str] | None) -> dict:
        longest = asked.get("max_completion_tokens") or asked.get("max_tokens")
        pieces = TOKEN.findall(await reply(messages, keys))
        kept = pieces[:longest]
        prompt = sum(len(TOKEN.findall(message["content"])) + 3 for message in messages)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(kept), "refusal": None},
            "logprobs": None,
            "finish_reason": "stop" if len(kept) == len(pieces) else "length",
        }
        usage = {"prompt_tokens": prompt, "completion_tokens": len(kept), "total_tokens": prompt + len(kept)}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [choice],
            "usage": usage,
        }

    routes = web.Application(middlewares=[in_openai_shape], client_max_size=LONGEST_BODY)
    routes.on_response_prepare.append(_name_request)
    routes.router.add_post("/v1/chat/completions", chat)
    routes.router.add_get("/v1/models", models)
    routes.router.add_get("/v1/models/{model:.+}", one_model)
    routes.router.add_get("/health", health)
    return routes


async def _sent(request: web.Request, answer: Coroutine[Any, Any, dict]) -> web.StreamResponse:
    """The response with this answer. While the answer takes its time, as a person's does, a space is sent now and then:
    JSON may begin with spaces, the client sees that the server lives, and we see when the client does not."""
    task = asyncio.ensure_future(answer)
    try:
        done, _ = await asyncio.wait({task}, timeout=BREATH_S)
        if done:
            return web.json_response(task.result())
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        while not done:
            await response.write(b" ")
            done, _ = await asyncio.wait({task}, timeout=BREATH_S)
        await response.write(json.dumps(task.result()).encode())
        await response.write_eof()
        return response
    finally:
        task.cancel()


@web.middleware
async def in_openai_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error, including aiohttp's own, into {"error": {message, type, param, code}}."""
    headers = {}
    try:
        return await handler(request)
    except Refused as error:
        refused = error
    except web.HTTPNotFound:
        refused = Refused(f"Unknown request URL: {request.method} {request.path}", code="unknown_url", status=404)
    except web.HTTPMethodNotAllowed as error:
        headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        message = f"Not allowed to {request.method} on {request.path} (HINT: use {headers['Allow']})"
        refused = Refused(message, code="method_not_supported", status=405)
    except web.RequestPayloadError:
        refused = Refused("The body of the request cannot be read.")
    except web.HTTPRequestEntityTooLarge:
        message = f"The body of the request is longer than {LONGEST_BODY} bytes."
        refused = Refused(message, code="request_too_large", status=413)
    body = {"message": refused.message, "type": "invalid_request_error", "param": refused.param, "code": refused.code}
    return web.json_response({"error": body}, status=refused.status, headers=headers)


_serial = itertools.count(1)


async def _name_request(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = f"req_{next(_serial):012d}"


def parsed(body: bytes) -> dict:
    try:
        asked = json.loads(body, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON (as NaN is not), or nested too deeply
        raise Refused(f"The body of the request is not valid JSON: {str(error)[:100]}.") from None
    if not isinstance(asked, dict):
        raise Refused("The body of the request must be a JSON object.")
    return asked


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


def _check_model(name: str, model: str) -> None:
    if name != model:
        message = f"The model `{name[:100]}` does not exist; this server has `{model}`."
        raise Refused(message, "model", "model_not_found", 404)


def _checked(asked: dict, model: str, criteria: Sequence[str]) -> tuple[list[dict], list[str] | None]:
    """The messages, with each content as text, and the keys of the JSON object to reply with (None: reply as text)."""
    name = asked.get("model")
    if not isinstance(name, str):
        raise Refused("You must provide a model: a string.", "model")
    _check_model(name, model)
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("`messages` must be a list of at least one message.", "messages")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    for param in ("stream", "logprobs", "tools", "functions"):
        if asked.get(param):
            raise Refused(f"`{param}` is not supported by this model.", param, "unsupported_parameter")
    if asked.get("n") not in (None, 1):
        raise Refused("`n` must be 1: this model always gives the same answer.", "n", "unsupported_value")
    for param in ("max_tokens", "max_completion_tokens"):
        value = asked.get(param)
        if value is not None and (type(value) is not int or value < 1):  # True is an int too
            raise Refused(f"`{param}` must be a whole number of at least 1.", param, "invalid_value")
    temperature, seed = asked.get("temperature"), asked.get("seed")
    if temperature is not None and (type(temperature) not in (int, float) or not 0 <= temperature <= 2):
        raise Refused("`temperature` must be a number from 0 to 2.", "temperature", "invalid_value")
    if seed is not None and type(seed) is not int:
        raise Refused("`seed` must be a whole number.", "seed", "invalid_type")
    return messages, _keys(asked.get("response_format"), criteria)


def _message(message: object, where: str) -> dict:
    match message:
        case {"role": str(role), "content": str(content)} if role in ROLES:
            return {"role": role, "content": content}
        case {"role": str(role), "content": [*parts]} if role in ROLES:
            texts = [part["text"] for part in parts if _is_text(part)]
            if len(texts) == len(parts):
                return {"role": role, "content": "".join(texts)}
            raise Refused("This model reads text only.", f"{where}.content", "unsupported_value")
    raise Refused(f"A message needs a role ({', '.join(ROLES)}) and a content that is text.", where, "invalid_type")


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _keys(response_format: object, criteria: Sequence[str]) -> list[str] | None:
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return list(criteria)
        case {"type": "json_schema", "json_schema": {"schema": {"properties": dict(properties)}}}:
            if properties.keys() == set(criteria):
                return list(properties)
            message = f"This model can only fill a schema whose properties are {', '.join(criteria)}."
            raise Refused(message, "response_format.json_schema.schema", "unsupported_value")
    raise Refused(
        "`response_format` must be of type text, json_object, or json_schema with a schema that has properties.",
        "response_format",
        "invalid_value",
    )
