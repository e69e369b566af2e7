"""HTTP client of one OpenAI-compatible server. Its answers are not trusted: their size is bounded,
their shape is checked, and control characters and an echoed key are removed before any text is
quoted in a message."""

import functools
import json
import os
import re
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from tinystory.run.credentials import redacted
from tinystory.run.errors import UserError
from tinystory.run.text import printable

if TYPE_CHECKING:
    import httpx2
    import openai

LONGEST_ANSWER = 64 * 1024  # bytes; a reply is three numbers
LONGEST_LIST = 8 * 1024 * 1024  # bytes; some hosts list hundreds of models, with prices
# shorter than any server's (5 for uvicorn and so vLLM), which must not close while we send
KEEP_ALIVE_S = 2.0
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
    retry_after: float | None = None  # seconds that the server asks to wait


@dataclass(frozen=True)
class Reply:
    """A chat completion's first choice."""

    text: str  # "" if the server sends none
    thought: bool  # whether the model reasoned before it replied, visibly or not
    # (prompt, completion) as the server counts them; None if it does not
    tokens: tuple[int, int] | None = None


class ChatClient:
    """The server at `url` (including /v1), on one event loop. Only connecting has a time limit;
    callers set others."""

    def __init__(self, url: str, key: str | None):
        self._url = url
        self._key = (key or "").strip()
        if not re.fullmatch(r"[!-~]*", self._key):
            raise UserError("OPENAI_API_KEY holds characters that no key has: set it again")
        require_sendable_headers()
        if not LOOPBACK.match(url):
            require_proxies()

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
        request = self._client.models.with_streaming_response.list()
        answer = await self._answer(request, LONGEST_LIST)
        match answer:
            case {"data": [*entries]} if all(map(_is_model, entries)):
                names = [self.one_line(entry["id"]) for entry in entries]
                return [name for name in names if name]
        raise Failure(NOT_OPENAI, status=200)

    async def chat(self, headers: Mapping[str, str] | None, body: Mapping[str, Any]) -> Reply:
        completions = self._client.chat.completions.with_streaming_response
        # openai sends the extra body unchanged; elsewhere it would check the type of every field.
        request = completions.create(model="", messages=[], extra_body=body, extra_headers=headers)
        try:
            answer = await self._answer(request, LONGEST_ANSWER)
        except Failure as failure:
            if failure.status == 400 and CUT_SHORT in failure.message:
                return Reply("", thought=True)
            raise
        reply = self._first_choice(answer)
        if reply is None:
            error = self.one_line("; ".join(_error_texts(answer)))
            message = f"answers, but not with a chat completion ({error or 'nor an error'})"
            raise Failure(message, status=200, again=True)
        return reply

    def _first_choice(self, answer: object) -> Reply | None:
        """None if `answer` is no chat completion."""
        match answer:
            case {"choices": [{"message": {**message}, **choice}, *_], **rest}:
                content = message.get("content")
            case _:
                return None
        if content is None:
            content = ""
        if not isinstance(content, str):
            return None
        # JSON can hold lone surrogates, which cannot be encoded.
        content = content.encode(errors="replace").decode()
        # Some servers leave the reasoning in the text.
        before, _, text = content.rpartition("</think>")
        thoughts = before.replace("<think>", "").strip()
        if before:
            text = text.lstrip()
        text = self._redacted(text)
        apart = message.get("reasoning_content") or message.get("reasoning")
        cut = choice.get("finish_reason") == "length" and not text.strip()
        return Reply(
            text,
            thought=bool(apart or thoughts) or cut or "<think>" in text[:20],
            tokens=_tokens(rest.get("usage")),
        )

    async def _answer(self, request: AbstractAsyncContextManager[Any], longest: int) -> object:
        """Parsed JSON of the response. Raises Failure for a connection that breaks or cannot be
        made."""
        import aiohttp
        import httpx2
        import openai

        broken = (openai.APIConnectionError, httpx2.RequestError, aiohttp.ClientError, OSError)
        try:
            async with request as response:
                return parse_json(await _read(response.iter_bytes(), longest))
        except broken as error:
            raise self._failure(error) from None

    def _failure(self, error: BaseException) -> Failure:
        """What an error of the connection means, from the errors that caused it."""
        import aiohttp

        unreachable: aiohttp.ClientConnectorError | None = None
        root = error
        while True:
            if isinstance(root, aiohttp.ClientConnectorError):
                unreachable = unreachable or root
            if root.__cause__ is None:
                break
            root = root.__cause__
        if isinstance(root, Failure):  # from _check_status: openai before 3.16 wraps it
            return root
        message = self.one_line(str(root) or type(root).__name__)
        if unreachable is None:
            return Failure(f"broke off ({message})", again=True)
        host = self._client.base_url.raw_host.decode()
        advice = "start it, or check the URL"
        if unreachable.host != host:
            proxy = f"{unreachable.host}:{unreachable.port}"
            proxies = "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"
            advice = f"start the proxy {proxy} ({proxies}), or set NO_PROXY={host}"
        message = f"cannot be reached ({message}): {advice}"
        return Failure(message, again=True, unreachable=True)

    async def _check_status(self, response: "httpx2.Response") -> None:
        """Response hook, called before the body is read. Raises Failure for any status except
        2xx."""
        status = response.status_code
        headers = response.headers
        if 200 <= status < 300:
            return
        if status < 400:
            place = NOT_OPENAI
            if "location" in headers:
                place = f"redirects to {headers['location']}: give that URL"
            raise Failure(f"{self.one_line(place)} (HTTP {status})", status=status, fatal=True)
        body = await _read(response.aiter_bytes(), LONGEST_ANSWER)
        texts = _error_texts(parse_json(body))
        error = f"HTTP {status}"
        if any(texts):
            error += f": {'; '.join(texts)}"
        error = self.one_line(error)
        fatal = True
        if status == 402 or not NO_QUOTA.isdisjoint(texts):
            message = f"has no quota left for this key ({error})"
        elif status == 401 or WRONG_KEY in texts:
            verb = "refuses the" if self._key else "wants a"
            message = f"{verb} key ({error}): set OPENAI_API_KEY"
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

    def _redacted(self, text: str) -> str:
        """`text` without any key. A dummy such as "1" stays, since a score may look like it."""
        return redacted(text, self._key)

    def one_line(self, text: str) -> str:
        """`text` as one short line, without control characters and the key."""
        line = " ".join(printable(self._redacted(text)).split())
        if len(line) > LONGEST_MESSAGE:
            line = line[: LONGEST_MESSAGE - 3] + "..."
        return line


def require_sendable_headers() -> None:
    """Raises UserError for variables of openai's that no header can hold."""
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        value = os.environ.get(name, "")
        if name == "OPENAI_CUSTOM_HEADERS":  # one per line
            value = value.replace("\n", "")
        if not re.fullmatch(r"[ -~]*", value):
            raise UserError(
                f"{name} holds characters that no header can have: set it again, or unset it"
            )


def require_proxies() -> None:
    """Raises UserError for a proxy of the environment that cannot be one."""
    for scheme, proxy in urllib.request.getproxies().items():
        if scheme not in ("http", "https", "all"):
            continue
        if "://" not in proxy:
            proxy = f"http://{proxy}"
        if server_url(proxy, ("http", "https", "socks5", "socks5h")) is None:
            raise UserError(
                f"{scheme.upper()}_PROXY is not the URL of a proxy: set it to one like http://host:port, or unset it"
            )


async def _read(chunks: AsyncIterator[bytes], longest: int) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > longest:
            raise Failure(f"answers with more than {longest >> 10} KiB", status=200, again=True)
    return bytes(body)


def parse_json(body: bytes | str) -> object:
    """The value; None for invalid or too deeply nested JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _is_model(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("id"), str)


def _tokens(usage: object) -> tuple[int, int] | None:
    match usage:
        case {"prompt_tokens": prompt, "completion_tokens": reply} if is_count_pair(
            [prompt, reply]
        ):
            return prompt, reply
    return None


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


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from retry-after-ms or Retry-After (in seconds); None without either."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", value):
            return float(value) * unit
    return None


def server_url(text: str, schemes: Sequence[str]) -> "httpx2.URL | None":
    """The parsed URL; None if no server can have it."""
    import httpx2  # here, since only runs with a teacher need it

    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL:
        return None
    host = url.raw_host.decode().rstrip(".")
    fits = len(host) <= 253 and all(0 < len(label) <= 63 for label in host.split("."))  # RFC 1035
    possible = url.scheme in schemes and fits and "%" not in host and (url.port or 0) < 1 << 16
    return url if possible and url.path.isprintable() else None
