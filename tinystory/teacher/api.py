"""HTTP client of one OpenAI-compatible server. Its answers are not trusted: their size is bounded,
their shape is checked, and control characters and an echoed key are removed before any text is
quoted in a message."""

import asyncio
import functools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tinystory.run.credentials import redacted
from tinystory.run.text import printable

if TYPE_CHECKING:
    import httpx2
    import openai

T = TypeVar("T")
LONGEST_ANSWER = 4 * 2**20  # bytes; some hosts list hundreds of models, with prices
# shorter than any server's (5 for uvicorn and so vLLM), which must not close while we send
KEEP_ALIVE_S = 2.0
LEAST_LOGPROB = -1e4  # of a token; OpenAI gives -9999 for an impossible one
LONGEST_MESSAGE = 300  # characters of the server's message that an error quotes

NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
WRONG_KEY = "no_db_connection"  # litellm's 400 for a wrong key
NOT_OPENAI = "answers, but not as an OpenAI-compatible API: check the URL"
LOOPBACK = re.compile(r"https?://(localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?(/|$)", re.IGNORECASE)
NO_CONTEXT = re.compile(r"context[ _](length|size|window)", re.IGNORECASE)
# Errors of models without a system message: Gemma's and Mistral's chat templates (500 from
# llama.cpp), Google's API.
NO_SYSTEM = re.compile(
    r"(system|developer) (role|message|prompt|instruction)|roles must alternate|roles are supported",
    re.IGNORECASE,
)
CUT_SHORT = "output limit was reached"  # OpenAI's 400 when reasoning uses up the token limit
# fields of an error to read
ERROR_FIELDS = ("message", "error", "detail", "loc", "msg", "metadata", "raw", "type", "code")


@dataclass(eq=False)
class Failure(Exception):
    """A request failed. `message` completes the sentence "the teacher at URL ..."."""

    message: str
    _: KW_ONLY
    status: int | None = None  # HTTP status; None if no answer came
    again: bool = False  # transient: worth a retry
    busy: bool = False  # the server asks for fewer requests
    fatal: bool = False  # every other story would fail in the same way
    unreachable: bool = False  # no connection could be made
    retry_after: float = 0.0  # seconds that the server asks to wait
    url: str = ""  # the server's, once it is given up


@dataclass(frozen=True)
class Reply:
    """A chat completion's first choice."""

    text: str  # "" if the server sends none
    thought: bool  # whether the model reasoned before it replied, visibly or not
    # (prompt, completion) as the server counts them; None if it does not
    tokens: tuple[int, int] | None = None
    # (token, log-probability) of the likeliest first tokens of the text; () if the server gives none
    alternatives: tuple[tuple[str, float], ...] = ()


class ChatClient:
    """The server at `url` (including /v1), on one event loop. Only connecting has a time limit;
    callers set others."""

    def __init__(self, url: str, key: str):
        self._url = url
        self._key = key.strip()

    @functools.cached_property
    def _client(self) -> "openai.AsyncOpenAI":
        """Made for the first request: importing openai takes two seconds."""
        import httpx2
        import openai

        timeout = openai.Timeout(None, connect=10.0)
        # The pool limits the connections: to aiohttp, 0 means no limit and None its own limit of
        # 100. A redirect could carry the key to another host, so none is followed. A proxy cannot
        # reach this machine's loopback.
        http_client = openai.DefaultAioHttpClient(
            timeout=timeout,
            limits=httpx2.Limits(max_connections=0, keepalive_expiry=KEEP_ALIVE_S),
            follow_redirects=False,
            event_hooks={"response": [self._check_status]},
            trust_env=not LOOPBACK.match(self._url),
        )
        return openai.AsyncOpenAI(
            base_url=self._url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=timeout,
            http_client=http_client,
        )

    async def close(self) -> None:
        if "_client" in vars(self):
            await self._client.close()

    async def models(self) -> list[str]:
        """Model names, in the server's order."""
        answer: Any = await self._answer(
            lambda client: client.models.with_streaming_response.list()
        )
        try:
            names = [self.one_line(str(entry["id"])) for entry in answer["data"]]
        except (TypeError, KeyError):
            raise Failure(NOT_OPENAI, status=200) from None
        return [name for name in names if name]

    async def chat(self, body: Mapping[str, Any]) -> Reply:
        # openai sends the extra body unchanged; elsewhere it would check the type of every field.
        try:
            answer = await self._answer(
                lambda client: client.chat.completions.with_streaming_response.create(
                    model="", messages=[], extra_body=body
                )
            )
        except Failure as failure:
            if failure.status == 400 and CUT_SHORT in failure.message:
                return Reply("", thought=True)
            raise
        match answer:
            case {"choices": [{"message": {**message}, **choice}, *_], **rest}:
                content = message.get("content") or ""
            case _:
                content = None
        if not isinstance(content, str):
            error = self.one_line("; ".join(_error_texts(answer)))
            reason = f"answers, but not with a chat completion ({error or 'nor an error'})"
            raise Failure(reason, status=200, again=True)
        # JSON can hold lone surrogates, which cannot be encoded.
        content = content.encode(errors="replace").decode()
        # Some servers leave the reasoning in the text.
        before, _, text = content.rpartition("</think>")
        thoughts = before.replace("<think>", "").strip()
        if before:
            text = text.lstrip()
        text = redacted(text, self._key)  # but not a dummy such as "1": a score may look like it
        apart = message.get("reasoning_content") or message.get("reasoning")
        cut = choice.get("finish_reason") == "length" and not text.strip()
        return Reply(
            text,
            thought=bool(apart or thoughts) or cut or "<think>" in text[:20],
            tokens=_tokens(rest.get("usage")),
            alternatives=_alternatives(choice.get("logprobs")),
        )

    async def _answer(
        self,
        request: Callable[["openai.AsyncOpenAI"], AbstractAsyncContextManager[Any]],
    ) -> object:
        """Parsed JSON of the response. Raises Failure for a request that cannot be made or a
        connection that breaks."""
        import aiohttp
        import httpx2
        import openai

        broken = (openai.APIConnectionError, httpx2.RequestError, aiohttp.ClientError, OSError)
        try:
            async with request(self._client) as response:
                return parse_json(await _read(response.iter_bytes()))
        except (ValueError, httpx2.InvalidURL):  # whose texts can hold a password
            raise Failure(
                "cannot be asked: its URL, a proxy (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY), OPENAI_API_KEY or another "
                "variable OPENAI_... is not valid",
                fatal=True,
            ) from None
        except broken as error:
            causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        root = causes[-1]
        if isinstance(root, Failure):  # from _check_status: openai before 3.16 wraps it
            raise root
        message = self.one_line(str(root) or type(root).__name__)
        if any(isinstance(cause, aiohttp.ClientConnectorError) for cause in causes):
            advice = "start it, or check the URL and any proxy (HTTP_PROXY, HTTPS_PROXY, NO_PROXY)"
            message = f"cannot be reached ({message}): {advice}"
            raise Failure(message, again=True, unreachable=True)
        raise Failure(f"broke off ({message})", again=True)

    async def _check_status(self, response: "httpx2.Response") -> None:
        """Response hook, called before the body is read. Raises Failure for any status except
        2xx."""
        status = response.status_code
        headers = response.headers
        if 200 <= status < 300:
            return
        if status < 400:
            error = self.one_line(f"HTTP {status} {headers.get('location', '')}")
            raise Failure(f"{NOT_OPENAI} ({error})", status=status, fatal=True)
        texts = _error_texts(parse_json(await _read(response.aiter_bytes())))
        error = self.one_line(": ".join([f"HTTP {status}", *texts]))
        fatal = True
        if status == 402 or not NO_QUOTA.isdisjoint(texts):
            message = f"has no quota left for this key ({error})"
        elif status == 401 or WRONG_KEY in texts:
            message = f"refuses the key ({error}): set OPENAI_API_KEY"
        elif status in (408, 409, 429) or (status >= 500 and not NO_SYSTEM.search(error)):
            raise Failure(
                f"is in trouble ({error})",
                status=status,
                again=True,
                # 503: Ollama's queue is full; 529: Anthropic is overloaded
                busy=status in (429, 503, 529),
                retry_after=_retry_after(headers),
            )
        elif status == 404:
            message = (
                f"does not have what was asked for ({error}): check the URL and --teacher-model"
            )
        elif NO_CONTEXT.search(error):
            message = f"has too short a context for opening and story ({error})"
        else:
            fatal = False
            message = f"refuses the request ({error})"
            if status == 403:  # it may concern this story only: OpenRouter's moderation
                message += "; if it refuses every one, set OPENAI_API_KEY"
        raise Failure(message, status=status, fatal=fatal)

    def one_line(self, text: str) -> str:
        """`text` as one short line, without control characters and the key."""
        return " ".join(printable(redacted(text, self._key)).split())[:LONGEST_MESSAGE]


async def in_time(request: Awaitable[T], seconds: float) -> T:
    """Its result. Raises Failure if it takes longer."""
    try:
        return await asyncio.wait_for(request, seconds)
    except asyncio.TimeoutError:  # the builtin TimeoutError only from Python 3.11 on
        raise Failure("takes too long to answer", again=True) from None


async def _read(chunks: AsyncIterator[bytes]) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > LONGEST_ANSWER:
            raise Failure(
                f"answers with more than {LONGEST_ANSWER >> 20} MiB", status=200, again=True
            )
    return bytes(body)


def parse_json(body: bytes | str) -> object:
    """The value; None for invalid or too deeply nested JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _tokens(usage: object) -> tuple[int, int] | None:
    match usage:
        case {"prompt_tokens": prompt, "completion_tokens": reply} if is_count_pair(
            [prompt, reply]
        ):
            return prompt, reply
    return None


def _alternatives(logprobs: object) -> tuple[tuple[str, float], ...]:
    """The likeliest tokens at the first place whose token is not white space, without values that
    are no log-probabilities, such as NaN."""
    places = logprobs.get("content") if isinstance(logprobs, dict) else None
    for place in places if isinstance(places, list) else ():
        match place:
            case {"token": str(token), "top_logprobs": [*entries]} if token.strip():
                break
    else:
        return ()
    alternatives = []
    for entry in entries:
        match entry:
            case {"token": str(token), "logprob": float() | int() as logprob}:
                if LEAST_LOGPROB <= logprob <= 0:
                    alternatives.append((token, float(logprob)))
    return tuple(alternatives)


def is_count_pair(value: object) -> bool:
    """Whether it can be the numbers of tokens of a prompt and a reply."""
    match value:
        case [_, _] as pair:
            return all(type(count) is int and 0 <= count < 10**9 for count in pair)
    return False


def _error_texts(answer: object) -> list[str]:
    """Distinct messages and codes of an error, however nested: OpenAI's object, FastAPI's detail
    with the field's location, Gemini's list, OpenRouter's metadata with a provider's own error as
    text."""
    texts: dict[str, None] = {}
    values: list[object] = [answer]
    while values:
        match values.pop():
            case {**fields}:
                values += [fields[name] for name in reversed(ERROR_FIELDS) if name in fields]
            case [*items]:
                values += reversed(items)
            case str(text):
                inner = parse_json(text)
                if isinstance(inner, dict | list):
                    values.append(inner)
                else:
                    texts[text] = None
    return list(texts)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait, from Retry-After; 0 without."""
    value = headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", value) else 0.0
