"""HTTP client for one OpenAI-compatible server. The server's answers are untrusted input: their
size is bounded, their structure is checked, and control characters and an echoed key are removed
before a message quotes any text."""

import asyncio
import contextlib
import functools
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import KW_ONLY, dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from tinystory.run.credentials import SHORTEST_SECRET, redacted
from tinystory.run.text import printable

if TYPE_CHECKING:
    import httpx2
    import openai

T = TypeVar("T")
# Maximum bytes of an answer. Some hosts list hundreds of models, with prices.
LONGEST_ANSWER = 4 * 2**20
# Seconds that an idle connection is kept. The value is shorter than every server's own (5 for
# uvicorn, and so for vLLM), so that the server does not close a connection while we send.
KEEP_ALIVE_S = 2.0
CONNECT_S = 10.0  # time limit in seconds for a connection
LEAST_LOGPROB = -1e4  # smallest accepted log-probability; OpenAI gives -9999 for impossible tokens
LONGEST_PAUSE_S = 60.0  # maximum seconds without a request because the server asks for a pause
LONGEST_MESSAGE = 300  # characters of the server's message that an error quotes

TOKENS_OF_A_REQUEST = 1000  # about as many as a request needs
NUMBER = r"[0-9]{1,9}(?:\.[0-9]{0,9})?"  # in a header
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}  # of a duration such as 2m59.5s, in seconds

NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
WRONG_KEY = "no_db_connection"  # type of litellm's error 400 for a wrong key
NOT_OPENAI = "answers, but not as an OpenAI-compatible API: check the URL"
LOOPBACK = re.compile(r"https?://(localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?(/|$)", re.IGNORECASE)
NO_CONTEXT = re.compile(r"context[ _](length|size|window)", re.IGNORECASE)
# Errors of models without a system message: Gemma's and Mistral's chat templates (500 from
# llama.cpp), Google's API.
NO_SYSTEM = re.compile(
    r"(system|developer) (role|message|prompt|instruction)|roles must alternate|roles are supported",
    re.IGNORECASE,
)
# 429: too many requests; 503: Ollama's queue is full, or llama.cpp's server is loading the model;
# 529: Anthropic is overloaded
BUSY = (429, 503, 529)
CUT_SHORT = "output limit was reached"  # OpenAI's error 400 when reasoning uses up the token limit
# Fields of an error response that are read.
ERROR_FIELDS = ("message", "error", "detail", "loc", "msg", "metadata", "raw", "type", "code")


@dataclass(eq=False)
class Failure(Exception):
    """A request failed. `message` completes the sentence "the teacher at URL ..."."""

    message: str
    _: KW_ONLY
    status: int | None = None  # HTTP status; None if no answer came
    again: bool = False  # a transient failure, worth a retry
    busy: bool = False  # the server needs fewer requests
    fatal: bool = False  # every other request to this server would fail in the same way
    unreachable: bool = False  # no connection could be made
    pause_s: float = 0.0  # announced seconds until the server accepts another request
    url: str = ""  # URL of the server, set when the request is given up


@dataclass(frozen=True)
class Reply:
    """One choice of a chat completion."""

    text: str  # "" if the server sends no text
    # (token, log-probability) of the likeliest first tokens of the text; empty if the server sends
    # none; None if none were requested
    logprobs: Sequence[tuple[str, float]] | None = None
    error: str | None = None  # why the request was given up
    thought: bool = False  # whether the model reasoned before the reply, visibly or not
    # numbers of (prompt, completion) tokens that the server reports; None without a report
    tokens: tuple[int, int] | None = None
    model: str = ""  # name of the model that replied; "" if the server does not say


class ChatClient:
    """Client of the server at `url` (including /v1), for use on one event loop. Only connecting has
    a time limit here; callers limit the time of a request. role: "teacher" or "judge", for errors
    that name an option. key_name: the environment variable of the key."""

    def __init__(self, url: str, key: str, role: str = "teacher", key_name: str = "OPENAI_API_KEY"):
        self._url = url
        self._key = key.strip()
        self._role = role
        self._key_name = key_name
        self.next_at = 0.0  # on the event loop's clock: when the next request may be sent

    @functools.cached_property
    def _client(self) -> "openai.AsyncOpenAI":
        """The client of the package openai, made at the first request because the import takes two
        seconds."""
        import httpx2
        import openai

        timeout = openai.Timeout(None, connect=CONNECT_S)
        # ServerPool limits the connections. For aiohttp, 0 means no limit, and None means a limit
        # of 100. Redirects are not followed, because a redirect could send the key to another host.
        # For a loopback URL, proxies are ignored, because a proxy cannot reach this machine's
        # loopback.
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

    @staticmethod
    def load() -> None:
        """Import the package openai now, so that no request's time limit includes the import."""
        import openai  # noqa: F401

    async def close(self) -> None:
        if "_client" in vars(self):
            await self._client.close()

    async def models(self) -> list[str]:
        """The names of the models that the server lists, in the server's order. Untrusted text."""
        answer: Any = await self._answer(
            lambda client: client.models.with_streaming_response.list()
        )
        try:
            names = [str(entry["id"]) for entry in answer["data"]]
        except (TypeError, KeyError):
            raise Failure(NOT_OPENAI, status=200) from None
        return [name for name in names if name.strip()]

    async def chat(self, body: Mapping[str, Any]) -> list[Reply]:
        """The choices of the server's answer to a chat request, at least one. body: all fields of
        the request. If the body has `input` instead of `messages`, it is sent to OpenAI's other
        API, /v1/responses. Raises Failure."""

        # The package openai sends extra_body unchanged. It would check the types of other
        # arguments.
        def request(client: "openai.AsyncOpenAI") -> AbstractAsyncContextManager[Any]:
            if "input" in body:
                return client.responses.with_streaming_response.create(extra_body=body)
            completions = client.chat.completions.with_streaming_response
            return completions.create(model="", messages=[], extra_body=body)

        try:
            answer = await self._answer(request)
        except Failure as failure:
            if CUT_SHORT not in failure.message:
                raise
            return [Reply("", thought=True)]
        match answer:
            case {"output": [*_, {"content": [{"text": text, "logprobs": listed}, *_]}], **rest}:
                choice = {"message": {"content": text}, "logprobs": {"content": listed}}
                answer = {"choices": [choice], **rest}
        replies = []
        match answer:
            case {"choices": [*choices], **rest}:
                for choice in choices:
                    match choice:
                        case {"message": {**message}}:
                            replies.append(self._reply(message, choice, rest, body))
        if not replies:
            error = self.one_line("; ".join(_error_texts(answer)))
            reason = f"answers, but not with a chat completion ({error or 'nor an error'})"
            raise Failure(reason, status=200, again=True)
        return replies

    def _reply(
        self,
        message: Mapping[Any, Any],
        choice: Mapping[Any, Any],
        answer: Mapping[Any, Any],
        body: Mapping[str, Any],
    ) -> Reply:
        """The reply in one choice of an answer to the request `body`."""
        content = message.get("content")
        # JSON can contain lone surrogates, which cannot be encoded
        whole = content.encode(errors="replace").decode() if isinstance(content, str) else ""
        # some servers leave the reasoning in the text
        before, _, text = whole.rpartition("</think>")
        thoughts = before.replace("<think>", "").strip()
        if before:
            text = text.lstrip()
        apart = message.get("reasoning_content") or message.get("reasoning")
        cut = choice.get("finish_reason") == "length" and not text.strip()
        return Reply(
            # keys shorter than SHORTEST_SECRET stay: a dummy key such as "1" may equal a score
            redacted(text, self._key),
            _logprobs(choice.get("logprobs")) if "top_logprobs" in body else None,
            thought=bool(apart or thoughts) or cut or "<think>" in text[:20],
            tokens=_tokens(answer.get("usage")),
            model=self.one_line(str(answer.get("model") or "")),
        )

    def pause(self, seconds: float) -> None:
        """Allow no request for this time."""
        now = asyncio.get_running_loop().time()
        self.next_at = max(self.next_at, now + min(seconds, LONGEST_PAUSE_S))

    async def _answer(
        self,
        request: Callable[["openai.AsyncOpenAI"], AbstractAsyncContextManager[Any]],
    ) -> object:
        """The parsed JSON of the response to `request`. Raises Failure if the request cannot be
        made or the connection breaks."""
        import aiohttp
        import httpx2
        import openai

        broken = (openai.APIConnectionError, httpx2.RequestError, aiohttp.ClientError, OSError)
        try:
            async with request(self._client) as response:
                return parse_json(await _read(response.iter_bytes()))
        except (ValueError, httpx2.InvalidURL):  # not quoted: the message can contain a password
            raise Failure(
                "cannot be asked, because a setting is not valid: check the URL, the proxies (HTTP_PROXY, "
                "HTTPS_PROXY, ALL_PROXY), OPENAI_API_KEY and other variables OPENAI_...",
                fatal=True,
            ) from None
        except broken as error:
            causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        root = causes[-1]
        if isinstance(root, Failure):  # from _check_status; openai before 3.16 wraps the exception
            raise root
        message = self.one_line(str(root) or type(root).__name__)
        is_refused = any(isinstance(cause, aiohttp.ClientConnectorError) for cause in causes)
        is_late = isinstance(causes[0], openai.APITimeoutError)
        if is_late and not is_refused:  # only connecting has a time limit
            message = f"no connection within {CONNECT_S:.0f} s"
        if is_refused or is_late:
            advice = "start it, or check the URL and any proxy (HTTP_PROXY, HTTPS_PROXY, NO_PROXY)"
            message = f"cannot be reached ({message}): {advice}"
            raise Failure(message, again=True, fatal=True, unreachable=True)
        raise Failure(f"lost the connection ({message})", again=True)

    async def _check_status(self, response: "httpx2.Response") -> None:
        """Hook that is called with each response, before the body is read. Raises Failure for any
        status except 2xx."""
        status = response.status_code
        headers = response.headers
        pause = requested_pause(headers)
        self.pause(pause)
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
            message = f"refuses the key ({error}): set {self._key_name}"
        elif status in (408, 409, 429) or (status >= 500 and not NO_SYSTEM.search(error)):
            raise Failure(
                f"is overloaded or failing ({error})",
                status=status,
                again=True,
                busy=status in BUSY,
                pause_s=pause,
            )
        elif status == 404:
            message = f"has no such page or model ({error}): check the URL and --{self._role}-model"
        elif NO_CONTEXT.search(error):
            message = (
                f"has too short a context for the prompt with opening and story ({error}): give the "
                "server a longer context, or lower --max-new-tokens"
            )
        else:
            fatal = False
            message = f"refuses the request ({error})"
            if status == 403:  # may concern only this story, such as OpenRouter's moderation
                message += f"; if it refuses every request, set {self._key_name}"
        raise Failure(message, status=status, fatal=fatal)

    def one_line(self, text: str) -> str:
        """`text` as one short line, without control characters and without the key."""
        return " ".join(printable(redacted(text, self._key)).split())[:LONGEST_MESSAGE]


async def in_time(request: Awaitable[T], seconds: float) -> T:
    """The result of `request`. Raises Failure if the request takes longer than `seconds`."""
    try:
        return await asyncio.wait_for(request, seconds)
    except asyncio.TimeoutError:  # equal to the builtin TimeoutError only from Python 3.11 on
        raise Failure("takes too long to answer", again=True, busy=True) from None


async def _read(chunks: AsyncIterator[bytes]) -> bytes:
    """The whole body of a response. Raises Failure above LONGEST_ANSWER bytes."""
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > LONGEST_ANSWER:
            raise Failure(
                f"answers with more than {LONGEST_ANSWER >> 20} MiB", status=200, again=True
            )
    return bytes(body)


def parse_json(body: bytes | str) -> object:
    """The value of a JSON text; None if the text is not JSON or too deeply nested."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _tokens(usage: object) -> tuple[int, int] | None:
    """Numbers of (prompt, completion) tokens in a response's `usage`; None if it has none."""
    match usage:
        case {"prompt_tokens": prompt, "completion_tokens": reply}:
            pass
        case {"input_tokens": prompt, "output_tokens": reply}:  # of /v1/responses
            pass
        case _:
            return None
    return (prompt, reply) if are_counts([prompt, reply], 2) else None


def are_counts(values: Sequence[object], number: int) -> bool:
    """Whether the values can be this number of counts of tokens."""
    are_natural = all(type(value) is int and 0 <= value < 10**12 for value in values)
    return len(values) == number and are_natural


def _logprobs(listed: object) -> list[tuple[str, float]]:
    """(token, log-probability) of the likeliest tokens at the first position with a token that is
    not white space; [] without such a position. Values that cannot be log-probabilities, such as
    NaN, are left out."""
    positions = listed.get("content") if isinstance(listed, dict) else None
    for position in positions if isinstance(positions, list) else ():
        match position:
            case {"token": str(token), "top_logprobs": [*entries]} if token.strip():
                break
    else:
        return []
    logprobs = []
    for entry in entries:
        match entry:
            case {"token": str(token), "logprob": logprob} if is_logprob(logprob):
                logprobs.append((token[: SHORTEST_SECRET - 1], float(logprob)))
    return logprobs


def is_logprob(value: object) -> bool:
    return isinstance(value, float | int) and LEAST_LOGPROB <= value <= 0


def _error_texts(answer: object) -> list[str]:
    """Distinct messages and codes in an error response, at any depth. Known formats: OpenAI's
    object; FastAPI's detail, with the location of a field; Gemini's list; OpenRouter's metadata,
    which contains the error of a provider as text."""
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


def requested_pause(headers: Mapping[str, str]) -> float:
    """Seconds until the server allows another request, from the headers Retry-After, retry-after-ms
    and x-ratelimit-* (OpenAI's, and those of servers that follow it); 0 if it allows one now, or
    does not say."""
    pauses = [0.0]
    wait = headers.get("retry-after", "")
    if re.fullmatch(NUMBER, wait):
        pauses.append(float(wait))
    else:  # an HTTP date (RFC 9110, 10.2.3)
        with contextlib.suppress(ValueError, OverflowError):
            pauses.append(parsedate_to_datetime(wait).timestamp() - time.time())
    milliseconds = headers.get("retry-after-ms", "")
    if re.fullmatch(NUMBER, milliseconds):
        pauses.append(float(milliseconds) / 1000)
    for kind, needed in (("requests", 1), ("tokens", TOKENS_OF_A_REQUEST)):
        remaining = headers.get(f"x-ratelimit-remaining-{kind}", "")
        if re.fullmatch(NUMBER, remaining) and float(remaining) < needed:
            reset = headers.get(f"x-ratelimit-reset-{kind}", "")
            if re.fullmatch(NUMBER, reset):
                reset += "s"
            parts = re.findall(f"({NUMBER})(ms|s|m|h)", reset)
            pauses.append(sum(float(number) * UNITS[unit] for number, unit in parts))
    return max(pauses)
