"""The built-in teacher: the rubric behind OpenAI's HTTP interface, on this machine only.

It stands in for an LLM and says so in /v1/models. It gets the same prompt as an LLM, finds the story in it, measures it
and replies "2 1 3", or the JSON that a response_format asks for. A prompt that does not ask for these three criteria
gets a reply in words, without numbers.

Tokens are words, numbers and single other characters, each with the space before it, plus 3 per message.
"""

import itertools
import json
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.typedefs import Handler

from tinystory.errors import UserError
from tinystory.rubric.rubric import Rubric
from tinystory.teacher.prompt import CRITERIA, read_back

HOST = "127.0.0.1"
MODEL = "tinystory-rubric"
DESCRIPTION = "A rubric measured on the text: a stand-in for an LLM, so that a run needs none. It only grades stories."
CANNOT = (
    "I am a rubric that stands in for a language model. I can only grade a story, asked for in tinystory's own words, "
    f"for {', '.join(CRITERIA)}; I found no such question here, so I give no grades."
)
LONGEST_BODY = 256 * 1024  # bytes; a request has about 4,000
ROLES = ("system", "developer", "user", "assistant", "tool")
TOKEN = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")


@asynccontextmanager
async def serve(rubric: Rubric, port: int = 0, model: str = MODEL) -> AsyncIterator[str]:
    """Serve on 127.0.0.1 for as long as the block runs, and yield the base URL. port: 0 takes a free one.

    Raises UserError if the port is not free.
    """
    runner = web.AppRunner(_application(rubric, model), access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, HOST, port).start()
        except OSError as error:
            raise UserError(f"port {port} cannot be had ({error.strerror}): choose another with --port") from None
        yield f"http://{HOST}:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


class _Refused(Exception):
    """The client's mistake, for an error response in OpenAI's format."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


def _application(rubric: Rubric, model: str) -> web.Application:
    entry = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "tinystory"}
    entry["description"] = DESCRIPTION

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [entry]})

    async def one_model(request: web.Request) -> web.Response:
        _check_model(request.match_info["model"], model)
        return web.json_response(entry)

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def chat(request: web.Request) -> web.Response:
        asked = _parsed(await request.read())
        messages, keys = _checked(asked, model)
        reply = _reply(rubric, messages, keys)
        longest = asked.get("max_completion_tokens") or asked.get("max_tokens")
        pieces = TOKEN.findall(reply)
        kept = pieces[:longest]
        prompt = sum(len(TOKEN.findall(message["content"])) + 3 for message in messages)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(kept), "refusal": None},
            "logprobs": None,
            "finish_reason": "stop" if len(kept) == len(pieces) else "length",
        }
        usage = {"prompt_tokens": prompt, "completion_tokens": len(kept), "total_tokens": prompt + len(kept)}
        return web.json_response(
            {
                "id": f"chatcmpl-{uuid.uuid4().hex}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": model,
                "choices": [choice],
                "usage": usage,
            }
        )

    application = web.Application(middlewares=[_in_openai_shape], client_max_size=LONGEST_BODY)
    application.on_response_prepare.append(_name_request)
    application.router.add_post("/v1/chat/completions", chat)
    application.router.add_get("/v1/models", models)
    application.router.add_get("/v1/models/{model:.+}", one_model)
    application.router.add_get("/health", health)
    return application


@web.middleware
async def _in_openai_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error, including aiohttp's own, into {"error": {message, type, param, code}}."""
    headers = {}
    try:
        return await handler(request)
    except _Refused as error:
        refused = error
    except web.HTTPNotFound:
        refused = _Refused(f"Unknown request URL: {request.method} {request.path}", code="unknown_url", status=404)
    except web.HTTPMethodNotAllowed as error:
        headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        message = f"Not allowed to {request.method} on {request.path} (HINT: use {headers['Allow']})"
        refused = _Refused(message, code="method_not_supported", status=405)
    except web.HTTPRequestEntityTooLarge:
        message = f"The body of the request is longer than {LONGEST_BODY} bytes."
        refused = _Refused(message, code="request_too_large", status=413)
    body = {"message": refused.message, "type": "invalid_request_error", "param": refused.param, "code": refused.code}
    return web.json_response({"error": body}, status=refused.status, headers=headers)


_serial = itertools.count(1)


async def _name_request(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = f"req_{next(_serial):012d}"


def _parsed(body: bytes) -> dict:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise _Refused(f"The body of the request is not valid JSON: {str(error)[:100]}.") from None
    if not isinstance(asked, dict):
        raise _Refused("The body of the request must be a JSON object.")
    return asked


def _check_model(name: str, model: str) -> None:
    if name != model:
        message = f"The model `{name[:100]}` does not exist; this server has `{model}`."
        raise _Refused(message, "model", "model_not_found", 404)


def _checked(asked: dict, model: str) -> tuple[list[dict], list[str] | None]:
    """The messages, with each content as text, and the keys of the JSON object to reply with (None: reply as text)."""
    name = asked.get("model")
    if not isinstance(name, str):
        raise _Refused("You must provide a model: a string.", "model")
    _check_model(name, model)
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _Refused("`messages` must be a list of at least one message.", "messages")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    for param in ("stream", "logprobs", "tools", "functions"):
        if asked.get(param):
            raise _Refused(f"`{param}` is not supported by this model.", param, "unsupported_parameter")
    if asked.get("n") not in (None, 1):
        raise _Refused("`n` must be 1: this model always gives the same answer.", "n", "unsupported_value")
    for param in ("max_tokens", "max_completion_tokens"):
        value = asked.get(param)
        if value is not None and (type(value) is not int or value < 1):  # True is an int too
            raise _Refused(f"`{param}` must be a whole number of at least 1.", param, "invalid_value")
    temperature, seed = asked.get("temperature"), asked.get("seed")
    if temperature is not None and (type(temperature) not in (int, float) or not 0 <= temperature <= 2):
        raise _Refused("`temperature` must be a number from 0 to 2.", "temperature", "invalid_value")
    if seed is not None and type(seed) is not int:
        raise _Refused("`seed` must be a whole number.", "seed", "invalid_type")
    return messages, _keys(asked.get("response_format"))


def _message(message: object, where: str) -> dict:
    match message:
        case {"role": str(role), "content": str(content)} if role in ROLES:
            return {"role": role, "content": content}
        case {"role": str(role), "content": [*parts]} if role in ROLES:
            texts = [part["text"] for part in parts if _is_text(part)]
            if len(texts) == len(parts):
                return {"role": role, "content": "".join(texts)}
            raise _Refused("This model reads text only.", f"{where}.content", "unsupported_value")
    raise _Refused(f"A message needs a role ({', '.join(ROLES)}) and a content that is text.", where, "invalid_type")


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _keys(response_format: object) -> list[str] | None:
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return list(CRITERIA)
        case {"type": "json_schema", "json_schema": {"schema": {"properties": dict(properties)}}}:
            if properties.keys() == set(CRITERIA):
                return list(properties)
            message = f"This model can only fill a schema whose properties are {', '.join(CRITERIA)}."
            raise _Refused(message, "response_format.json_schema.schema", "unsupported_value")
    raise _Refused(
        "`response_format` must be of type text, json_object, or json_schema with a schema that has properties.",
        "response_format",
        "invalid_value",
    )


def _reply(rubric: Rubric, messages: list[dict], keys: list[str] | None) -> str:
    found = read_back(messages)
    if found is None or ", ".join(CRITERIA) not in messages[0]["content"]:  # it asks for other criteria
        return CANNOT if keys is None else json.dumps({"error": CANNOT})
    scores = rubric.score(*found)
    if keys is None:
        return " ".join(str(scores[name]) for name in CRITERIA)
    return json.dumps({name: scores[name] for name in keys})
